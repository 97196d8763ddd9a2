#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <bitset>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <microtome/core/bits.hpp>
#include <microtome/core/file.hpp>
#include <microtome/core/json.hpp>
#include <microtome/core/tensor.hpp>

namespace microtome {

/// Reader of safetensors files: 8 bytes of little-endian header length, a JSON header that maps
/// each tensor's name to its dtype, shape and byte range, then the bytes. The format is described
/// in the safetensors repository (https://github.com/huggingface/safetensors). Nothing in it
/// is trusted: offsets, sizes, shapes, dtypes and overlaps are all checked at once, values when
/// they are read.
class safetensors {
public:
  struct entry {
    std::string dtype;  ///< as in the file: "F32", "BF16", ...
    shape extents;
    std::uint64_t begin = 0, end = 0;  ///< bytes, counted from the end of the header
  };

  /// Opens the file at `path` and reads its header; tensors are read when they are asked for, so
  /// that a model is never in memory twice. Throws `error` where it is not a sound safetensors
  /// file.
  explicit safetensors(const std::filesystem::path& path)
      : name_(path.string()), file_(path), size_(file_.size()) {
    parse();
  }

  /// Reads from memory, which must outlive this object; `name` stands for it in messages.
  explicit safetensors(std::span<const std::byte> bytes, std::string name = "model in memory")
      : name_(std::move(name)), bytes_(bytes), size_(bytes.size()) {
    parse();
  }

  safetensors(safetensors&&) = default;

  const std::string& name() const { return name_; }
  const std::map<std::string, entry, std::less<>>& tensors() const { return entries_; }
  const std::map<std::string, std::string, std::less<>>& metadata() const { return metadata_; }
  bool contains(std::string_view tensor_name) const { return entries_.contains(tensor_name); }

  /// A tensor as it is stored. Throws `error` where the file has lost it since it was opened.
  std::vector<std::byte> stored(const entry& e) const {
    std::vector<std::byte> bytes(static_cast<std::size_t>(e.end - e.begin));
    copy(data_ + e.begin, bytes.data(), bytes.size());
    return bytes;
  }

  /// Whether a weight is stored without its zeros. Instead of `<name>` there are then
  ///
  ///     <name>_values  (stored)           its other elements, row by row
  ///     <name>_mask    (ceil(size / 8))   U8, a bit for each element: is it stored?
  ///
  /// Element i has bit i % 8, the lowest first, of byte i / 8; bits past the end are 0.
  bool compressed(std::string_view name) const { return contains(std::string(name) + "_mask"); }

  /// How a tensor's elements are stored, compressed or not. Throws `error` where it is missing.
  const std::string& dtype(std::string_view name) const {
    return any(compressed(name) ? std::string(name) + "_values" : std::string(name)).dtype;
  }

  /// A number that tells this file's tensors from others': FNV-1a over names, shapes and bytes,
  /// eight at a time.
  std::string fingerprint() const {
    std::uint64_t hash = 0xcbf29ce484222325;
    const auto mix = [&](std::uint64_t word) { hash = (hash ^ word) * 0x100000001b3; };
    for (const auto& [name, e] : entries_) {
      for (const char c : name + to_string(e.extents)) mix(static_cast<unsigned char>(c));
      const std::vector<std::byte> bytes = stored(e);
      for (std::size_t i = 0; i < bytes.size(); i += 8) {
        std::uint64_t word = 0;
        std::memcpy(&word, bytes.data() + i, std::min<std::size_t>(8, bytes.size() - i));
        mix(word);
      }
    }
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
    return text;
  }

  /// The tensor `tensor_name` as fp32; F16 and BF16 are widened. Throws `error` where it is
  /// missing, has another shape than `expected`, another dtype, or holds a NaN or an infinity.
  tensor<float> read(std::string_view tensor_name, shape expected) const {
    return read_with(&safetensors::read_floats, tensor_name, expected);
  }

  /// The I8 tensor `tensor_name`, whole numbers from -127 to 127. Throws `error` as `read` does.
  tensor<float> read_int8(std::string_view tensor_name, shape expected) const {
    return read_with(&safetensors::read_bytes, tensor_name, expected);
  }

private:
  static constexpr std::uint64_t max_header = 64 << 20;
  using reader = tensor<float> (safetensors::*)(std::string_view, const shape&) const;

  tensor<float> read_with(reader read_stored, std::string_view tensor_name,
                          const shape& expected) const {
    return compressed(tensor_name) ? expand(read_stored, tensor_name, expected)
                                   : (this->*read_stored)(tensor_name, expected);
  }

  tensor<float> read_floats(std::string_view tensor_name, const shape& expected) const {
    const entry& e = find(tensor_name, expected);
    tensor<float> values(expected);
    widen(tensor_name, e, values);
    for (index_t i = 0; i < values.size(); ++i)
      if (!std::isfinite(values[i]))
        fail(name_, ": tensor '", tensor_name, "' holds ", values[i], " at element ", i,
             ", expected finite weights");
    return values;
  }

