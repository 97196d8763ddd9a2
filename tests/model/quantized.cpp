// The tiny model in 8 bits: calibrated, quantised, written, loaded, simulated.
#include <microtome/quantization/quantize.hpp>

#include "../kernels/fma.hpp"
#include "golden_support.hpp"

namespace microtome::tests {

namespace {

/// What is seen of the golden image, twice as bright in the second case.
activation_ranges calibrate(observer_kind kind, int threads = 2) {
  const safetensors file(tiny_path());
  calibrator watching;
  const sam model(file, {.hook = &watching});
  session s(model, {.threads = threads});
  const box boxes[] = {{3, 4, 40, 30}, {1, 1, 20, 50}};
  const auto see = [&](float brightness) {
    tensor<float> image = golden_image();
    for (float& v : image) v = std::min(1.0f, v * brightness);
    s.encode(image);
    static_cast<void>(s.decode(boxes));
  };
  for (const float brightness : {1.0f, 2.0f}) {
    see(brightness);
    watching.end_case();
  }
  watching.begin_histograms();
  for (const float brightness : {1.0f, 2.0f}) see(brightness);
  return watching.ranges(kind, file.fingerprint());
}

sam quantized(const std::string& rules, const activation_ranges& ranges,
              const std::filesystem::path& written = {}) {
  const safetensors file(tiny_path());
  model_quantizer hook{scheme(rules), &ranges};
  sam model(file, {.hook = &hook});
  if (!written.empty()) hook.write(file, written);
  return model;
}

}  // namespace

TEST_CASE("a quantised file gives what quantising at load gives, and what its simulation gives") {
  const activation_ranges ranges = calibrate(observer_kind::mse);
  for (const char* rules :
       {"full", "mix-dwsc", "encoder", "weights-only",
        "full, 1:*:*=bf16, *:*:mlp.fc1|conv3=fp32, !1|2:*:*proj|conv1=int8-weights"}) {
    CAPTURE(rules);
    const temporary_file written;
    const answer direct = answer_of(quantized(rules, ranges, written.path));
    CHECK(answer_of(sam::load(written.path)) == direct);
    CHECK(answer_of(sam::load(written.path), 1) == direct);
    CHECK(answer_of(sam::load(written.path), 3) == direct);
    if (!has_fma()) {  // the simulation rounds once
      skip_without_fma();
      continue;
    }
    int8_simulation simulated;
    CHECK(answer_of(sam::load(written.path, {.hook = &simulated})) == direct);
  }
}

TEST_CASE("8 bits stay near fp32, and are not fp32") {
  const answer exact = answer_of(sam::load(tiny_path()));
  const activation_ranges ranges = calibrate(observer_kind::mse);
  const auto error = [&](const char* rules) {
    return max_error(answer_of(quantized(rules, ranges)).embedding, exact.embedding) /
           deviation(exact.embedding);
  };
  const double full = error("full"), weights_only = error("weights-only");
  CHECK(full < 0.15);
  CHECK(full > 1e-3);
  CHECK(weights_only < 0.2);
  CHECK(weights_only > 1e-4);
  CHECK(error("fp32") == 0);
}

TEST_CASE("int8 gives the same bits on every target with fused multiply-adds") {
  if (!has_fma()) {
    skip_without_fma();
    return;
  }
  const answer found = answer_of(quantized("full", calibrate(observer_kind::min_max)));
  CHECK(hash_of(found.embedding) == 14569155875002078093u);
  CHECK(hash_of(found.masks) == 2512164997125401146u);
}

TEST_CASE("calibration does not depend on threads, and observers nest") {
  for (const observer_kind kind :
       {observer_kind::min_max, observer_kind::average, observer_kind::percentile,
        observer_kind::mse, observer_kind::entropy}) {
    const activation_ranges one = calibrate(kind, 1), three = calibrate(kind, 3);
    const activation_ranges widest = calibrate(observer_kind::min_max);
    REQUIRE(one.layers.size() == three.layers.size());
    CHECK(one.layers.size() > 40);
    for (const auto& [name, found] : one.layers) {
      const std::vector<value_range>& ranges = found.ranges;
      const std::string layer = name;
      CAPTURE(layer);
      const bool depthwise = name.ends_with("local_conv.c") || name.ends_with("conv2.c");
      CHECK((ranges.size() > 1) == depthwise);
      REQUIRE(ranges.size() == three.layers.at(layer).ranges.size());
      CHECK(found.factor == three.layers.at(layer).factor);
      for (std::size_t i = 0; i < ranges.size(); ++i) {
        const value_range range = ranges[i], other = three.layers.at(layer).ranges[i];
        const value_range all = widest.layers.at(layer).ranges[i];
        CHECK(range.low == other.low);
        CHECK(range.high == other.high);
        CHECK(range.low >= all.low - 1e-3f * (all.high - all.low));
        CHECK(range.high <= all.high + 1e-3f * (all.high - all.low));
      }
    }
  }
}

TEST_CASE("the mse observer finds a range with less error than all there is") {
  value_histogram h;
  h.range = {-1.0f, 100.0f};
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, 0.5f);
  for (int i = 0; i < 100000; ++i) h.add(std::clamp(normal(generator), -1.0f, 100.0f));
  for (std::int64_t& n : h.counts) n *= 50;
  h.add(100.0f);
  const value_range found = h.least_squared_error();
  CHECK(found.high < 30.0f);
  CHECK(found.low < -0.8f);
  CHECK(h.squared_error(found) < 0.5 * h.squared_error(h.range));
  CHECK(h.percentile().high < 5.0f);
  CHECK(h.least_divergence().high < 50.0f);
}

