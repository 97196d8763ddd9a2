#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <microtome/io/picture.hpp>

#include "../support.hpp"

namespace microtome::tests {

namespace {

#if MICROTOME_HAS_JPEG

std::span<const std::byte> bytes_of(const std::vector<unsigned char>& file) {
  return std::as_bytes(std::span(file));
}

/// What a test asks of the encoder.
struct jpeg_kind {
  J_COLOR_SPACE pixels, stored;
  std::vector<jpeg_scan_info> scans = {};  ///< of a progressive file
};

int channels_of(J_COLOR_SPACE space) {
  return space == JCS_GRAYSCALE ? 1 : space == JCS_CMYK ? 4 : 3;
}

/// A smooth image of all channels, as pixels come in that colour space.
std::vector<unsigned char> encoded(const jpeg_kind& kind, int height, int width) {
  jpeg_compress_struct info{};
  jpeg_error_mgr errors{};
  info.err = jpeg_std_error(&errors);
  jpeg_create_compress(&info);
  unsigned char* memory = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&info, &memory, &size);
  info.image_width = static_cast<JDIMENSION>(width);
  info.image_height = static_cast<JDIMENSION>(height);
  info.input_components = channels_of(kind.pixels);
  info.in_color_space = kind.pixels;
  jpeg_set_defaults(&info);
  jpeg_set_colorspace(&info, kind.stored);
  jpeg_set_quality(&info, 100, TRUE);
  if (!kind.scans.empty()) {
    info.scan_info = kind.scans.data();
    info.num_scans = static_cast<int>(kind.scans.size());
  }
  jpeg_start_compress(&info, TRUE);
  std::vector<unsigned char> row(static_cast<std::size_t>(width * info.input_components));
  for (int y = 0; y < height; ++y) {
    for (int i = 0; i < width * info.input_components; ++i)
      row[static_cast<std::size_t>(i)] = static_cast<unsigned char>(
          40 + 2 * y + 3 * (i / info.input_components) + 30 * (i % info.input_components));
    JSAMPROW line = row.data();
    jpeg_write_scanlines(&info, &line, 1);
  }
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  const std::vector<unsigned char> file(memory, memory + size);
  std::free(memory);
  return file;
}

#endif

}  // namespace

#if MICROTOME_HAS_JPEG

TEST_CASE("JPEGs of every colour space become RGB") {
  const int height = 17, width = 30;
  for (const jpeg_kind& kind : std::vector<jpeg_kind>{{JCS_GRAYSCALE, JCS_GRAYSCALE},
                                                      {JCS_RGB, JCS_YCbCr},
                                                      {JCS_RGB, JCS_RGB},
                                                      {JCS_CMYK, JCS_CMYK},
                                                      {JCS_CMYK, JCS_YCCK}}) {
    CAPTURE(static_cast<int>(kind.stored));
    const tensor<std::uint8_t> image = io::read_jpeg(bytes_of(encoded(kind, height, width)), "a");
    REQUIRE(image.extents() == shape{height, width, 3});
    const int channels = channels_of(kind.pixels);
    double worst = 0;
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x)
        for (int c = 0; c < 3; ++c) {
          const auto stored = [&](int channel) { return 40 + 2 * y + 3 * x + 30 * channel; };
          const double expected = channels == 4   ? stored(c) * stored(3) / 255.0
                                  : channels == 1 ? stored(0)
                                                  : stored(c);
          worst = std::max(worst, std::abs(expected - image[(y * width + x) * 3 + c]));
        }
    CHECK(worst <= 4);
  }
}

TEST_CASE("a JPEG that is cut off anywhere is an error") {
  const std::vector<unsigned char> whole = encoded({JCS_RGB, JCS_YCbCr}, 19, 23);
  CHECK_NOTHROW(io::read_jpeg(bytes_of(whole), "a"));
  for (std::size_t size = 0; size + 2 < whole.size(); ++size) {
    const std::vector<unsigned char> part(whole.begin(),
                                          whole.begin() + static_cast<std::ptrdiff_t>(size));
    CAPTURE(size);
    CHECK(mentions(error_of([&] { io::read_jpeg(bytes_of(part), "cut"); }), {"cut: "}));
  }
}

