// Each kernel at the shapes that LiteMedSAM uses, on one thread. Prints GFLOP/s and the share of
// the FMA peak, which is measured in the same process; bandwidth-bound kernels print bytes per
// second.
#include <chrono>
#include <random>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include <kernels/table.hpp>
#include <microtome/tensor.hpp>

namespace {

using namespace microtome;

const kernels::table& kernel = kernels::active();

/// FLOP/s of one thread's FMA units.
double peak() {
  static const double measured = [] {
    double best = 0;
    for (int attempt = 0; attempt < 5; ++attempt) {
      const auto start = std::chrono::steady_clock::now();
      const double flops = kernel.fma_peak(2'000'000);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      best = std::max(best, flops / took.count());
    }
    return best;
  }();
  return measured;
}

tensor<float> values(shape extents) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  tensor<float> out(extents);
  for (float& v : out) v = normal(generator);
  return out;
}

template <class T>
std::vector<T*> rows_of(T* first, index_t rows, index_t stride) {
  std::vector<T*> pointers;
  for (index_t i = 0; i < rows; ++i) pointers.push_back(first + i * stride);
  return pointers;
}

/// Runs f once per iteration and reports its FLOP/s and their share of the peak.
template <class Function>
void measure(benchmark::State& state, double flops, Function&& f) {
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) f();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  const double rate = flops * static_cast<double>(state.iterations()) / took.count();
  state.counters["GFLOP/s"] = rate / 1e9;
  state.counters["peak_%"] = 100 * rate / peak();
}

/// m rows of a linear layer, k to n channels.
void gemm(benchmark::State& state, index_t m, index_t n, index_t k, index_t taps,
          kernels::activation act) {
  const tensor<float> a = values({m, k}), b = values({taps * k, n}), bias = values({n});
  tensor<float> packed(shape{kernel.packed_size(taps * k, n)}), c(shape{m, n});
  kernel.pack_b(taps * k, n, b.data(), n, 1, packed.data());
  std::vector<const float*> a_rows;
  for (index_t t = 0; t < taps; ++t)
    for (index_t i = 0; i < m; ++i) a_rows.push_back(a.row((i + t) % m));
  const auto c_rows = rows_of(c.data(), m, n);
  const double flops = 2.0 * static_cast<double>(m * n * k * taps);
  measure(state, flops, [&] {
    kernel.gemm({.m = m,
                 .n = n,
                 .k = k,
                 .taps = taps,
                 .a = a_rows.data(),
                 .b = packed.data(),
                 .c = c_rows.data(),
                 .bias = bias.data(),
                 .act = act});
  });
}