TEST_CASE("levels hold zero exactly and reach both ends") {
  for (const value_range range :
       {value_range{-0.17f, 5.2f}, {0.0f, 7.0f}, {-3.0f, 0.0f}, {-1e-30f, 1e-30f}}) {
    const quantization q = range.levels();
    CHECK(q.zero_point >= 0);
    CHECK(q.zero_point <= 255);
    CHECK(static_cast<float>(255 - q.zero_point) * q.scale >= range.high - q.scale);
    CHECK(static_cast<float>(-q.zero_point) * q.scale <= range.low + q.scale);
  }
}

TEST_CASE("weights become whole numbers with a scale per output channel") {
  for (const int axis : {0, 1}) {
    layer_weight layer;
    layer.values = random_tensor({5, 6, 2, 2}, 3);
    layer.out_axis = axis;
    const index_t stride = axis == 0 ? 24 : 4, channels = axis == 0 ? 5 : 6;
    const tensor<float> original = layer.values;
    for (index_t i = 0; i < layer.values.size(); ++i)
      if (i / stride % channels == 2) layer.values[i] = 0;
    const tensor<float> before = layer.values;
    // Columns of the weight, by powers of two, which round nothing.
    layer.factor = tensor<float>(shape{layer.in()});
    for (index_t c = 0; c < layer.in(); ++c) layer.factor[c] = c % 2 ? 0.5f : 2.0f;
    quantize_weight(layer, precision::int8, weight_rounder());
    const tensor<float> after = layer.dequantized();
    const index_t in_stride = axis == 0 ? 4 : 24;
    for (index_t i = 0; i < before.size(); ++i) {
      const float factor = i / in_stride % layer.in() % 2 ? 0.5f : 2.0f;
      const float scale = layer.scale[i / stride % channels] / factor;
      CHECK(layer.values[i] == std::nearbyint(layer.values[i]));
      CHECK(std::abs(layer.values[i]) <= 127);
      CHECK(std::abs(after[i] - before[i]) <= 0.5001f * scale);
    }
    CHECK(std::abs(*std::max_element(layer.values.begin(), layer.values.end())) == 127);
  }
}

