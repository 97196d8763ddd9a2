// The whole model on a small configuration without a round size in it, against PyTorch.
#include <array>
#include <thread>

#include "golden_support.hpp"

namespace microtome::tests {

namespace {

struct tiny {
  sam model = sam::load(data_file("tiny.safetensors"));
  array_file golden{data_file("tiny_golden.npz")};
  tensor<float> image = channels_last(read_floats(golden, "image"));

  double error(const std::string& name, view<const float> value) const {
    const tensor<float> expected = read_floats(golden, name);
    return max_error(value, expected) / std::max(deviation(expected), 1.0);
  }
};

std::vector<box> prompt_boxes(const array_file& golden) {
  const tensor<float> rows = read_floats(golden, "box_prompts");
  std::vector<box> boxes;
  for (index_t i = 0; i < rows.extent(0); ++i)
    boxes.push_back({rows.row(i)[0], rows.row(i)[1], rows.row(i)[2], rows.row(i)[3]});
  return boxes;
}

std::vector<point> prompt_points(const array_file& golden) {
  const tensor<float> rows = read_floats(golden, "point_prompts");
  const tensor<float> labels = read_floats(golden, "point_labels");
  std::vector<point> points;
  for (index_t i = 0; i < rows.extent(0); ++i)
    points.push_back({rows.row(i)[0], rows.row(i)[1], static_cast<int>(labels[i])});
  return points;
}

}  // namespace

TEST_CASE("every module of the encoder equals PyTorch's") {
  const tiny t;
  session s(t.model, {.threads = 2});
  memory_tracer trace;
  s.set_tracer(&trace);
  s.encode(t.image);
  int compared = 0;
  for (const std::string& name : t.golden.names()) {
    if (!name.starts_with("module.")) continue;
    const std::string path = name.substr(7);
    CAPTURE(path);
    REQUIRE(trace.records.contains(path));
    tensor<float> expected = read_floats(t.golden, name);
    if (expected.extents().rank() == 4) expected = channels_last(expected);
    CHECK(max_error(trace.records.at(path), expected) / deviation(expected) < 2e-5);
    ++compared;
  }
  CHECK(compared >= 20);
  const tensor<float> embedding = channels_last(read_floats(t.golden, "image_embedding"));
  CHECK(max_error(s.embedding(), embedding) < 2e-5);
}

TEST_CASE("bf16 stays near PyTorch's fp32, whatever the number of threads") {
  const tiny t;
  const sam rounded = sam::load(data_file("tiny.safetensors"), {.inputs = precision::bf16});
  const tensor<float> expected = channels_last(read_floats(t.golden, "image_embedding"));
  session one(rounded, {.threads = 1}), two(rounded, {.threads = 2});
  one.encode(t.image);
  two.encode(t.image);
  const double error = max_error(one.embedding(), expected) / deviation(expected);
  CHECK(error < 0.1);
  CHECK(error > 1e-4);  // or it would not be bf16
  CHECK(std::equal(one.embedding().begin(), one.embedding().end(), two.embedding().begin()));

  session exact(t.model, {.threads = 1});
  exact.encode(t.image);
  const std::vector<box> boxes = prompt_boxes(t.golden);
  const decoded_masks masks = two.decode(boxes), in_full = exact.decode(boxes);
  CHECK(max_error(masks.low_res_masks, in_full.low_res_masks) / deviation(in_full.low_res_masks) <
        0.15);
  const decoded_masks alone = one.decode(boxes);
  CHECK(std::equal(masks.low_res_masks.begin(), masks.low_res_masks.end(),
                   alone.low_res_masks.begin()));
}

TEST_CASE("tracing changes nothing") {
  const tiny t;
  session plain(t.model, {.threads = 1}), traced(t.model, {.threads = 1});
  memory_tracer trace;
  traced.set_tracer(&trace);
  plain.encode(t.image);
  traced.encode(t.image);
  CHECK(std::equal(plain.embedding().begin(), plain.embedding().end(), traced.embedding().begin()));
}

TEST_CASE("the position encoding equals PyTorch's") {
  const tiny t;
  const tensor<float> expected = channels_last(read_floats(t.golden, "dense_position"));
  CHECK(max_error(t.model.prompts.dense_position(), expected) < 2e-6);
}

TEST_CASE("boxes, points and masks decode as in PyTorch") {
  const tiny t;
  session s(t.model, {.threads = 2});
  s.encode(t.image);
  const std::vector<box> boxes = prompt_boxes(t.golden);
  const std::vector<point> points = prompt_points(t.golden);
  const tensor<float> mask = read_floats(t.golden, "mask_prompt");
  const auto check = [&](const std::string& name, const decoded_masks& got) {
    CAPTURE(name);
    CHECK(t.error(name + ".low_res_masks", got.low_res_masks) < 5e-5);
    CHECK(t.error(name + ".iou_predictions", got.iou_predictions) < 5e-5);
  };
  check("boxes", s.decode(boxes));
  check("multimask", s.decode({}, boxes[0]));
  check("points", s.decode(points));
  check("points_mask", s.decode(points, std::nullopt, mask, false));
  check("points_box_mask", s.decode(points, boxes[1], mask));
  check("boxes", s.decode(boxes));  // the mask prompt before has left nothing behind
}

TEST_CASE("boxes decode alike alone and in a batch, on a kept embedding too") {
  const tiny t;
  session s(t.model);
  s.encode(t.image);
  std::vector<box> boxes = prompt_boxes(t.golden);
  while (boxes.size() < 11) boxes.push_back(boxes[boxes.size() - 3]);
  const decoded_masks together = s.decode(boxes);
  const tensor<float> masks = [&] {
    tensor<float> copy(together.low_res_masks.extents());
    std::copy(together.low_res_masks.begin(), together.low_res_masks.end(), copy.begin());
    return copy;
  }();
  tensor<float> embedding(s.embedding().extents());
  std::copy(s.embedding().begin(), s.embedding().end(), embedding.begin());
  session other(t.model);
  other.set_embedding(embedding);
  for (std::size_t i = 0; i < boxes.size(); ++i) {
    const decoded_masks alone = other.decode(std::span(boxes).subspan(i, 1));
    CHECK(std::equal(alone.low_res_masks.begin(), alone.low_res_masks.end(),
                     masks.row(static_cast<index_t>(i))));
  }
}

TEST_CASE("results are the same bits for every number of threads") {
  const tiny t;
  const std::vector<box> boxes = prompt_boxes(t.golden);
  session one(t.model, {.threads = 1});
  one.encode(t.image);
  const decoded_masks expected = one.decode(boxes);
  for (const int threads : {2, 3, 5, 8}) {
    session s(t.model, {.threads = threads});
    s.encode(t.image);
    const decoded_masks got = s.decode(boxes);
    CHECK(std::equal(s.embedding().begin(), s.embedding().end(), one.embedding().begin()));
    CHECK(std::equal(got.low_res_masks.begin(), got.low_res_masks.end(),
                     expected.low_res_masks.begin()));
  }
}

#ifndef __wasm__  // where there are no threads
TEST_CASE("sessions of one model side by side do not see each other") {
  const tiny t;
  const std::vector<box> boxes = prompt_boxes(t.golden);
  session alone(t.model, {.threads = 1});
  alone.encode(t.image);
  const decoded_masks expected = alone.decode(boxes);
  std::array<bool, 3> same{};
  {
    std::vector<std::thread> users;
    for (std::size_t user = 0; user < same.size(); ++user)
      users.emplace_back([&, user] {
        session s(t.model, {.threads = 2});
        for (int turn = 0; turn < 3; ++turn) {
          s.encode(t.image);
          const decoded_masks got = s.decode(boxes);
          same[user] = std::equal(got.low_res_masks.begin(), got.low_res_masks.end(),
                                  expected.low_res_masks.begin()) &&
                       (turn == 0 || same[user]);
        }
      });
    for (std::thread& user : users) user.join();
  }
  CHECK(same == std::array{true, true, true});
}
#endif

TEST_CASE("a model loads from memory as from a file") {
  const tiny t;
  const whole_file file(data_file("tiny.safetensors"));
  const sam copied = [&] {
    const std::vector<std::byte> bytes(file.bytes().begin(), file.bytes().end());
    return sam::load(bytes);
  }();
  session a(t.model), b(copied);
  a.encode(t.image);
  b.encode(t.image);
  CHECK(std::equal(a.embedding().begin(), a.embedding().end(), b.embedding().begin()));
}

TEST_CASE("wrong arguments are refused") {
  const tiny t;
  session s(t.model);
  tensor<float> small(shape{51 * 52, 3});
  CHECK(mentions(error_of([&] { s.encode(small); }), {"7956", "52 x 52"}));
  CHECK(mentions(error_of([&] { s.set_embedding(small); }), {"(169, 32)"}));
  CHECK(mentions(error_of([&] { static_cast<void>(s.decode({}, box{}, small)); }),
                 {"mask prompt", "52"}));
  const std::vector<point> many(session::max_points + 1);
  CHECK(mentions(error_of([&] { static_cast<void>(s.decode(many)); }), {"65", "64"}));
}

}  // namespace microtome::tests
