#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <microtome/imaging/average_precision.hpp>
#include <microtome/imaging/polygon_mask.hpp>
#include <microtome/imaging/run_lengths.hpp>

#include "../support.hpp"

namespace microtome::tests {

namespace {

/// A mask of blobs and holes.
tensor<std::uint8_t> random_mask(index_t height, index_t width, unsigned seed) {
  std::mt19937 generator(seed);
  tensor<std::uint8_t> mask(shape{height, width});
  std::uniform_int_distribution<int> change(0, 3);
  bool inside = seed % 2 == 0;
  for (index_t i = 0; i < mask.size(); ++i) {
    if (change(generator) == 0) inside = !inside;
    mask[i] = static_cast<std::uint8_t>(inside ? 1 + i % 255 : 0);
  }
  return mask;
}

using counts = std::vector<std::uint32_t>;

/// A mask of height 10 with columns first to last - 1 inside, of 10.
run_lengths columns(index_t first, index_t last) {
  tensor<std::uint8_t> mask(shape{10, 10});
  for (index_t i = 0; i < 100; ++i) mask[i] = i % 10 >= first && i % 10 < last;
  return runs_of(mask);
}

}  // namespace

TEST_CASE("runs hold what the mask holds") {
  for (unsigned seed = 0; seed < 60; ++seed) {
    const index_t height = 1 + seed % 9, width = 1 + seed * 7 % 13;
    CAPTURE(height);
    CAPTURE(width);
    const tensor<std::uint8_t> a = random_mask(height, width, seed);
    const tensor<std::uint8_t> b = random_mask(height, width, seed + 100);
    const run_lengths runs = runs_of(a), others = runs_of(b);
    CHECK(std::accumulate(runs.counts.begin(), runs.counts.end(), 0u) ==
          static_cast<unsigned>(a.size()));
    CHECK(std::find(runs.counts.begin() + 1, runs.counts.end(), 0u) == runs.counts.end());
    const tensor<std::uint8_t> back = mask_of_runs(runs), both = mask_of_runs(united(runs, others));
    index_t area = 0, common = 0, in_any = 0, wrong = 0;
    for (index_t i = 0; i < a.size(); ++i) {
      wrong += (back[i] != 0) != (a[i] != 0);
      wrong += (both[i] != 0) != (a[i] || b[i]);
      area += a[i] != 0;
      common += a[i] && b[i];
      in_any += a[i] || b[i];
    }
    CHECK(wrong == 0);
    CHECK(area_of(runs) == area);
    CHECK(common_area(runs, others) == common);
    CHECK(intersection_over_union(runs, others) ==
          (common ? static_cast<double>(common) / static_cast<double>(in_any) : 0));
  }
}

TEST_CASE("runs without pixels change nothing") {
  const run_lengths plain{3, 4, {2, 3, 7}}, odd{3, 4, {0, 0, 2, 1, 0, 2, 7, 0, 0}};
  CHECK(area_of(odd) == 3);
  CHECK(common_area(plain, odd) == 3);
  CHECK(common_area(odd, odd) == 3);
  CHECK(united(odd, odd).counts == plain.counts);
  CHECK(mentions(error_of([&] { common_area(plain, {4, 3, {12}}); }), {"4 x 3", "3 x 4"}));
}

TEST_CASE("polygons have the pixels that pycocotools gives them") {
  struct sample {
    const char* what;
    index_t height, width;
    std::vector<double> polygon;
    counts expected;
  };
  const std::vector<sample> samples{
      {"a square", 6, 7, {1, 1, 4, 1, 4, 5, 1, 5}, {7, 4, 2, 4, 2, 4, 19}},
      {"a triangle of fractions",
       9,
       11,
       {0.3, 0.7, 10.2, 3.9, 4.4, 8.8},
       {10, 2, 7, 4, 6, 5, 4, 7, 2, 6, 4, 4, 5, 3, 6, 2, 22}},
      {"reaching outside",
       8,
       8,
       {-3.7, -2.2, 12.5, 4.1, 3.3, 15.9},
       {0, 24, 1, 7, 1, 7, 1, 7, 2, 6, 2, 6}},
      {"crossing itself",
       10,
       10,
       {1, 1, 9, 8.5, 9, 1, 1, 8.5},
       {11, 7, 4, 5, 6, 3, 8, 1, 9, 1, 8, 3, 6, 5, 4, 7, 12}},
      {"outside", 5, 6, {20, 20, 30, 20, 25, 30}, {30}},
      {"left of the image", 5, 6, {-20, 1, -3, 1, -9, 4}, {30}},
      {"one point", 5, 6, {2.5, 2.5, 2.5, 2.5, 2.5, 2.5}, {30}},
      {"a line down", 7, 7, {2.5, 0.5, 2.5, 6.5, 2.5, 0.5}, {49}},
      {"a line across", 7, 7, {0.4, 3.5, 6.6, 3.5, 0.4, 3.5}, {49}},
      {"closed twice",
       9,
       9,
       {1, 1, 7.5, 2, 4, 7.3, 1, 1, 1, 1},
       {10, 1, 8, 3, 6, 5, 5, 5, 4, 3, 6, 2, 23}},
      {"all of the image", 4, 5, {0, 0, 5, 0, 5, 4, 0, 4}, {0, 20}},
      {"thinner than a pixel", 9, 12, {0, 4.1, 12, 4.3, 12, 4.9, 0, 4.7}, {4, 1, 8, 1, 8, 1, 8,
                                                                           1, 8, 1, 8, 1, 8, 1,
                                                                           8, 1, 8, 1, 8, 1, 8,
                                                                           1, 8, 1, 4}},
      {"in one row", 1, 12, {1.5, 0, 9.7, 0, 9.7, 1, 1.5, 1}, {2, 8, 2}},
      {"in one column", 12, 1, {0, 1.5, 1, 1.5, 1, 9.5, 0, 9.5}, {2, 8, 2}},
      {"steep below the last row", 6, 3, {1.6, 7.8, 4, 7.4, 5.4, 6.4, 0, 4.4}, {11, 1, 5, 1}},
      {"steep", 7, 6, {7.8, 2.6, 5, -0.4, 2.8, 2.2}, {22, 1, 5, 2, 5, 2, 5}},
      {"flat", 8, 3, {8.4, -1, 6.6, 7.2, 0.4, 3.2}, {11, 1, 6, 2, 4}},
      {"of fifths", 8, 6, {8, 6.8, 1.2, 2, 7.8, -1}, {17, 2, 6, 3, 5, 3, 4, 5, 3}},
      {"below the image", 3, 3, {-0.6, 4.2, 3.6, 8.2, 5.2, 4.2, 4, 1.4}, {8, 1}},
      {"between two columns",
       5,
       6,
       {2, 8.6, 3.6, 5.2, 5.4, 0.8, -0.4, 3.2},
       {3, 2, 2, 3, 2, 3, 2, 3, 1, 2, 7}},
  };
  for (const sample& s : samples) {
    CAPTURE(s.what);
    const run_lengths found = polygon_mask(s.polygon, s.height, s.width);
    CHECK(found.counts == s.expected);
  }
}

TEST_CASE("what is no polygon is refused") {
  const auto refused = [](std::vector<double> polygon) {
    return error_of([&] { polygon_mask(polygon, 10, 10); });
  };
  CHECK(mentions(refused({1, 2, 3, 4}), {"4 numbers"}));
  CHECK(mentions(refused({1, 2, 3, 4, 5, 6, 7}), {"7 numbers"}));
  CHECK(mentions(refused({1, 2, 3, 4, 5, 2e6}), {"coordinate 2e+06"}));
  CHECK(mentions(refused({1, 2, 3, 4, 5, std::nan("")}), {"coordinate nan"}));
  std::vector<double> endless;  // to and fro, which would take long
  for (int i = 0; i < 4000; ++i) endless.insert(endless.end(), {i % 2 * 1e6, 5.0});
  CHECK(mentions(error_of([&] { polygon_mask(endless, 2, 100000); }), {"more than"}));
  CHECK(area_of(polygon_mask(endless, 100, 100)) == 0);
}

TEST_CASE("average precision of a few detections, by hand") {
  average_precision precision;
  // 30 pixels are found with IoU 1 and 2 / 3, 20 pixels are missed, one detection is wrong.
  const std::vector<true_object> truth{{1, 30, false, columns(0, 3)},
                                       {1, 20, false, columns(6, 8)}};
  precision.add_image(
      truth, std::vector<detected_object>{{1, 0.9, columns(0, 3)}, {1, 0.8, columns(4, 6)}});
  precision.add_image(std::vector<true_object>{{1, 30, false, columns(0, 3)}},
                      std::vector<detected_object>{{1, 0.7, columns(0, 2)}});
  const auto found = precision.measures();
  // At 0.50 to 0.65: precisions 1, 1/2, 2/3 at recalls 1/3, 1/3, 2/3; above: 1, 1/2, 1/3 at 1/3.
  const double low = (34 * 1.0 + 33 * (2.0 / 3)) / 101, high = 34 * 1.0 / 101;
  CHECK(found[0].value == doctest::Approx((4 * low + 6 * high) / 10).epsilon(1e-12));
  CHECK(found[1].value == doctest::Approx(low).epsilon(1e-12));
  CHECK(found[2].value == doctest::Approx(high).epsilon(1e-12));
  CHECK(found[3].value == doctest::Approx(found[0].value));  // all are small
  CHECK(found[4].value == -1);
  CHECK(found[5].value == -1);
  CHECK(found[6].value == doctest::Approx((4 * (2.0 / 3) + 6 * (1.0 / 3)) / 10));
  CHECK(found[8].value == found[6].value);
}

TEST_CASE("what is found in a crowd is neither right nor wrong") {
  average_precision precision, without;
  const std::vector<true_object> truth{{1, 30, false, columns(0, 3)},
                                       {1, 50, true, columns(5, 10)}};
  const std::vector<detected_object> found{
      {1, 0.9, columns(5, 6)}, {1, 0.8, columns(8, 10)}, {1, 0.7, columns(0, 3)}};
  precision.add_image(truth, found);
  CHECK(precision.measures()[0].value == doctest::Approx(1));
  without.add_image(std::span(truth).first(1), found);
  CHECK(without.measures()[0].value == doctest::Approx(1.0 / 3));
}

}  // namespace microtome::tests