TEST_CASE("schemes choose by stage, block and layer") {
  const auto choose = [](const char* text, const char* path) {
    return scheme(text).choose(layer_place(path));
  };
  const char* qkv = "image_encoder.layers.2.blocks.4.attn.qkv";
  const char* conv = "image_encoder.layers.0.blocks.1.conv2.c";
  const char* merge = "image_encoder.layers.1.downsample.conv1.c";
  const char* upscale = "mask_decoder.output_upscaling.0";
  CHECK(layer_place(qkv).text() == "2:4:attn.qkv");
  CHECK(layer_place(conv).text() == "0:1:conv2");
  CHECK(layer_place(merge).text() == "1:downsample:conv1");
  CHECK(layer_place("image_encoder.neck.2").text() == "neck:-:2");
  const std::string stages = "image_encoder.backbone.stages.";
  CHECK(layer_place(stages + "0.op_list.0.conv").text() == "0:0:conv");
  CHECK(layer_place(stages + "0.op_list.1.main.conv1.conv").text() == "0:1:conv1");
  CHECK(layer_place(stages + "3.op_list.1.main.depth_conv.conv").text() == "3:1:depth_conv");
  CHECK(layer_place(stages + "4.op_list.2.context_module.main.qkv.conv").text() == "4:2:qkv");
  CHECK(layer_place(stages + "4.op_list.2.context_module.main.aggreg.0.1").text() ==
        "4:2:aggreg.0.1");
  CHECK(layer_place(stages + "4.op_list.2.local_module.main.point_conv.conv").text() ==
        "4:2:point_conv");
  CHECK(layer_place("image_encoder.neck.middle.op_list.3.main.spatial_conv.conv").text() ==
        "neck:3:spatial_conv");
  CHECK(layer_place("image_encoder.neck.input_ops.1.op_list.0.conv").text() ==
        "neck:input_ops:1.op_list.0");
  CHECK(layer_place("image_encoder.patch_embed.seq.2.c").text() == "patch_embed:-:seq.2");
  CHECK(layer_place(upscale).text() == "decoder:output_upscaling:0");
  CHECK(layer_place("mask_decoder.transformer.layers.1.mlp.lin1").text() == "decoder:1:mlp.lin1");
  CHECK(layer_place("prompt_encoder.mask_downscaling.6").text() == "prompt:mask_downscaling:6");

  CHECK(choose("full", qkv) == precision::int8);
  CHECK(choose("mix-dwsc", conv) == precision::fp32);
  CHECK(choose("mix-dwsc", merge) == precision::int8);
  CHECK(choose("mix-mbc-neck", conv) == precision::fp32);
  CHECK(choose("encoder", upscale) == precision::fp32);
  CHECK(choose("encoder", qkv) == precision::int8);
  CHECK(choose("weights-only", upscale) == precision::int8_weights);
  CHECK(choose("bf16", qkv) == precision::bf16);
  CHECK(choose("int8, 2:*:* = bf16", qkv) == precision::bf16);
  CHECK(choose("2:*:*=bf16, int8", qkv) == precision::int8);
  CHECK(choose("*:4|5:*qkv=int8", qkv) == precision::int8);
  CHECK(choose("*:!4|5:*=int8", qkv) == precision::fp32);
  CHECK(choose("*:*:a*t*n.q*v=int8", qkv) == precision::int8);
  CHECK(choose("2:4:attn=int8", qkv) == precision::fp32);
}

TEST_CASE("schemes that make no sense are named") {
  const auto message = [](const char* text) { return error_of([&] { scheme unused(text); }); };
  CHECK(mentions(message("fast"), {"fast", "mix-dwsc", "bf16"}));
  CHECK(mentions(message("full, 0:*=int8"), {"0:*=int8", "stage:block:layer"}));
  CHECK(mentions(message("0:*:*=int4"), {"int4"}));
  CHECK(mentions(message(""), {"neither"}));
  CHECK(mentions(message("0::*=int8"), {"0::*"}));
  const activation_ranges ranges = calibrate(observer_kind::min_max);
  const temporary_file file;
  CHECK(mentions(error_of([&] { quantized("full, 9:*:*=fp32", ranges, file.path); }),
                 {"9:*:*=fp32", "no layer"}));
}

TEST_CASE("layers that no case reached keep their products in fp32") {
  activation_ranges ranges = calibrate(observer_kind::min_max);
  const std::string name = "image_encoder.neck.0";
  REQUIRE(ranges.layers.erase(name) == 1);
  const safetensors file(tiny_path());
  model_quantizer hook{scheme("full"), &ranges};
  static_cast<void>(sam(file, {.hook = &hook}));
  int found = 0;
  for (const layer_weight& layer : hook.layers())
    if (layer.name == name) {
      CHECK(layer.inputs == precision::int8_weights);
      ++found;
    }
  CHECK(found == 1);
}

TEST_CASE("quantising what is quantised, and int8 without ranges, are refused") {
  const activation_ranges ranges = calibrate(observer_kind::min_max);
  const temporary_file written;
  static_cast<void>(quantized("full", ranges, written.path));
  const safetensors again(written.path);
  model_quantizer hook{scheme("full"), &ranges};
  CHECK(mentions(error_of([&] { static_cast<void>(sam(again, {.hook = &hook})); }),
                 {"8 bits already"}));
  const safetensors file(tiny_path());
  model_quantizer blind{scheme("full"), nullptr};
  CHECK(mentions(error_of([&] { static_cast<void>(sam(file, {.hook = &blind})); }),
                 {"needs ranges"}));
}

}  // namespace microtome::tests
