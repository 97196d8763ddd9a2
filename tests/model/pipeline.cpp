#include "golden_support.hpp"

namespace microtome::tests {

namespace {

const sam& tiny_model() {
  static const sam model = sam::load(data_file("tiny.safetensors"));
  return model;
}

tensor<std::uint8_t> random_pixels(shape extents, unsigned seed) {
  std::mt19937 generator(seed);
  tensor<std::uint8_t> pixels(extents);
  for (std::uint8_t& value : pixels) value = static_cast<std::uint8_t>(generator());
  return pixels;
}

/// LiteMedSAM's own order of work: one object after the other, one slice after the other, from the
/// middle up, then from the middle down, masks drawn with the object's number in 8 bits.
label_map one_by_one(const tensor<std::uint8_t>& volume, std::span<const voxel_box> boxes) {
  session s(tiny_model());
  const index_t side = tiny_model().encoder.image_size();
  const index_t depth = volume.extent(0), height = volume.extent(1), width = volume.extent(2);
  label_map labels(volume.extents());
  tensor<float> input(shape{side * side, 3});
  const auto mask_of = [&](index_t z, const box& prompt, std::size_t number) {
    const image_fit fit = preprocess({volume.row(z), {height, width, 1}}, tiny_model(), input);
    s.encode(input);
    const decoded_masks masks = s.decode(std::span(&prompt, 1));
    tensor<std::uint8_t> mask(shape{height, width, 1});
    resize_bilinear({masks.low_res_masks.data(), {side, side}}, fit.frame_height, fit.frame_width,
                    height, width, 0, height, [&](index_t y, index_t x, float v) {
                      if (v > 0) mask[y * width + x] = static_cast<std::uint8_t>(number);
                    });
    return mask;
  };
  const image_fit fit = image_fit::of(height, width, tiny_model());
  const auto next = [&](const tensor<std::uint8_t>& mask, const box& original) {
    const auto small = resize_area(mask, fit.frame_height, fit.frame_width);
    index_t x0 = side, y0 = side, x1 = -1, y1 = -1;
    for (index_t i = 0; i < small.size(); ++i)
      if (small[i]) {
        x0 = std::min(x0, i % fit.frame_width), x1 = std::max(x1, i % fit.frame_width);
        y0 = std::min(y0, i / fit.frame_width), y1 = std::max(y1, i / fit.frame_width);
      }
    if (x1 < 0) return original;
    return box{static_cast<float>(std::max<index_t>(0, x0 - 3)),
               static_cast<float>(std::max<index_t>(0, y0 - 3)),
               static_cast<float>(std::min(side, x1 + 3)),
               static_cast<float>(std::min(side, y1 + 3))};
  };
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    const voxel_box& b = boxes[i];
    const box original = fit.to_frame(pixel_box{b.x0, b.y0, b.x1, b.y1});
    const index_t last = std::min(b.z1, depth - 1), middle = (b.z0 + b.z1) / 2;
    label_map mine(volume.extents());
    const auto keep = [&](index_t z, const tensor<std::uint8_t>& mask) {
      std::copy(mask.begin(), mask.end(), mine.row(z));
      return next(mask, original);
    };
    const box after_middle = keep(middle, mask_of(middle, original, i + 1));
    box prompt = after_middle;
    for (index_t z = middle + 1; z <= last; ++z) prompt = keep(z, mask_of(z, prompt, i + 1));
    prompt = after_middle;
    for (index_t z = middle - 1; z >= b.z0; --z) prompt = keep(z, mask_of(z, prompt, i + 1));
    for (index_t p = 0; p < labels.size(); ++p)
      if (mine[p]) labels[p] = static_cast<std::uint16_t>(i + 1);
  }
  return labels;
}

}  // namespace

TEST_CASE("a volume's objects together give what they give one by one") {
  const tensor<std::uint8_t> volume = random_pixels({43, 71, 60}, 1);
  const voxel_box boxes[] = {{5, 8, 2, 40, 50, 40},
                             {20, 30, 0, 59, 70, 11},
                             {0, 0, 20, 60, 71, 43},
                             {30, 10, 7, 41, 22, 7},
                             {12, 12, 41, 33, 31, 42}};
  session s(tiny_model());
  index_t last_done = 0, promised = 0;
  const label_map labels = segment(s, volume, boxes, [&](index_t done, index_t total) {
    CHECK(done > last_done);
    last_done = done;
    promised = total;
  });
  CHECK(last_done == promised);
  CHECK(promised == 39 + 12 + 23 + 1 + 2);
  const label_map expected = one_by_one(volume, boxes);
  CHECK(std::equal(labels.begin(), labels.end(), expected.begin()));
  std::vector<int> seen(6);
  for (const std::uint16_t label : labels) ++seen[label];
  CHECK(std::count_if(seen.begin(), seen.end(), [](int n) { return n > 0; }) >= 3);
}