/// One head of one window: n_q queries, n_k keys.
void attention(benchmark::State& state, index_t n_q, index_t n_k, index_t d) {
  const index_t columns = kernel.attention_columns(n_k);
  const tensor<float> q = values({n_q, 3 * d}), k = values({n_k, 3 * d}), v = values({n_k, 3 * d});
  const tensor<float> bias = values({n_q, columns});
  tensor<float> out(shape{n_q, d}), scratch(shape{kernel.attention_scratch(n_k, d, d)});
  const auto q_rows = rows_of(q.data(), n_q, 3 * d), k_rows = rows_of(k.data(), n_k, 3 * d),
             v_rows = rows_of(v.data(), n_k, 3 * d);
  const auto out_rows = rows_of(out.data(), n_q, d);
  measure(state, 4.0 * static_cast<double>(n_q * n_k * d), [&] {
    kernel.attention({.n_q = n_q,
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

/// One row of `width` output pixels.
void depthwise(benchmark::State& state, index_t width, index_t channels, index_t stride) {
  const index_t n_in = width * stride;
  const tensor<float> x = values({3, n_in * channels}), w = values({9, channels});
  const tensor<float> bias = values({channels});
  tensor<float> out(shape{width, channels});
  measure(state, 18.0 * static_cast<double>(width * channels), [&] {
    kernel.depthwise3x3({.rows = {x.row(0), x.row(1), x.row(2)},
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
  for (auto _ : state)
    kernel.layer_norm({.n = n,
                       .c = c,
                       .x = in.data(),
                       .out = to.data(),
                       .gamma = gamma.data(),
                       .beta = beta.data(),
                       .epsilon = 1e-5f});
  state.SetBytesProcessed(state.iterations() * n * c * 8);
}

void gelu(benchmark::State& state, index_t n) {
  const tensor<float> x = values({n});
  tensor<float> out(x.extents());
  for (auto _ : state) kernel.activate(kernels::activation::gelu, n, x.data(), out.data());
  state.SetBytesProcessed(state.iterations() * n * 8);
}

void softmax(benchmark::State& state, index_t n) {
  tensor<float> x = values({n});
  for (auto _ : state) kernel.softmax(n, x.data());
  state.SetBytesProcessed(state.iterations() * n * 8);
}

void register_all() {
  using kernels::activation;
  const auto add_gemm = [](const char* layer, index_t m, index_t n, index_t k, index_t taps = 1,
                           activation act = activation::none) {
    const std::string name = std::string("gemm/") + layer + "/" + std::to_string(m) + "x" +
                             std::to_string(n) + "x" + std::to_string(taps * k);
    benchmark::RegisterBenchmark(name.c_str(), gemm, m, n, k, taps, act);
  };
  add_gemm("layers.0.conv1", 96, 256, 64, 1, activation::gelu);
  add_gemm("layers.0.conv3", 96, 64, 256);
  add_gemm("layers.1.qkv", 96, 384, 128);
  add_gemm("layers.1.proj", 96, 128, 128);
  add_gemm("layers.1.fc1", 96, 512, 128, 1, activation::gelu);
  add_gemm("layers.1.fc2", 96, 128, 512);
  add_gemm("layers.2.qkv", 96, 480, 160);
  add_gemm("layers.2.proj", 96, 160, 160);
  add_gemm("layers.2.fc1", 96, 640, 160, 1, activation::gelu);
  add_gemm("layers.2.fc2", 96, 160, 640);
  add_gemm("layers.3.qkv", 96, 960, 320);
  add_gemm("layers.3.proj", 96, 320, 320);
  add_gemm("layers.3.fc1", 48, 1280, 320, 1, activation::gelu);
  add_gemm("layers.3.fc2", 48, 320, 1280);
  add_gemm("neck.0", 96, 256, 320);
  add_gemm("neck.2", 96, 256, 256, 9);
  for (const auto& [n_q, n_k] : {std::pair<index_t, index_t>{49, 49},
                                 {14, 15},
                                 {196, 196},
                                 {112, 113},
                                 {64, 65},
                                 {7, 4096}}) {
    const index_t d = n_k == 4096 ? 16 : 32;
    const std::string name = "attention/" + std::to_string(n_q) + "x" + std::to_string(n_k);
    benchmark::RegisterBenchmark(name.c_str(), attention, n_q, n_k, d);
  }
  const auto add_depthwise = [](index_t width, index_t channels, index_t stride) {
    const std::string name = "depthwise3x3/" + std::to_string(width) + "x" +
                             std::to_string(channels) + "/stride:" + std::to_string(stride);
    benchmark::RegisterBenchmark(name.c_str(), depthwise, width, channels, stride);
  };
  add_depthwise(64, 256, 1);
  add_depthwise(32, 128, 2);
  add_depthwise(128, 128, 1);
  add_depthwise(64, 160, 1);
  add_depthwise(64, 320, 1);
  for (const index_t c : {128, 160, 256, 320}) {
    const std::string name = "layer_norm/96x" + std::to_string(c);
    benchmark::RegisterBenchmark(name.c_str(), layer_norm, 96, c);
  }
  benchmark::RegisterBenchmark("gelu/16384", gelu, 16384);
  benchmark::RegisterBenchmark("softmax/49", softmax, 49);
  benchmark::RegisterBenchmark("softmax/196", softmax, 196);
}

}  // namespace

int main(int argc, char** argv) {
  register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("target", kernel.description);
  benchmark::AddCustomContext("FMA peak, GFLOP/s", std::to_string(peak() / 1e9));
  benchmark::RunSpecifiedBenchmarks();
}
