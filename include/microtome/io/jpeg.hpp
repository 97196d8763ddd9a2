#pragma once

#include <kernels/macros_off.hpp>

#include <cstdint>
#include <span>
#include <string>

#include <microtome/core/tensor.hpp>

#ifndef MICROTOME_HAS_JPEG
#define MICROTOME_HAS_JPEG 0  // 1 where programs are linked with libjpeg
#endif

#if MICROTOME_HAS_JPEG
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <vector>

#include <jpeglib.h>

#include <jerror.h>
#endif

namespace microtome::io {

/// Largest JPEG that is read, in pixels: 16384 x 16384.
inline constexpr index_t max_jpeg_pixels = index_t{1} << 28;
/// Most scans that a progressive JPEG may have. Encoders write about ten; each costs as much as the
/// whole image.
inline constexpr int max_jpeg_scans = 100;

#if MICROTOME_HAS_JPEG

namespace detail {

/// A JPEG that is being read. libjpeg reports errors by a call that must not return, which jumps
/// back into attempt().
class jpeg_reader {
public:
  jpeg_reader(std::span<const std::byte> bytes, const std::string& name)
      : bytes_(bytes), name_(name) {
    info_.err = jpeg_std_error(&errors_);
    info_.client_data = this;
    errors_.error_exit = [](j_common_ptr info) { self(info).give_up(); };
    errors_.emit_message = [](j_common_ptr info, int level) { self(info).note(level); };
    errors_.output_message = [](j_common_ptr) {};
    monitor_.progress_monitor = [](j_common_ptr info) { self(info).count_scans(); };
    attempt([this] {
      jpeg_create_decompress(&info_);
      info_.progress = &monitor_;
      jpeg_mem_src(&info_, reinterpret_cast<const unsigned char*>(bytes_.data()),
                   static_cast<unsigned long>(bytes_.size()));
    });
  }
  jpeg_reader(const jpeg_reader&) = delete;
  jpeg_reader& operator=(const jpeg_reader&) = delete;

  /// The pixels as RGB (H, W, 3).
  tensor<std::uint8_t> read() {
    attempt([this] { jpeg_read_header(&info_, TRUE); });
    const index_t height = info_.image_height, width = info_.image_width;
    if (height > max_jpeg_pixels / width)
      fail(name_, ": is ", width, " x ", height, " pixels, at most ", max_jpeg_pixels, " are read");
    // A block of 8 x 8 pixels takes at least one bit, or a small part of one by arithmetic coding.
    const index_t pixels_of_byte = 8 * 64 * (info_.arith_code ? 32 : 1);
    if (static_cast<std::size_t>(height * width / pixels_of_byte) > bytes_.size())
      fail(name_, ": claims ", width, " x ", height, " pixels in ", bytes_.size(),
           " bytes, which is impossible");
    const bool inks = info_.num_components == 4;
    if (!inks && info_.num_components != 1 && info_.num_components != 3)
      fail(name_, ": has ", info_.num_components, " channels, expected 1, 3 or 4");
    info_.out_color_space = inks ? JCS_CMYK : JCS_RGB;
    attempt([this] { jpeg_start_decompress(&info_); });
    tensor<std::uint8_t> image(shape{height, width, 3});
    std::vector<std::uint8_t> row(static_cast<std::size_t>(width) * 4);
    for (index_t y = 0; y < height; ++y) {
      JSAMPROW line = inks ? row.data() : image.row(y);
      attempt([this, &line] { jpeg_read_scanlines(&info_, &line, 1); });
      if (inks) paper_colors(row, image.row(y));
    }
    attempt([this] { jpeg_finish_decompress(&info_); });
    return image;
  }

private:
  static jpeg_reader& self(j_common_ptr info) {
    return *static_cast<jpeg_reader*>(info->client_data);
  }

  /// Runs a call of libjpeg's, in which nothing has a destructor; throws `error` with what libjpeg
  /// reports of it.
  template <class Call>
  void attempt(Call call) {
    if (setjmp(back_) == 0) {
      call();
      if (!damage_[0]) return;
    }
    fail(name_, ": is not a sound JPEG: ", damage_);
  }

  [[noreturn]] void give_up() {
    if (!damage_[0]) errors_.format_message(reinterpret_cast<j_common_ptr>(&info_), damage_);
    std::longjmp(back_, 1);
  }

  /// Takes what libjpeg would go on after for damage, except where the pixels do not suffer.
  void note(int level) {
    const int code = errors_.msg_code;
    if (level >= 0 || damage_[0] || code == JWRN_EXTRANEOUS_DATA || code == JWRN_JFIF_MAJOR ||
        code == JWRN_ADOBE_XFORM)
      return;
    errors_.format_message(reinterpret_cast<j_common_ptr>(&info_), damage_);
  }

  void count_scans() {
    if (info_.input_scan_number <= max_jpeg_scans) return;
    std::snprintf(damage_, sizeof damage_, "it has more than %d scans", max_jpeg_scans);
    give_up();
  }

  /// Cyan, magenta, yellow and black, 255 for no ink as Adobe's programs write them, to the RGB
  /// that white paper shows: what one ink lets through times what black does.
  static void paper_colors(const std::vector<std::uint8_t>& inks, std::uint8_t* out) {
    for (std::size_t i = 0; i + 3 < inks.size(); i += 4)
      for (std::size_t c = 0; c < 3; ++c)
        *out++ = static_cast<std::uint8_t>((inks[i + c] * inks[i + 3] + 127) / 255);
  }

  /// Frees what libjpeg holds, also where the constructor throws.
  struct decompressor {
    decompressor() = default;
    decompressor(const decompressor&) = delete;
    decompressor& operator=(const decompressor&) = delete;
    ~decompressor() { jpeg_destroy_decompress(&info); }
    jpeg_decompress_struct info{};
  };

  std::span<const std::byte> bytes_;
  const std::string& name_;
  decompressor owner_;
  jpeg_decompress_struct& info_ = owner_.info;
  jpeg_error_mgr errors_{};
  jpeg_progress_mgr monitor_{};
  std::jmp_buf back_;
  char damage_[JMSG_LENGTH_MAX] = {};
};

}  // namespace detail

#endif

/// Reads any JPEG of 8 bits from memory, for which `name` stands in messages, as RGB (H, W, 3):
/// grey is repeated, YCbCr, CMYK and YCCK are converted. The orientation that EXIF data may tell is
/// not applied: pixels lie as they do in the file, which is what COCO's annotations mean. Needs
/// libjpeg (libjpeg-turbo); without MICROTOME_HAS_JPEG it only says so. Throws `error` where the
/// file is damaged, cut off, or larger than max_jpeg_pixels.
inline tensor<std::uint8_t> read_jpeg(std::span<const std::byte> bytes, const std::string& name) {
#if MICROTOME_HAS_JPEG
  return detail::jpeg_reader(bytes, name).read();
#else
  static_cast<void>(bytes);
  fail(name, ": is a JPEG, which this program was built without (it needs libjpeg)");
#endif
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
