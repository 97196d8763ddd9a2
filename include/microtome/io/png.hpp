#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <spng.h>

#include <microtome/core/file.hpp>
#include <microtome/core/tensor.hpp>
#include <microtome/io/colors.hpp>

namespace microtome::io {

namespace detail {

using spng_context = std::unique_ptr<spng_ctx, void (*)(spng_ctx*)>;

inline std::vector<std::byte> encode_png(const std::filesystem::path& path, spng_ihdr header,
                                         const spng_plte* palette, const void* pixels,
                                         std::size_t bytes) {
  const spng_context context(spng_ctx_new(SPNG_CTX_ENCODER), &spng_ctx_free);
  const auto check = [&](int code) {
    if (code) fail(path.string(), ": cannot be encoded: ", spng_strerror(code));
  };
  check(spng_set_option(context.get(), SPNG_ENCODE_TO_BUFFER, 1));
  check(spng_set_ihdr(context.get(), &header));
  if (palette) {
    spng_plte copy = *palette;
    check(spng_set_plte(context.get(), &copy));
  }
  check(spng_encode_image(context.get(), pixels, bytes, SPNG_FMT_PNG, SPNG_ENCODE_FINALIZE));
  std::size_t size = 0;
  int code = 0;
  const std::unique_ptr<void, void (*)(void*)> buffer(
      spng_get_png_buffer(context.get(), &size, &code), &std::free);
  check(code);
  const auto* first = static_cast<const std::byte*>(buffer.get());
  return {first, first + size};
}

}  // namespace detail

/// Largest PNG that is read, in pixels: 16384 x 16384.
inline constexpr index_t max_png_pixels = index_t{1} << 28;

namespace detail {

/// Numbers of 16 bits (n, 4) to bytes (n, 3): the least of all colours becomes 0, the largest 255.
/// Scans rarely use all 16 bits, so that their upper bytes would hold little of them.
inline std::string spread_to_8_bits(const std::vector<std::uint16_t>& wide,
                                    tensor<std::uint8_t>& out) {
  int low = 65535, high = 0;
  for (std::size_t i = 0; i < wide.size(); ++i)
    if (i % 4 != 3) {  // transparency
      low = std::min<int>(low, wide[i]);
      high = std::max<int>(high, wide[i]);
    }
  const int range = std::max(high - low, 1);
  for (index_t i = 0; i < out.size(); ++i) {
    const int value = wide[static_cast<std::size_t>(i / 3 * 4 + i % 3)] - low;
    out[i] = static_cast<std::uint8_t>((value * 255 + range / 2) / range);
  }
  return "its 16-bit values from " + std::to_string(low) + " to " + std::to_string(high) +
         " were spread over 8 bits";
}

}  // namespace detail

/// Reads any PNG from memory, for which `name` stands in messages, or from a file, as 8-bit RGB (H,
/// W, 3); transparency is dropped, 16 bits are spread over 8 from the least to the largest value of
/// the image, which `note`, if given, then says. Needs libspng. Throws `error` where the file is
/// damaged or larger than max_png_pixels. Checksums of chunks that the pixels do not depend on do
/// not matter.
inline tensor<std::uint8_t> read_png(std::span<const std::byte> bytes, const std::string& name,
                                     std::string* note = nullptr) {
  const detail::spng_context context(spng_ctx_new(0), &spng_ctx_free);
  const auto check = [&](int code) {
    if (code) fail(name, ": is not a sound PNG: ", spng_strerror(code));
  };
  check(spng_set_crc_action(context.get(), SPNG_CRC_ERROR, SPNG_CRC_DISCARD));
  check(spng_set_chunk_limits(context.get(), 1 << 24, 1 << 26));
  check(spng_set_png_buffer(context.get(), bytes.data(), bytes.size()));
  spng_ihdr header;
  check(spng_get_ihdr(context.get(), &header));
  const index_t height = header.height, width = header.width;
  if (height > max_png_pixels / width)
    fail(name, ": is ", width, " x ", height, " pixels, at most ", max_png_pixels, " are read");
  // A pixel takes at least one bit, and deflate never shrinks data by more than 1032.
  if (static_cast<std::size_t>(height * width / 8 / 1032) > bytes.size())
    fail(name, ": claims ", width, " x ", height, " pixels in ", bytes.size(),
         " bytes, which is impossible");
  tensor<std::uint8_t> image(shape{height, width, 3});
  const auto decode = [&](void* pixels, std::size_t expected, int format) {
    std::size_t size = 0;
    check(spng_decoded_image_size(context.get(), format, &size));
    if (size != expected) fail(name, ": decodes to ", size, " bytes, expected ", expected);
    check(spng_decode_image(context.get(), pixels, size, format, 0));
  };
  if (header.bit_depth < 16) {
    decode(image.data(), static_cast<std::size_t>(image.size()), SPNG_FMT_RGB8);
    return image;
  }
  std::vector<std::uint16_t> wide(static_cast<std::size_t>(height * width) * 4);
  decode(wide.data(), wide.size() * 2, SPNG_FMT_RGBA16);
  const std::string what = detail::spread_to_8_bits(wide, image);
  if (note) *note = what;
  return image;
}

inline tensor<std::uint8_t> read_png(const std::filesystem::path& path,
                                     std::string* note = nullptr) {
  const whole_file file(path);
  return read_png(file.bytes(), path.string(), note);
}

/// Writes an RGB image (H, W, 3), all or nothing.
inline void write_png(const std::filesystem::path& path, view<const std::uint8_t> image) {
  spng_ihdr header{};
  header.height = static_cast<std::uint32_t>(image.extent(0));
  header.width = static_cast<std::uint32_t>(image.extent(1));
  header.bit_depth = 8;
  header.color_type = SPNG_COLOR_TYPE_TRUECOLOR;
  replace_file(path, detail::encode_png(path, header, nullptr, image.data(),
                                        static_cast<std::size_t>(image.size())));
}

/// Writes labels (H, W) as a PNG whose pixel values are the labels: 8 bits with a palette, so that
/// it can also be looked at, or 16 bits of grey where a label is above 255. All or nothing.
inline void write_label_png(const std::filesystem::path& path, view<const std::uint16_t> labels) {
  spng_ihdr header{};
  header.height = static_cast<std::uint32_t>(labels.extent(0));
  header.width = static_cast<std::uint32_t>(labels.extent(1));
  if (std::all_of(labels.begin(), labels.end(), [](std::uint16_t v) { return v < 256; })) {
    header.bit_depth = 8;
    header.color_type = SPNG_COLOR_TYPE_INDEXED;
    spng_plte palette{};
    palette.n_entries = 256;
    for (int i = 1; i < 256; ++i) {
      const rgb color = label_color(i);
      palette.entries[i] = {color.r, color.g, color.b, 255};
    }
    const std::vector<std::uint8_t> pixels(labels.begin(), labels.end());
    replace_file(path, detail::encode_png(path, header, &palette, pixels.data(), pixels.size()));
  } else {
    header.bit_depth = 16;
    header.color_type = SPNG_COLOR_TYPE_GRAYSCALE;
    replace_file(path, detail::encode_png(path, header, nullptr, labels.data(),
                                          static_cast<std::size_t>(labels.size()) * 2));
  }
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
