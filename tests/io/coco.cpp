#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <microtome/io/coco.hpp>

#include "../support.hpp"

namespace microtome::tests {

namespace {

using counts = std::vector<std::uint32_t>;

}  // namespace

TEST_CASE("compressed runs are the text that pycocotools writes") {
  const std::vector<std::pair<counts, std::string>> samples{
      {{7, 4, 2, 4, 2, 4, 19}, "742000a0"},
      {{10, 2, 7, 4, 6, 5, 4, 7, 2, 6, 4, 4, 5, 3, 6, 2, 22}, ":272O1N2NO2N1O1O`0"},
      {{0, 24, 1, 7, 1, 7, 1, 7, 2, 6, 2, 6}, "0h01_O00001O00"},
      {{11, 7, 4, 5, 6, 3, 8, 1, 9, 1, 8, 3, 6, 5, 4, 7, 12}, ";74N2N2N10O2N2N28"},
      {{30}, "n0"},
      {{49}, "a1"},
  };
  for (const auto& [runs, text] : samples) {
    index_t pixels = 0;
    for (const std::uint32_t n : runs) pixels += n;
    CHECK(io::compressed_runs({1, pixels, runs}) == text);
    CHECK(io::expanded_runs(text, 1, pixels).counts == runs);
  }
}

TEST_CASE("any runs come back from their text") {
  std::mt19937 generator(3);
  for (int round = 0; round < 200; ++round) {
    run_lengths runs{1, 0, {}};
    std::uniform_int_distribution<std::uint32_t> size(0, round % 20 ? 1u << (round % 20) : 3);
    for (int i = 0; i < 1 + round % 17; ++i) {
      runs.counts.push_back(size(generator));
      runs.width += runs.counts.back();
    }
    CHECK(io::expanded_runs(io::compressed_runs(runs), 1, runs.width).counts == runs.counts);
  }
}

TEST_CASE("whatever bytes stand for runs are runs of the mask, or an error") {
  std::mt19937 generator(4);
  std::uniform_int_distribution<int> byte(0, 255), group('0', 'o');
  int sound = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string text(static_cast<std::size_t>(round % 12), ' ');
    for (char& c : text) c = static_cast<char>(round % 5 ? group(generator) : byte(generator));
    try {
      const run_lengths runs = io::expanded_runs(text, 5, 4);
      ++sound;
      CHECK(mask_of_runs(runs).size() == 20);
    } catch (const error&) {
    }
  }
  CHECK(sound > 0);
}

TEST_CASE("annotations are read, and what is not sound is told of") {
  const std::string text = R"({
    "info": {"year": 2026},
    "images": [{"id": 5, "file_name": "sub/a.png", "height": 4, "width": 3},
               {"id": 6, "file_name": "b.png", "height": 0, "width": 3}],
    "categories": [{"id": 1, "name": "cell", "supercategory": "thing"}],
    "annotations": [
      {"id": 1, "image_id": 5, "category_id": 1, "area": 6.5, "bbox": [0.5, 1, 2, 2.25], "iscrowd": 0,
       "segmentation": [[0, 0, 2, 0, 2, 4, 0, 4], [2, 2, 3, 2, 3, 4, 2, 4]]},
      {"id": 2, "image_id": 5, "category_id": 1, "area": 2, "iscrowd": true,
       "segmentation": {"size": [4, 3], "counts": [1, 2, 9]}},
      {"id": 3, "image_id": 6, "category_id": 1, "area": 2, "segmentation": []},
      {"id": 4, "image_id": 5, "category_id": 1, "area": 2,
       "segmentation": {"size": [4, 3], "counts": "129"}}]})";
  std::vector<std::string> complaints;
  const io::coco_instances found = io::parse_coco_instances(
      text, "i.json", [&](const std::string& complaint) { complaints.push_back(complaint); });
  REQUIRE(complaints.size() == 2);
  CHECK(mentions(complaints[0], {"i.json", "image number 1", "id 6", "'height'"}));
  CHECK(mentions(complaints[1], {"i.json", "annotation number 2", "id 3", "no image 6"}));
  REQUIRE(found.images.size() == 1);
  CHECK(found.images.at(5).file_name == "sub/a.png");
  CHECK(found.categories.at(1) == "cell");
  const std::vector<io::coco_annotation>& annotations = found.annotations.at(5);
  REQUIRE(annotations.size() == 3);
  CHECK(annotations[0].mask.counts == counts{0, 8, 2, 2});
  CHECK(annotations[0].area == 6.5);
  REQUIRE(annotations[0].box);
  CHECK(annotations[0].box->x1 == 2.5);
  CHECK(annotations[0].box->y1 == 3.25);
  CHECK(!annotations[0].crowd);
  CHECK(!annotations[1].box);
  CHECK(annotations[1].crowd);
  CHECK(annotations[2].mask.counts == annotations[1].mask.counts);
}

}  // namespace microtome::tests