TEST_CASE("objects of a volume with numbers of more than 8 bits") {
  const tensor<std::uint8_t> volume = random_pixels({3, 71, 60}, 4);
  // Of 257 objects the last two are drawn, as numbers in 8 bits, with 0 and 1.
  std::vector<voxel_box> boxes(255, {0, 0, 1, 3, 3, 1});
  boxes.push_back({5, 20, 0, 40, 65, 2});
  boxes.push_back({28, 20, 1, 55, 65, 1});
  session s(tiny_model());
  const label_map labels = segment(s, volume, boxes);
  std::vector<index_t> seen(boxes.size() + 1);
  for (const std::uint16_t label : labels) ++seen[label];
  CHECK(seen[256] > 0);
  // Object 256 is prompted with its own box on every slice, and not lost.
  const voxel_box& wrapped = boxes[255];
  const pixel_box plane{wrapped.x0, wrapped.y0, wrapped.x1, wrapped.y1};
  for (index_t z = 0; z < 3; ++z) {
    const label_map alone = segment(s, {volume.row(z), {71, 60, 1}}, std::span(&plane, 1));
    const view<const std::uint16_t> slice(labels.row(z), {71, 60});
    for (index_t i = 0; i < alone.size(); ++i)
      CHECK((slice[i] >= 256) == (alone[i] || slice[i] == 257));
  }
}

TEST_CASE("later boxes are drawn over earlier ones") {
  const tensor<std::uint8_t> image = random_pixels({80, 61, 3}, 2);
  const pixel_box boxes[] = {{5, 5, 40, 60}, {10, 0, 61, 80}, {5, 5, 40, 60}};
  session s(tiny_model());
  const label_map all = segment(s, image, boxes);
  const label_map alone = segment(s, image, std::span(boxes, 1));
  index_t marked = 0;
  for (index_t i = 0; i < all.size(); ++i) {
    CHECK(all[i] != 1);  // the third box is the first once more
    if (alone[i]) CHECK(all[i] == 3);
    marked += alone[i] != 0;
  }
  CHECK(marked > 0);
}

TEST_CASE("many boxes decode in chunks like few") {
  const tensor<std::uint8_t> image = random_pixels({52, 52, 3}, 3);
  std::vector<pixel_box> boxes;
  for (index_t i = 0; i < 300; ++i) boxes.push_back({i % 40, i / 10, i % 40 + 9, i / 10 + 11});
  session s(tiny_model());
  const label_map labels = segment(s, image, boxes);
  label_map expected(labels.extents());
  const std::size_t few = 23;  // divides nothing
  for (std::size_t i = 0; i < boxes.size(); i += few) {
    const auto some = std::span(boxes).subspan(i, std::min(few, boxes.size() - i));
    const label_map part = segment(s, image, some);
    for (index_t p = 0; p < part.size(); ++p)
      if (part[p]) expected[p] = static_cast<std::uint16_t>(i + part[p]);
  }
  CHECK(std::equal(labels.begin(), labels.end(), expected.begin()));
}

TEST_CASE("no boxes, tiny images, one colour") {
  session s(tiny_model());
  const label_map none = segment(s, random_pixels({9, 7, 3}, 1), std::span<const pixel_box>{});
  CHECK(std::all_of(none.begin(), none.end(), [](std::uint16_t v) { return v == 0; }));
  const pixel_box all{0, 0, 1, 1};
  CHECK(segment(s, random_pixels({1, 1, 3}, 1), std::span(&all, 1)).size() == 1);
  tensor<std::uint8_t> black(shape{30, 40, 1});
  const pixel_box box{3, 3, 20, 20};
  CHECK(segment(s, black, std::span(&box, 1)).extents() == shape{30, 40});
}

TEST_CASE("boxes as thin as a line, and boxes that reach outside, are objects") {
  session s(tiny_model());
  const tensor<std::uint8_t> image = random_pixels({60, 80, 3}, 1);
  tensor<float> input(shape{52 * 52, 3});
  const image_fit fit = preprocess(image, tiny_model(), input);
  for (const pixel_box b : {pixel_box{30, 10, 30, 50}, pixel_box{12, 9, 12, 9},
                            pixel_box{-1, 10, 40, 20}, pixel_box{5, 10, 81, 61}}) {
    CAPTURE(b.x0);
    const label_map labels = segment(s, image, std::span(&b, 1));
    s.encode(input);
    const box prompt = fit.to_frame(b);
    const decoded_masks masks = s.decode(std::span(&prompt, 1));
    resize_bilinear(
        {masks.low_res_masks.data(), {52, 52}}, fit.frame_height, fit.frame_width, 60, 80, 0, 60,
        [&](index_t y, index_t x, float v) { CHECK(labels[y * 80 + x] == (v > 0 ? 1 : 0)); });
  }
}

