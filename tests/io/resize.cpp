#include <microtome/imaging/resize.hpp>

#include "../arrays.hpp"
#include "../support.hpp"

namespace microtome::tests {

namespace {

/// Holds `resize` to every pair of images in a file of tests/data, of which there are `count`.
void check_resizes(const char* name, int count, auto resize) {
  const array_file file(data_file(name));
  int compared = 0;
  for (const std::string& key : file.names()) {
    if (!key.ends_with(".image")) continue;
    CAPTURE(key);
    const io::npy_array image = file.read(key);
    const io::npy_array expected = file.read(key.substr(0, key.size() - 5) + "resized");
    const shape& to = expected.header.extents;
    const view<const std::uint8_t> pixels{image.bytes.data(), image.header.extents};
    const tensor<std::uint8_t> got = resize(pixels, to[0], to[1]);
    REQUIRE(got.extents() == to);
    CHECK(std::equal(got.begin(), got.end(), expected.bytes.begin()));
    ++compared;
  }
  CHECK(compared == count);
  CHECK(mentions(error_of([&] {
                   static_cast<void>(resize({nullptr, {0, 4, 3}}, 2, 2));
                 }),
                 {"(0, 4, 3)"}));
}

}  // namespace

TEST_CASE("resize_area equals OpenCV's INTER_AREA, bit for bit, and refuses empty images") {
  check_resizes("resize.npz", 12,
                [](view<const std::uint8_t> image, index_t height, index_t width) {
                  return resize_area(image, height, width);
                });
}

TEST_CASE("resize_antialiased equals Pillow's BILINEAR, bit for bit, and refuses empty images") {
  check_resizes("resize_antialiased.npz", 10,
                [](view<const std::uint8_t> image, index_t height, index_t width) {
                  return resize_antialiased(image, height, width);
                });
}

TEST_CASE("two bilinear interpolations after each other, by rows, are those of whole planes") {
  const index_t side = 5, frame = 13, crop_h = 11, crop_w = 9, out_h = 17, out_w = 23;
  const tensor<float> plane = random_tensor({side, side}, 1);
  tensor<float> middle(shape{frame, frame}), expected(shape{out_h, out_w}),
      got(shape{out_h, out_w});
  resize_bilinear(plane, side, side, frame, frame, 0, frame,
                  [&](index_t y, index_t x, float v) { middle[y * frame + x] = v; });
  resize_bilinear(middle, crop_h, crop_w, out_h, out_w, 0, out_h,
                  [&](index_t y, index_t x, float v) { expected[y * out_w + x] = v; });
  for (const index_t rows : {1, 5, 17})  // however they are cut
    for (index_t y = 0; y < out_h; y += rows)
      resize_bilinear_through(plane, frame, crop_h, crop_w, out_h, out_w, y,
                              std::min(out_h, y + rows),
                              [&](index_t i, index_t x, float v) { got[i * out_w + x] = v; });
  CHECK(std::equal(got.begin(), got.end(), expected.begin()));
  resize_bilinear_through(middle, frame, crop_h, crop_w, out_h, out_w, 0, out_h,
                          [&](index_t y, index_t x, float v) { got[y * out_w + x] = v + 1; });
  for (index_t i = 0; i < got.size(); ++i) CHECK(got[i] == expected[i] + 1);
}

TEST_CASE("resize_bilinear aligns pixel centres, and crops first") {
  tensor<float> plane(shape{4, 5});
  for (index_t y = 0; y < 4; ++y)
    for (index_t x = 0; x < 5; ++x) plane[y * 5 + x] = static_cast<float>(10 * y + x);
  plane[4] = plane[3 * 5] = 1e9f;  // outside the crop of 3 x 4
  tensor<float> out(shape{7, 9});
  resize_bilinear(plane, 3, 4, 7, 9, 0, 7,
                  [&](index_t y, index_t x, float value) { out[y * 9 + x] = value; });
  for (index_t y = 0; y < 7; ++y)
    for (index_t x = 0; x < 9; ++x) {
      const double sy = std::clamp((static_cast<double>(y) + 0.5) * 3 / 7 - 0.5, 0.0, 2.0);
      const double sx = std::clamp((static_cast<double>(x) + 0.5) * 4 / 9 - 0.5, 0.0, 3.0);
      CHECK(out[y * 9 + x] == doctest::Approx(10 * sy + sx));
    }
}

}  // namespace microtome::tests
