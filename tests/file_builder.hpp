/// Composes safetensors files in memory, sound ones and others.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <microtome/model_file/safetensors.hpp>

#include "support.hpp"

namespace microtome::tests {

class file_builder {
public:
  file_builder& add(const std::string& name, const tensor<float>& values) {
    nlohmann::json extents = nlohmann::json::array();
    for (int axis = 0; axis < values.extents().rank(); ++axis)
      extents.push_back(values.extents()[axis]);
    const std::size_t begin = data.size();
    const auto bytes = std::as_bytes(std::span(values.begin(), values.end()));
    data.insert(data.end(), bytes.begin(), bytes.end());
    header[name] = {{"dtype", "F32"}, {"shape", extents}, {"data_offsets", {begin, data.size()}}};
    return *this;
  }
  /// A tensor of seeded values.
  file_builder& add(const std::string& name, shape extents, unsigned seed, float scale) {
    return add(name, random_tensor(extents, seed, scale));
  }

  std::vector<std::byte> bytes() const { return with_header(header.dump()); }

  /// The file with any text as its header.
  std::vector<std::byte> with_header(const std::string& text) const {
    std::vector<std::byte> file(8 + text.size() + data.size());
    const std::uint64_t size = text.size();
    std::memcpy(file.data(), &size, 8);
    std::memcpy(file.data() + 8, text.data(), text.size());
    std::copy(data.begin(), data.end(), file.end() - static_cast<std::ptrdiff_t>(data.size()));
    return file;
  }

  nlohmann::json header = nlohmann::json::object();
  std::vector<std::byte> data;
};

}  // namespace microtome::tests
