#pragma once

#include <kernels/macros_off.hpp>

#include <charconv>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include <microtome/core/tensor.hpp>

namespace microtome::io {

/// What the header of a NumPy array says. The format is described in NumPy's documentation
/// (numpy.lib.format).
struct npy_header {
  std::string dtype;  ///< as NumPy writes it: "|u1", "<i8", ...
  bool column_major = false;
  shape extents;
};

/// An array of any dtype, row-major.
struct npy_array {
  npy_header header;
  tensor<std::uint8_t> bytes;  ///< flat
};

/// NumPy's name of T's dtype, little-endian.
template <class T>
constexpr const char* npy_dtype() {
  if constexpr (std::is_same_v<T, float>)
    return "<f4";
  else if constexpr (std::is_same_v<T, double>)
    return "<f8";
  else if constexpr (std::is_integral_v<T> && sizeof(T) == 1)
    return std::is_signed_v<T> ? "|i1" : "|u1";
  else if constexpr (std::is_integral_v<T> && sizeof(T) == 2)
    return std::is_signed_v<T> ? "<i2" : "<u2";
  else if constexpr (std::is_integral_v<T> && sizeof(T) == 4)
    return std::is_signed_v<T> ? "<i4" : "<u4";
  else if constexpr (std::is_integral_v<T> && sizeof(T) == 8)
    return std::is_signed_v<T> ? "<i8" : "<u8";
  else
    static_assert(!sizeof(T), "no NumPy dtype for this type");
}

/// Bytes of one element; 0 for a dtype that microtome does not read (big-endian, structured,
/// objects, text).
inline index_t npy_element_size(std::string_view dtype) {
  if (dtype.size() != 3) return 0;
  const char order = dtype[0], kind = dtype[1], size = dtype[2];
  if (size == '1') return (kind == 'u' || kind == 'i' || kind == 'b') && order != '>' ? 1 : 0;
  if (order != '<' || (kind != 'u' && kind != 'i' && kind != 'f')) return 0;
  if (size == '2' || size == '4' || size == '8') return size - '0';
  return 0;
}

/// The header of version 1.0 for an array of T, its magic and length included; a multiple of 64
/// bytes.
template <class T>
std::string npy_header_bytes(const shape& extents) {
  std::string text = "{'descr': '";
  text += npy_dtype<T>();
  text += "', 'fortran_order': False, 'shape': (";
  for (int axis = 0; axis < extents.rank(); ++axis) text += std::to_string(extents[axis]) + ", ";
  text += "), }";
  constexpr std::size_t preamble = 10;
  text.append(63 - (preamble + text.size()) % 64, ' ');
  text += '\n';
  std::string bytes("\x93NUMPY\x01\x00", 8);
  bytes += static_cast<char>(text.size() & 255);
  bytes += static_cast<char>(text.size() >> 8);
  return bytes + text;
}

namespace detail {

/// Reads the Python dictionary of a .npy header: three keys, each once, in any order.
class npy_header_parser {
public:
  npy_header_parser(std::string_view text, const std::string& name) : rest_(text), name_(name) {}

  npy_header parse() {
    npy_header header;
    expect('{');
    for (int keys = 0; !accept('}'); ++keys) {
      const std::string key = quoted();
      expect(':');
      if (keys < 3 && key == "descr")
        header.dtype = quoted();
      else if (keys < 3 && key == "fortran_order")
        header.column_major = boolean();
      else if (keys < 3 && key == "shape")
        header.extents = extents();
      else
        bad();
      accept(',');
    }
    skip_space();
    if (!rest_.empty() || header.dtype.empty()) bad();
    return header;
  }

private:
  [[noreturn]] void bad() const { fail(name_, ": the .npy header is malformed"); }

  void skip_space() {
    while (!rest_.empty() && (rest_[0] == ' ' || rest_[0] == '\n')) rest_.remove_prefix(1);
  }
  bool accept(char c) {
    skip_space();
    if (rest_.empty() || rest_[0] != c) return false;
    rest_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!accept(c)) bad();
  }
  std::string quoted() {
    skip_space();
    if (rest_.empty() || (rest_[0] != '\'' && rest_[0] != '"')) bad();
    const std::size_t end = rest_.find(rest_[0], 1);
    if (end == std::string_view::npos) bad();
    std::string text(rest_.substr(1, end - 1));
    rest_.remove_prefix(end + 1);
    return text;
  }
  bool boolean() {
    skip_space();
    for (const std::string_view word : {"True", "False"})
      if (rest_.starts_with(word)) {
        rest_.remove_prefix(word.size());
        return word == "True";
      }
    bad();
  }
  shape extents() {
    shape s;
    expect('(');
    while (!accept(')')) {
      skip_space();
      index_t extent = 0;
      const auto [end, failed] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), extent);
      if (failed != std::errc{} || extent < 0) bad();
      rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
      if (s.rank() == shape::max_rank)
        fail(name_, ": more than ", shape::max_rank, " dimensions, at most that are read");
      s.append(extent);
      accept(',');
    }
    return s;
  }

  std::string_view rest_;
  const std::string& name_;
};

}  // namespace detail

/// Reads the header at the front of `bytes`, the first of which may be all there are so far.
/// `name` stands for the array in messages. Throws `error` where it is not a header that microtome
/// reads, or where it promises more than `max_bytes` of elements. Returns it and its own length.
inline std::pair<npy_header, std::size_t> parse_npy_header(std::span<const std::byte> bytes,
                                                           const std::string& name,
                                                           index_t max_bytes) {
  const auto byte = [&](std::size_t i) { return static_cast<std::size_t>(bytes[i]); };
  if (bytes.size() < 10 || std::memcmp(bytes.data(), "\x93NUMPY", 6) != 0)
    fail(name, ": is not a .npy array");
  const bool wide = byte(6) >= 2;
  if (byte(6) < 1 || byte(6) > 3 || (wide && bytes.size() < 12))
    fail(name, ": .npy version ", byte(6), " is not known");
  const std::size_t preamble = wide ? 12 : 10;
  const std::size_t length =
      byte(8) | byte(9) << 8 | (wide ? byte(10) << 16 | byte(11) << 24 : std::size_t{0});
  if (length > bytes.size() - preamble)
    fail(name, ": the .npy header of ", length, " bytes is cut off");
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + preamble, length);
  npy_header header = detail::npy_header_parser(text, name).parse();

  const index_t width = npy_element_size(header.dtype);
  if (width == 0)
    fail(name, ": dtype '", header.dtype,
         "' is not read, expected little-endian integers or floats");
  index_t limit = max_bytes / width;
  for (int axis = 0; axis < header.extents.rank(); ++axis) {
    const index_t extent = header.extents[axis];
    if (extent > limit)
      fail(name, ": shape ", to_string(header.extents), " of '", header.dtype,
           "' is larger than the ", max_bytes, " bytes that an array may have");
    if (extent > 0) limit /= extent;
  }
  return {std::move(header), preamble + length};
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
