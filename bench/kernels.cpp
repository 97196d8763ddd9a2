// Each kernel at the shapes that LiteMedSAM uses, alone: GFLOP/s, GB/s, and their shares of the FMA
// peak and of the roofline, both measured in the same process with as many threads. "/threads:N"
// runs N copies side by side, each on data of its own. FLOPs of element-wise kernels are those of
// their formulas, about: 8 per element for LayerNorm, 20 for softmax, 25 for GELU.
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include <microtome/imaging/resize.hpp>
#include <microtome/model_file/safetensors_writer.hpp>
#include <microtome/ops/inverted_bottleneck.hpp>

#include "peers.hpp"
#include "shapes.hpp"

namespace microtome::bench {

namespace {

using kernels::activation;
using kernels::precision;

void gemm(benchmark::State& state, const gemm_shape& s, precision inputs) {
  const kernels::matrix_kernels& matrix = kernel.matrix(inputs);
  const operands product(s, values({s.taps * s.k, s.n}));
  const tensor<std::byte> packed = product.packed(matrix);
  const kernels::gemm_args args = product.with(packed);
  measure(state, product.todo(packed, inputs), [&] { matrix.gemm(args); });
}

/// One head of one window: n_q queries, n_k keys.
void attention(benchmark::State& state, index_t n_q, index_t n_k, index_t d, precision inputs) {
  const kernels::matrix_kernels& matrix = kernel.matrix(inputs);
  const index_t columns = kernel.attention_columns(n_k);
  const tensor<float> q = values({n_q, 3 * d}), k = values({n_k, 3 * d}), v = values({n_k, 3 * d});
  const tensor<float> bias = values({n_q, columns});
  tensor<float> out(shape{n_q, d}), scratch(shape{matrix.attention_scratch(n_k, d, d)});
  const auto q_rows = rows_of(q.data(), n_q, 3 * d), k_rows = rows_of(k.data(), n_k, 3 * d);
  const auto v_rows = rows_of(v.data(), n_k, 3 * d);
  const auto out_rows = rows_of(out.data(), n_q, d);
  const work todo{4.0 * static_cast<double>(n_q * n_k * d),
                  floats(2 * n_q * d + 2 * n_k * d + n_q * n_k)};
  measure(state, todo, [&] {
    matrix.attention({.n_q = n_q,
                      .n_k = n_k,
                      .d_k = d,
                      .d_v = d,
                      .q = q_rows.data(),
                      .k = k_rows.data(),
                      .v = v_rows.data(),
                      .out = out_rows.data(),
                      .scale = 0.2f,
                      .bias = bias.data(),
                      .bias_stride = columns,
                      .scratch = scratch.data()});
  });
}

/// One output row; three rows of input stay in the cache.
void depthwise(benchmark::State& state, index_t width, index_t channels, index_t stride) {
  const index_t n_in = width * stride;
  const tensor<float> x = values({3, n_in * channels}), w = values({9, channels});
  const tensor<float> bias = values({channels});
  tensor<float> out(shape{width, channels});
  const work todo{18.0 * static_cast<double>(width * channels),
                  floats((3 * n_in + width + 10) * channels)};
  measure(state, todo, [&] {
    kernel.depthwise({.rows = {x.row(0), x.row(1), x.row(2)},
                      .n_in = n_in,
                      .n_out = width,
                      .first = 0,
                      .stride = stride,
                      .channels = channels,
                      .weights = w.data(),
                      .bias = bias.data(),
                      .out = out.data()});
  });
}

void layer_norm(benchmark::State& state, index_t n, index_t c) {
  const tensor<float> x = values({n, c}), gamma = values({c}), beta = values({c});
  tensor<float> out(x.extents());
  const auto in = rows_of(x.data(), n, c);
  const auto to = rows_of(out.data(), n, c);
  const auto elements = static_cast<double>(n * c);
  measure(state, {8.0 * elements, floats(2 * n * c)}, [&] {
    kernel.layer_norm({.n = n,
                       .c = c,
                       .x = in.data(),
                       .out = to.data(),
                       .gamma = gamma.data(),
                       .beta = beta.data(),
                       .epsilon = 1e-5f});
  });
}

void gelu(benchmark::State& state, index_t n) {
  const tensor<float> x = values({n});
  tensor<float> out(x.extents());
  measure(state, {25.0 * static_cast<double>(n), floats(2 * n)},
          [&] { kernel.activate(activation::gelu, n, x.data(), out.data()); });
}

void softmax(benchmark::State& state, index_t n) {
  tensor<float> x = values({n});
  measure(state, {20.0 * static_cast<double>(n), floats(2 * n)},
          [&] { kernel.softmax(n, x.data()); });
}

void softmax_columns(benchmark::State& state, index_t count, index_t rows, index_t columns) {
  tensor<float> x = values({count * rows * columns});
  measure(state, {20.0 * static_cast<double>(x.size()), floats(2 * x.size())},
          [&] { kernel.softmax_columns(count, rows, columns, x.data()); });
}

/// MBConv or patch merging, fused by rows, over a map of side x side: what no kernel does alone.
void inverted_bottleneck(benchmark::State& state, index_t side, index_t in, index_t hidden,
                         index_t out, index_t stride) {
  safetensors_writer file;
  const auto add = [&](const std::string& layer, shape weight) {
    tensor<float> w = values(weight);
    for (float& v : w) v *= 0.05f;
    file.add(layer + ".weight", w);
    file.add(layer + ".bias", values({weight[0]}));
  };
  add("b.conv1.c", {hidden, in, 1, 1});
  add("b.conv2.c", {hidden, 1, 3, 3});
  add("b.conv3.c", {out, hidden, 1, 1});
  const std::vector<std::byte> bytes = file.bytes();
  const safetensors read(bytes);
  const map_size size{side, side};
  const microtome::inverted_bottleneck block(read, "b", in, hidden, out, stride, stride == 1);
  workspace ws(1, 0, block.scratch_bytes(size));
  const tensor<float> x = values({size.tokens(), in});
  tensor<float> result(shape{size.strided(stride).tokens(), out});
  const auto pixels = static_cast<double>(size.tokens());
  const auto kept = static_cast<double>(size.strided(stride).tokens());
  measure(state,
          {2 * static_cast<double>(hidden) *
               (pixels * static_cast<double>(in) + kept * static_cast<double>(9 + out)),
           floats(x.size() + result.size())},
          [&] { block(ws, size, x, result); });
}

/// An image of bytes, grey or in colours, to the model's input.
void resize_image(benchmark::State& state, index_t height, index_t width, index_t channels) {
  tensor<std::uint8_t> image(shape{height, width, channels});
  for (index_t i = 0; i < image.size(); ++i) image[i] = static_cast<std::uint8_t>(i * 7);
  const index_t longest = std::max(height, width);
  const auto bytes = static_cast<double>(image.size());
  measure(state, {2 * bytes, bytes}, [&] {
    benchmark::DoNotOptimize(resize_area(image, height * 256 / longest, width * 256 / longest));
  });
}

/// Logits of 256 x 256 to a mask of the image's size.
void resize_mask(benchmark::State& state, index_t height, index_t width) {
  const tensor<float> logits = values({256, 256});
  tensor<std::uint8_t> mask(shape{height, width});
  const auto pixels = static_cast<double>(mask.size());
  measure(state, {6 * pixels, pixels + floats(logits.size())}, [&] {
    resize_bilinear(logits, 256, 256, height, width, 0, height,
                    [&](index_t y, index_t x, float v) { mask[y * width + x] = v > 0; });
  });
}

void register_all() {
  for (const auto& [inputs, suffix] :
       {std::pair{precision::fp32, ""}, std::pair{precision::bf16, "_bf16"},
        std::pair{precision::int8, "_int8"}, std::pair{precision::int8_weights, "_int8_weights"}}) {
    for (const gemm_shape& s : gemm_shapes) {
      const std::string size = std::string("/") + s.layer + "/" + size_name(s);
      add(std::string("gemm") + suffix + size, gemm, s, inputs);
      if (inputs == precision::fp32 && s.act == activation::none && s.taps == 1)
        for (const gemm_peer& peer : gemm_peers())
          add(std::string("gemm_") + peer.name + size,
              [&peer, s](benchmark::State& state) { run_peer(state, peer, s.m, s.n, s.k); });
    }
    if (inputs == precision::int8 || inputs == precision::int8_weights) continue;
    for (const auto& [n_q, n_k, d] : {std::array<index_t, 3>{49, 49, 32},
                                      {14, 15, 32},
                                      {4, 5, 32},
                                      {196, 196, 32},
                                      {112, 113, 32},
                                      {64, 65, 32},
                                      {7, 7, 32},
                                      {28, 4096, 16},
                                      {56, 128, 256}})
      add(std::string("attention") + suffix + "/" + std::to_string(n_q) + "x" +
              std::to_string(n_k) + "x" + std::to_string(d),
          attention, n_q, n_k, d, inputs);
  }
  for (const auto& [width, channels, stride] : {std::array<index_t, 3>{64, 256, 1},
                                                {32, 128, 2},
                                                {128, 128, 1},
                                                {25, 160, 2},
                                                {64, 160, 1},
                                                {51, 320, 1},
                                                {64, 320, 1}})
    add("depthwise3x3/" + std::to_string(width) + "x" + std::to_string(channels) +
            "/stride:" + std::to_string(stride),
        depthwise, width, channels, stride);
  add("mbconv/256x256x64x256", inverted_bottleneck, index_t{256}, index_t{64}, index_t{256},
      index_t{64}, index_t{1});
  add("merging/256x256x64x128", inverted_bottleneck, index_t{256}, index_t{64}, index_t{128},
      index_t{128}, index_t{2});
  add("resize_image/2604x1726x3", resize_image, index_t{2604}, index_t{1726}, index_t{3});
  add("resize_image/512x512x1", resize_image, index_t{512}, index_t{512}, index_t{1});
  add("resize_mask/2604x1726", resize_mask, index_t{2604}, index_t{1726});
  add("resize_mask/512x512", resize_mask, index_t{512}, index_t{512});
  for (const index_t c : {64, 128, 160, 256, 320})
    add("layer_norm/96x" + std::to_string(c), layer_norm, index_t{96}, c);
  add("gelu/1536", gelu, index_t{1536});
  add("softmax/49", softmax, index_t{49});
  add("softmax/196", softmax, index_t{196});
  add("softmax_columns/96x7x8", softmax_columns, index_t{96}, index_t{7}, index_t{8});
}

}  // namespace

}  // namespace microtome::bench

int main(int argc, char** argv) {
  using namespace microtome::bench;
  register_all();
  register_sparse();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("target", kernel.description);
  for (const int threads : {1, static_cast<int>(std::thread::hardware_concurrency())}) {
    const std::string with = ", " + std::to_string(threads) + " threads";
    benchmark::AddCustomContext("FMA peak, GFLOP/s" + with, std::to_string(peak(threads) / 1e9));
    benchmark::AddCustomContext("int8 peak, GOP/s" + with,
                                std::to_string(peak(threads, precision::int8) / 1e9));
    benchmark::AddCustomContext("bandwidth, GB/s" + with, std::to_string(bandwidth(threads) / 1e9));
  }
  benchmark::RunSpecifiedBenchmarks();
}
