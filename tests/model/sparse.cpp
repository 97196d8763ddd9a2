// The tiny model with pruned weights: with and without their zeros, in every precision, compressed
// in a file or not.
#include <microtome/model_file/safetensors_writer.hpp>
#include <microtome/quantization/quantize.hpp>

#include "../kernels/fma.hpp"
#include "golden_support.hpp"

namespace microtome::tests {

namespace {

/// Zeroes the smallest weights of every layer.
struct pruner : layer_hook {
  explicit pruner(double share) : amount(share) {}
  void load(layer_weight& layer) override {
    std::vector<float> sizes;
    for (const float w : layer.values) sizes.push_back(std::abs(w));
    const auto cut = static_cast<index_t>(amount * static_cast<double>(sizes.size()));
    std::sort(sizes.begin(), sizes.end());
    for (float& w : layer.values)
      if (cut > 0 && std::abs(w) <= sizes[static_cast<std::size_t>(cut - 1)]) w = 0;
  }
  double amount;
};

/// The tiny model pruned, its weights as they are or compressed, in memory.
std::vector<std::byte> pruned_file(double amount, bool compressed) {
  const safetensors file(tiny_path());
  struct : pruner {
    using pruner::pruner;
    void load(layer_weight& layer) override {
      pruner::load(layer);
      found[layer.name + ".weight"] = layer.values;
    }
    std::map<std::string, tensor<float>> found;
  } layers{amount};
  static_cast<void>(sam(file, {.hook = &layers}));
  safetensors_writer out;
  for (const auto& [key, text] : file.metadata()) out.metadata(key, text);
  for (const auto& [name, entry] : file.tensors()) {
    const auto layer = layers.found.find(name);
    if (layer == layers.found.end()) {
      out.add(name, entry.dtype, entry.extents, file.stored(entry));
      continue;
    }
    const tensor<float>& w = layer->second;
    const auto bytes = std::as_bytes(std::span(w.begin(), w.end()));
    compressed ? out.add_weight(name, "F32", w.extents(), bytes)
               : out.add(name, "F32", w.extents(), bytes);
  }
  return out.bytes();
}

}  // namespace

TEST_CASE("pruned models give the same bits with and without their zeros") {
  for (const double amount : {0.0, 0.3, 0.8, 1.0})
    for (const precision inputs : {precision::fp32, precision::bf16}) {
      CAPTURE(amount);
      CAPTURE(name_of(inputs));
      pruner pruned(amount);
      const auto with = [&](sparsity zeros, int threads = 2) {
        return answer_of(
            sam::load(tiny_path(),
                      {.inputs = inputs, .hook = &pruned, .zeros = zeros, .winograd = false}),
            threads);
      };
      const answer dense = with(sparsity::off);
      CHECK(with(sparsity::on) == dense);
      CHECK(with(sparsity::on, 1) == dense);
      CHECK(with(sparsity::on, 3) == dense);
      CHECK(with(sparsity::automatic) == dense);
      if (amount > 0.5) CHECK_FALSE(dense == answer_of(sam::load(tiny_path(), {.inputs = inputs})));
    }
}

TEST_CASE("pruned models in 8 bits give the same bits with and without their zeros") {
  const auto bytes = pruned_file(0.7, true);
  const safetensors file(bytes);
  activation_ranges ranges;  // any will do
  struct : layer_hook {
    void load(layer_weight& layer) override { names.push_back(layer.name); }
    std::vector<std::string> names;
  } layers;
  static_cast<void>(sam(file, {.hook = &layers}));
  for (const std::string& name : layers.names) ranges.layers[name] = {{{-3.0f, 4.0f}}, {}};
  for (const char* rules : {"full", "weights-only", "full, 1:*:*=bf16, *:*:mlp.fc1=fp32"}) {
    CAPTURE(rules);
    model_quantizer hook{scheme(rules), &ranges};
    static_cast<void>(sam(file, {.hook = &hook}));
    const temporary_file written;
    hook.write(file, written.path);
    const auto with = [&](sparsity zeros) {
      return answer_of(sam::load(written.path, {.zeros = zeros}));
    };
    const answer dense = with(sparsity::off);
    CHECK(with(sparsity::on) == dense);
    CHECK(std::filesystem::file_size(written.path) < bytes.size());
    CHECK(safetensors(written.path).compressed("image_encoder.layers.1.blocks.0.mlp.fc2.weight"));
    if (!has_fma()) {  // the simulation rounds once
      skip_without_fma();
      continue;
    }
    int8_simulation simulated;
    CHECK(answer_of(sam::load(written.path, {.hook = &simulated})) == dense);
  }
}

TEST_CASE("compressed files are smaller and load to the same model") {
  for (const double amount : {0.0, 0.5, 0.9, 1.0}) {
    CAPTURE(amount);
    const auto plain = pruned_file(amount, false), compressed = pruned_file(amount, true);
    CHECK(answer_of(sam::load(plain)) == answer_of(sam::load(compressed)));
    if (amount == 0.0)
      CHECK(compressed.size() == plain.size());
    else
      CHECK(static_cast<double>(compressed.size()) <
            static_cast<double>(plain.size()) * (1.2 - amount));
  }
}

TEST_CASE("a layer is sparse where that is faster, and says why not") {
  layer_weight layer;
  layer.values = random_tensor({160, 640}, 1);
  const auto prune = [&](index_t of_ten) {
    for (index_t i = 0; i < layer.values.size(); ++i)
      layer.values[i] = i * 7 % 10 < of_ten ? 0.0f : 1.0f;
    return layer_sparsity(layer);
  };
  CHECK_FALSE(prune(0).pays(sparsity::on));
  CHECK_FALSE(prune(1).pays(sparsity::automatic));
  CHECK(prune(1).pays(sparsity::on));
  CHECK(prune(6).pays(sparsity::automatic));
  CHECK(prune(9).pays(sparsity::automatic));
  const float of_many_rows = prune(9).relative_time;
  layer.rows = 1;  // a vector of tokens holds one
  CHECK(prune(9).relative_time > 2 * of_many_rows);
  CHECK_FALSE(prune(6).pays(sparsity::automatic));
  CHECK(prune(6).pays(sparsity::on));
  layer.rows = 96;
  CHECK_FALSE(prune(9).pays(sparsity::off));
  CHECK(prune(9).zeros == layer.values.size() * 9 / 10);
  layer.inputs = precision::int8;
  CHECK(prune(9).pays(sparsity::on));
  for (float& w : layer.values) w *= 127;  // 64 of them in a column are too few to pass 2^24
  CHECK(layer_sparsity(layer).pays(sparsity::on));
  layer.values = tensor<float>(shape{4, 1200});
  for (index_t i = 1; i < layer.values.size(); ++i) layer.values[i] = 127;
  REQUIRE(layer_sparsity(layer).why != nullptr);
  CHECK_FALSE(layer_sparsity(layer).pays(sparsity::on));
  layer.depthwise = true;
  layer.values = random_tensor({8, 1, 3, 3}, 1);
  layer.values[3] = 0;
  CHECK_FALSE(layer_sparsity(layer).pays(sparsity::on));
}

}  // namespace microtome::tests