  tensor<float> read_bytes(std::string_view tensor_name, const shape& expected) const {
    const entry& e = find(tensor_name, expected);
    if (e.dtype != "I8")
      fail(name_, ": tensor '", tensor_name, "' has dtype ", e.dtype, ", expected I8");
    tensor<float> values(expected);
    const std::vector<std::byte> bytes = stored(e);
    for (index_t i = 0; i < values.size(); ++i) {
      const int whole = std::to_integer<int>(bytes[static_cast<std::size_t>(i)]);
      values[i] = static_cast<float>(static_cast<std::int8_t>(whole));
      if (values[i] < -127.0f)
        fail(name_, ": tensor '", tensor_name, "' holds -128 at element ", i,
             ", expected -127 to 127");
    }
    return values;
  }

  const entry& any(std::string_view tensor_name) const {
    const auto found = entries_.find(tensor_name);
    if (found == entries_.end()) fail(name_, ": tensor '", tensor_name, "' is missing");
    return found->second;
  }

  /// A compressed tensor with its zeros.
  tensor<float> expand(reader read_stored, std::string_view tensor_name,
                       const shape& expected) const {
    const std::string whole(tensor_name);
    if (contains(whole))
      fail(name_, ": tensor '", whole, "' is there twice, as it is and compressed");
    const entry& mask = find(whole + "_mask", {(expected.size() + 7) / 8});
    if (mask.dtype != "U8")
      fail(name_, ": tensor '", whole, "_mask' has dtype ", mask.dtype, ", expected U8");
    const std::vector<std::byte> mask_bytes = stored(mask);
    std::size_t bits = 0;
    for (const std::byte b : mask_bytes)
      bits += std::bitset<8>(std::to_integer<unsigned>(b)).count();
    const auto stored = static_cast<index_t>(bits);
    const tensor<float> values = (this->*read_stored)(whole + "_values", {stored});
    tensor<float> out(expected);
    index_t next = 0;
    for (index_t i = 0; i < out.size(); ++i) {
      const auto byte = std::to_integer<unsigned>(mask_bytes[static_cast<std::size_t>(i / 8)]);
      if (byte >> (i % 8) & 1) out[i] = values[next++];
    }
    if (next != stored)
      fail(name_, ": tensor '", whole, "_mask' has bits past the ", out.size(), " elements of '",
           whole, "'");
    return out;
  }

  const entry& find(std::string_view tensor_name, const shape& expected) const {
    const auto found = entries_.find(tensor_name);
    if (found == entries_.end())
      fail(name_, ": tensor '", tensor_name, "' of shape ", to_string(expected), " is missing");
    if (!(found->second.extents == expected))
      fail(name_, ": tensor '", tensor_name, "' has shape ", to_string(found->second.extents),
           ", expected ", to_string(expected));
    return found->second;
  }

  /// What a file is that people take for a model file, by its first bytes, and what to do with it;
  /// empty where they say nothing.
  static std::string_view known_mistake(std::string_view start) {
    using namespace std::string_view_literals;
    constexpr std::array<std::array<std::string_view, 2>, 9> kinds{{
        {"PK\3\4"sv,
         "a ZIP archive, such as PyTorch's checkpoints (.pth) and cases (.npz) are; "
         "converters/convert.py makes a model file of a checkpoint"sv},
        {"\x80\2"sv,
         "a pickle, such as old checkpoints (.pth) are; save it with PyTorch 1.6 or later, "
         "then converters/convert.py makes a model file of it"sv},
        {"\x08"sv,
         "protocol buffers, such as ONNX graphs are; converters/convert.py makes a model file "
         "of one"sv},
        {"\x93NUMPY"sv, "a NumPy array (.npy)"sv},
        {"\x89PNG"sv, "a PNG image"sv},
        {"\x89HDF"sv, "an HDF5 file"sv},
        {"\x1f\x8b"sv, "compressed by gzip"sv},
        {"GGUF"sv, "a GGUF file"sv},
        {"{"sv, "text, perhaps JSON such as ranges are"sv},
    }};
    for (const auto& [magic, what] : kinds)
      if (start.starts_with(magic)) return what;
    return "";
  }

  void parse() {
    if (size_ < 8) fail(name_, ": ", size_, " bytes, too short for a safetensors file");
    std::array<char, 8> first{};
    copy(0, first.data(), first.size());
    std::uint64_t header_size = 0;
    std::memcpy(&header_size, first.data(), 8);
    if (header_size > size_ - 8 || header_size > max_header) {
      const std::string_view start(first.data(), first.size());
      if (const std::string_view what = known_mistake(start); !what.empty())
        fail(name_, ": is no model file, but ", what);
      fail(name_, ": the header claims ", header_size, " bytes, but ", size_ - 8,
           " bytes follow (and at most ", max_header,
           " are accepted): truncated, or not safetensors");
    }
    std::string text(static_cast<std::size_t>(header_size), ' ');
    copy(8, text.data(), text.size());
    const detail::json_document document(text, name_ + ": the header");
    const nlohmann::json& header = document.value;
    if (!header.is_object()) fail(name_, ": the header is not a JSON object");
    data_ = 8 + header_size;
    for (const auto& [key, value] : header.items()) {
      if (key == "__metadata__")
        parse_metadata(value);
      else
        parse_entry(key, value);
    }
    check_overlaps();
  }