TEST_CASE("a JPEG with damaged bytes is an image or an error") {
  const std::vector<unsigned char> whole = encoded({JCS_CMYK, JCS_YCCK}, 19, 23);
  std::mt19937 generator(1);
  int errors = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<unsigned char> file = whole;
    for (int i = 0; i < 1 + round % 3; ++i)
      file[generator() % file.size()] = static_cast<unsigned char>(generator());
    try {
      static_cast<void>(io::read_jpeg(bytes_of(file), "a"));
    } catch (const error&) {
      ++errors;
    }
  }
  CHECK(errors > 200);
}

TEST_CASE("JPEGs that ask for too much are refused") {
  std::vector<unsigned char> large = encoded({JCS_RGB, JCS_YCbCr}, 16, 16);
  std::size_t frame = 0;  // of its SOF0 marker
  while (large[frame] != 0xff || large[frame + 1] != 0xc0) ++frame;
  for (std::size_t i = 5; i < 9; ++i) large[frame + i] = 0x3f;  // 16191 x 16191
  CHECK(mentions(error_of([&] { io::read_jpeg(bytes_of(large), "a"); }), {"impossible"}));
  for (std::size_t i = 5; i < 9; ++i) large[frame + i] = 0x7f;
  CHECK(mentions(error_of([&] { io::read_jpeg(bytes_of(large), "a"); }), {"at most"}));

  std::vector<jpeg_scan_info> scans{{3, {0, 1, 2}, 0, 0, 0, 0}};
  for (int component = 0; component < 3; ++component)
    for (int k = 1; k < 64; ++k) scans.push_back({1, {component}, k, k, 0, 0});
  const std::vector<unsigned char> many = encoded({JCS_RGB, JCS_YCbCr, scans}, 16, 16);
  CHECK(mentions(error_of([&] { io::read_jpeg(bytes_of(many), "a"); }), {"more than 100 scans"}));
  scans.resize(1 + 63);
  const std::vector<unsigned char> some = encoded({JCS_RGB, JCS_YCbCr, scans}, 16, 16);
  CHECK_NOTHROW(io::read_jpeg(bytes_of(some), "a"));
}

#else

TEST_CASE("a JPEG is told from damage where there is no libjpeg") {
  CHECK(mentions(error_of([] { io::read_jpeg({}, "a.jpg"); }), {"a.jpg", "built without"}));
}

#endif

TEST_CASE("pictures are told by their content") {
  const std::filesystem::path path = std::filesystem::temp_directory_path() /
                                     ("microtome." + std::to_string(std::random_device{}()));
  const auto write = [&](const std::vector<unsigned char>& content) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(content.data()),
               static_cast<std::streamsize>(content.size()));
  };
  for (const std::vector<unsigned char>& other :
       {std::vector<unsigned char>{}, {0xff, 0xd8}, {'G', 'I', 'F', '8'}, {0x89, 'P', 'N', 'G'}}) {
    write(other);
    CHECK(mentions(error_of([&] { io::read_picture(path); }), {"neither a PNG nor a JPEG"}));
  }
  tensor<std::uint8_t> image(shape{3, 5, 3});
  image[7] = 200;
  io::write_png(path, image);
  const tensor<std::uint8_t> back = io::read_picture(path);
  CHECK(std::equal(image.begin(), image.end(), back.begin(), back.end()));
#if MICROTOME_HAS_JPEG
  write(encoded({JCS_GRAYSCALE, JCS_GRAYSCALE}, 6, 9));
  CHECK(io::read_picture(path).extents() == shape{6, 9, 3});
#endif
  std::filesystem::remove(path);
}

}  // namespace microtome::tests
