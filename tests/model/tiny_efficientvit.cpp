// EfficientViT-SAM on a small configuration, against PyTorch, in all precisions.
#include <microtome/quantization/quantize.hpp>

#include "../kernels/fma.hpp"
#include "golden_support.hpp"

namespace microtome::tests {

namespace {

const std::filesystem::path& efficientvit_path() {
  static const std::filesystem::path path = data_file("tiny_efficientvit.safetensors");
  return path;
}

struct golden_efficientvit {
  array_file file{data_file("tiny_efficientvit_golden.npz")};
  tensor<float> image = channels_last(read_floats(file, "image"));

  std::vector<box> boxes() const {
    const tensor<float> rows = read_floats(file, "box_prompts");
    std::vector<box> all;
    for (index_t i = 0; i < rows.extent(0); ++i)
      all.push_back({rows.row(i)[0], rows.row(i)[1], rows.row(i)[2], rows.row(i)[3]});
    return all;
  }
};

answer say(const sam& model, int threads = 2) {
  const golden_efficientvit golden;
  session s(model, {.threads = threads});
  s.encode(golden.image);
  return {copy_of(s.embedding()), copy_of(s.decode(golden.boxes()).low_res_masks)};
}

activation_ranges calibrate_efficientvit(observer_kind kind) {
  const safetensors file(efficientvit_path());
  calibrator watching;
  const sam model(file, {.hook = &watching});
  session s(model, {.threads = 2});
  const golden_efficientvit golden;
  const auto see = [&] {
    s.encode(golden.image);
    static_cast<void>(s.decode(golden.boxes()));
  };
  see();
  watching.end_case();
  watching.begin_histograms();
  see();
  return watching.ranges(kind, file.fingerprint());
}

}  // namespace

TEST_CASE("EfficientViT-SAM equals PyTorch's, with plain sums and by Winograd's algorithm") {
  const golden_efficientvit golden;
  for (const bool winograd : {false, true}) {
    CAPTURE(winograd);
    const sam model = sam::load(efficientvit_path(), {.winograd = winograd});
    CHECK(model.encoder.kind() == "efficientvit");
    session s(model, {.threads = 2});
    memory_tracer trace;
    s.set_tracer(&trace);
    s.encode(golden.image);
    int compared = 0;
    for (const std::string& name : golden.file.names()) {
      if (!name.starts_with("module.") || name == "module.image_encoder.neck") continue;
      std::string path = name.substr(7);
      // A stage is its last block.
      const std::size_t last = path.rfind('.');
      if (path.ends_with("stages.3")) path += ".op_list.2";
      if (path.find("op_list") == path.npos && last != path.npos) path += ".op_list.1";
      CAPTURE(path);
      REQUIRE(trace.records.contains(path));
      const tensor<float> expected = channels_last(read_floats(golden.file, name));
      CHECK(max_error(trace.records.at(path), expected) / deviation(expected) < 2e-5);
      ++compared;
    }
    CHECK(compared == 6);
    const tensor<float> neck = channels_last(read_floats(golden.file, "module.image_encoder.neck"));
    CHECK(max_error(trace.records.at("image_encoder.neck.output_ops.0"), neck) / deviation(neck) <
          2e-5);
    s.set_tracer(nullptr);
    CHECK(max_error(s.embedding(), channels_last(read_floats(golden.file, "image_embedding"))) <
          2e-5);
    CHECK(max_error(model.prompts.dense_position(),
                    channels_last(read_floats(golden.file, "dense_position"))) < 2e-6);
    const auto check = [&](const std::string& name, const decoded_masks& got) {
      CAPTURE(name);
      const tensor<float> masks = read_floats(golden.file, name + ".low_res_masks");
      CHECK(max_error(got.low_res_masks, masks) / std::max(deviation(masks), 1.0) < 5e-5);
      CHECK(max_error(got.iou_predictions, read_floats(golden.file, name + ".iou_predictions")) <
            5e-5);
    };
    check("boxes", s.decode(golden.boxes()));
    check("multimask", s.decode({}, golden.boxes()[0]));
  }
}

TEST_CASE("EfficientViT-SAM gives the same bits for every number of threads") {
  const sam model = sam::load(efficientvit_path());
  const answer one = say(model, 1);
  for (const int threads : {2, 3, 7}) CHECK(say(model, threads) == one);
}

TEST_CASE("EfficientViT-SAM in bf16, int8, without zeros") {
  const answer exact = say(sam::load(efficientvit_path()));
  const auto error = [&](const answer& got) {
    return max_error(got.embedding, exact.embedding) / deviation(exact.embedding);
  };
  const double rounded = error(say(sam::load(efficientvit_path(), {.inputs = precision::bf16})));
  CHECK(rounded < 0.1);
  CHECK(rounded > 1e-4);

  const activation_ranges ranges = calibrate_efficientvit(observer_kind::min_max);
  const safetensors file(efficientvit_path());
  for (const char* rules : {"full", "mix-dwsc", "mix-mbc-neck", "recommended", "weights-only"}) {
    CAPTURE(rules);
    const temporary_file written;
    model_quantizer hook{scheme(rules), &ranges};
    const answer direct = say(sam(file, {.hook = &hook}));
    hook.write(file, written.path);
    CHECK(say(sam::load(written.path)) == direct);
    CHECK(say(sam::load(written.path), 3) == direct);
    CHECK(error(direct) < 0.3);
    CHECK(error(direct) > 1e-3);
    if (!has_fma()) continue;
    int8_simulation simulated;
    CHECK(say(sam::load(written.path, {.hook = &simulated})) == direct);
    if (rules != std::string_view("full")) continue;
    CHECK(hash_of(direct.embedding) == 13038298473898531057u);
    CHECK(hash_of(direct.masks) == 6738506201266973029u);
  }
}

}  // namespace microtome::tests
