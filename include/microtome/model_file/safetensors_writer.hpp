#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <microtome/core/file.hpp>
#include <microtome/core/tensor.hpp>

namespace microtome {

/// Collects tensors and writes them as a safetensors file, all or nothing.
class safetensors_writer {
public:
  void metadata(const std::string& key, const std::string& text) { metadata_[key] = text; }

  void add(const std::string& name, const std::string& dtype, const shape& extents,
           std::span<const std::byte> bytes) {
    std::string entry = "{\"dtype\":" + quoted(dtype) + ",\"shape\":[";
    for (int axis = 0; axis < extents.rank(); ++axis)
      entry.append(axis ? "," : "").append(std::to_string(extents[axis]));
    entry.append("],\"data_offsets\":[").append(std::to_string(data_.size())).append(",");
    entry.append(std::to_string(data_.size() + bytes.size())).append("]}");
    data_.insert(data_.end(), bytes.begin(), bytes.end());
    header_[name] = std::move(entry);
  }

  void add(const std::string& name, const tensor<float>& values) {
    add(name, "F32", values.extents(),
        std::as_bytes(std::span(values.data(), static_cast<std::size_t>(values.size()))));
  }

  /// A weight, compressed (see safetensors::compressed) where that makes it smaller.
  void add_weight(const std::string& name, const std::string& dtype, const shape& extents,
                  std::span<const std::byte> bytes) {
    const auto size = static_cast<std::size_t>(extents.size());
    const std::size_t width = size ? bytes.size() / size : 1;
    std::vector<std::byte> mask((size + 7) / 8), values;
    for (std::size_t i = 0; i < size; ++i) {
      const auto element = bytes.subspan(i * width, width);
      if (std::all_of(element.begin(), element.end(), [](std::byte b) { return b == std::byte{}; }))
        continue;
      mask[i / 8] |= std::byte{1} << (i % 8);
      values.insert(values.end(), element.begin(), element.end());
    }
    if (values.size() + mask.size() >= bytes.size()) return add(name, dtype, extents, bytes);
    add(name + "_values", dtype, {static_cast<index_t>(values.size() / width)}, values);
    add(name + "_mask", "U8", {static_cast<index_t>(mask.size())}, mask);
  }

  /// Throws `error` as replace_file does.
  void write(const std::filesystem::path& path) const { replace_file(path, bytes()); }

  /// The file.
  std::vector<std::byte> bytes() const {
    std::string text = "{\"__metadata__\":{";
    for (const auto& [key, value] : metadata_)
      text.append(text.back() == '{' ? "" : ",")
          .append(quoted(key))
          .append(":")
          .append(quoted(value));
    text += "}";
    for (const auto& [name, entry] : header_)
      text.append(",").append(quoted(name)).append(":").append(entry);
    text += "}";
    text.resize((8 + text.size() + 63) / 64 * 64 - 8, ' ');  // the data starts at a multiple of 64
    std::vector<std::byte> file(8 + text.size());
    const std::uint64_t size = text.size();
    std::memcpy(file.data(), &size, 8);
    std::memcpy(file.data() + 8, text.data(), text.size());
    file.insert(file.end(), data_.begin(), data_.end());
    return file;
  }

private:
  static std::string quoted(const std::string& text) { return nlohmann::json(text).dump(); }

  std::map<std::string, std::string> metadata_, header_;  // of the latter, JSON
  std::vector<std::byte> data_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
