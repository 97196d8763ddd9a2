#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include <microtome/core/file.hpp>
#include <microtome/core/tensor.hpp>
#include <microtome/io/jpeg.hpp>
#include <microtome/io/png.hpp>

namespace microtome::io {

/// Reads a PNG or a JPEG, told by its first bytes whatever its name, as 8-bit RGB (H, W, 3); see
/// read_png() and read_jpeg(). `note`, if given, then says what was done to its values.
inline tensor<std::uint8_t> read_picture(const std::filesystem::path& path,
                                         std::string* note = nullptr) {
  const whole_file file(path);
  const auto begins = [&](auto... values) {
    const std::array<std::byte, sizeof...(values)> expected{std::byte(values)...};
    const std::span<const std::byte> bytes = file.bytes();
    return bytes.size() >= expected.size() &&
           std::equal(expected.begin(), expected.end(), bytes.begin());
  };
  if (begins(0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'))
    return read_png(file.bytes(), path.string(), note);
  if (begins(0xff, 0xd8, 0xff)) return read_jpeg(file.bytes(), path.string());
  fail(path.string(), ": is neither a PNG nor a JPEG");
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