TEST_CASE("boxes that make no sense are named, and cost the others nothing") {
  session s(tiny_model());
  const tensor<std::uint8_t> image = random_pixels({30, 40, 3}, 1);
  std::string told;
  const auto keep = [&](std::size_t number, const std::string& complaint) {
    told += std::to_string(number) + ": " + complaint + '\n';
  };
  const pixel_box good{1, 1, 25, 25};
  const label_map alone = segment(s, image, std::span(&good, 1));
  const auto flat_error = [&](pixel_box b) {
    const pixel_box boxes[] = {b, good, b};
    told.clear();
    const label_map labels = segment(s, image, boxes, keep);
    for (index_t i = 0; i < labels.size(); ++i) CHECK(labels[i] == (alone[i] ? 2 : 0));
    CHECK(mentions(told, {"0: box 0 (", "2: box 2 ("}));
    return error_of([&] { static_cast<void>(segment(s, image, boxes)); });
  };
  CHECK(mentions(flat_error({10, 10, 5, 20}), {"box 0", "(10, 10, 5, 20)", "reversed"}));
  CHECK(mentions(flat_error({-9, 10, -1, 20}), {"box 0", "outside", "40 x 30"}));
  CHECK(mentions(flat_error({1, 31, 20, 50}), {"box 0", "outside"}));
  const tensor<std::uint8_t> volume = random_pixels({6, 30, 40}, 1);
  const voxel_box whole{1, 1, 0, 25, 25, 5};
  const auto deep_error = [&](voxel_box b) {
    const voxel_box boxes[] = {b, whole};
    told.clear();
    const label_map labels = segment(s, volume, boxes, {}, keep);
    CHECK(mentions(told, {"0: box 0"}));
    index_t labelled = 0;
    for (const std::uint16_t label : labels) labelled += label == 2;
    CHECK(labelled > 0);
    return error_of([&] { static_cast<void>(segment(s, volume, std::span(&b, 1))); });
  };
  CHECK(mentions(deep_error({1, 1, 4, 9, 9, 2}), {"box 0", "z0 = 4", "z1 = 2"}));
  CHECK(mentions(deep_error({1, 1, 6, 9, 9, 6}), {"box 0", "outside the volume of 6"}));
  CHECK(mentions(deep_error({1, 1, -5, 9, 9, 3}), {"box 0", "outside"}));
  CHECK(mentions(deep_error({1, 1, 0, 9, 9, 14}), {"box 0", "outside"}));
  CHECK(mentions(deep_error({9, 1, 0, 1, 9, 3}), {"box 0", "reversed"}));
  // Slices beyond the ends are none; the object is there all the same.
  const voxel_box beyond{1, 1, -2, 25, 25, 9};
  const label_map clipped = segment(s, volume, std::span(&beyond, 1));
  CHECK(std::count(clipped.begin(), clipped.end(), 1) > 0);
}

TEST_CASE("preprocessing: longest side fitted, minimum to maximum, zeros beyond") {
  tensor<std::uint8_t> image(shape{26, 13, 1});
  for (index_t i = 0; i < image.size(); ++i) image[i] = static_cast<std::uint8_t>(50 + i % 100);
  tensor<float> input(shape{52 * 52, 3});
  const image_fit fit = preprocess(image, tiny_model(), input);
  CHECK(fit.frame_height == 52);
  CHECK(fit.frame_width == 26);
  CHECK(*std::min_element(input.begin(), input.end()) == 0.0f);
  CHECK(*std::max_element(input.begin(), input.end()) == 1.0f);
  for (index_t p = 0; p < 52 * 52; ++p) {
    CHECK(input[3 * p] == input[3 * p + 2]);
    if (p % 52 >= 26) CHECK(input[3 * p] == 0.0f);
  }
  const box b = image_fit::of(2604, 1726, 256, {.frame = 256}).to_frame({131, 1532, 475, 1895});
  CHECK(b.x0 == 12);
  CHECK(b.y0 == 150);
  CHECK(b.x1 == 46);
  CHECK(b.y1 == 186);
}

}  // namespace microtome::tests