  void parse_metadata(const nlohmann::json& value) {
    if (!value.is_object()) fail(name_, ": __metadata__ is not an object");
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) fail(name_, ": metadata '", key, "' is not a string");
      metadata_[key] = text.get<std::string>();
    }
  }

  void parse_entry(const std::string& key, const nlohmann::json& value) {
    const auto bad = [&](const char* what) { fail(name_, ": tensor '", key, "' ", what); };
    if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") ||
        !value.contains("data_offsets"))
      bad("lacks dtype, shape or data_offsets");
    const auto& extents = value["shape"];
    const auto& offsets = value["data_offsets"];
    if (!value["dtype"].is_string() || !extents.is_array() || !offsets.is_array() ||
        offsets.size() != 2 || !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned())
      bad("has a malformed dtype, shape or data_offsets");
    if (extents.size() > shape::max_rank) bad("has more than four dimensions");

    entry e{.dtype = value["dtype"].get<std::string>(), .extents = {}};
    const std::uint64_t held = size_ - data_;
    std::uint64_t count = 1;
    for (const auto& extent : extents) {
      if (!extent.is_number_unsigned()) bad("has a negative or fractional extent");
      const auto n = extent.get<std::uint64_t>();
      if (n != 0 && count > held / n) bad("has a shape larger than the file");
      count *= n;
      e.extents.append(static_cast<index_t>(n));
    }
    const auto begin = offsets[0].get<std::uint64_t>();
    const auto end = offsets[1].get<std::uint64_t>();
    if (begin > end || end > held)
      fail(name_, ": tensor '", key, "' lies at bytes ", begin, " to ", end,
           ", but the file holds ", held, ": truncated?");
    const std::uint64_t width = dtype_size(e.dtype);
    if (width == 0) fail(name_, ": tensor '", key, "' has the unknown dtype '", e.dtype, "'");
    if (end - begin != count * width)
      fail(name_, ": tensor '", key, "' of shape ", to_string(e.extents), " and dtype ", e.dtype,
           " takes ", count * width, " bytes, but the header gives it ", end - begin);
    e.begin = begin;
    e.end = end;
    entries_.emplace(key, std::move(e));
  }

  void check_overlaps() const {
    std::vector<std::pair<std::uint64_t, const std::string*>> starts;
    for (const auto& [key, e] : entries_)
      if (e.begin < e.end) starts.emplace_back(e.begin, &key);
    std::sort(starts.begin(), starts.end());
    for (std::size_t i = 1; i < starts.size(); ++i) {
      const entry& before = entries_.find(*starts[i - 1].second)->second;
      if (before.end > starts[i].first)
        fail(name_, ": tensors '", *starts[i - 1].second, "' and '", *starts[i].second,
             "' overlap");
    }
  }

  static std::uint64_t dtype_size(std::string_view dtype) {
    if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
    if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
    if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") return 2;
    if (dtype == "I8" || dtype == "U8" || dtype == "BOOL") return 1;
    return 0;
  }

  void widen(std::string_view tensor_name, const entry& e, tensor<float>& out) const {
    if (e.dtype == "F32") {
      copy(data_ + e.begin, out.data(), static_cast<std::size_t>(e.end - e.begin));
    } else if (e.dtype == "F16" || e.dtype == "BF16") {
      const std::vector<std::byte> bytes = stored(e);
      for (index_t i = 0; i < out.size(); ++i) {
        std::uint16_t half = 0;
        std::memcpy(&half, bytes.data() + 2 * i, 2);
        out[i] = e.dtype == "BF16" ? bit_cast<float>(std::uint32_t{half} << 16) : widen_half(half);
      }
    } else {
      fail(name_, ": tensor '", tensor_name, "' has dtype ", e.dtype,
           ", expected F32, F16 or BF16");
    }
  }

  /// IEEE 754 binary16 to binary32, exactly.
  static float widen_half(std::uint16_t half) {
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    const int exponent = half >> 10 & 31;
    const int mantissa = half & 1023;
    if (exponent == 31) return mantissa ? std::nanf("") : sign * HUGE_VALF;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
    return sign * std::ldexp(static_cast<float>(mantissa | 1024), exponent - 25);
  }

  /// Bytes from `place` on, which are there.
  void copy(std::uint64_t place, void* out, std::size_t count) const {
    if (count == 0) return;
    if (bytes_.data())
      std::memcpy(out, bytes_.data() + place, count);
    else
      file_.read(place, out, count);
  }

  std::string name_;
  open_file file_;
  std::span<const std::byte> bytes_;  // where it is in memory
  std::uint64_t size_ = 0, data_ = 0;
  std::map<std::string, entry, std::less<>> entries_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
