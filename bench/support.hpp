/// What the kernel benchmarks share: numbers to work on, the roofs that results are divided by, and
/// counters.
#pragma once

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include <benchmark/benchmark.h>

#include <kernels/active.hpp>
#include <microtome/core/tensor.hpp>

namespace microtome::bench {

inline const kernels::table& kernel = kernels::active();

inline tensor<float> values(shape extents) {
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

/// The best rate of a few tries, in units per second, of f (which returns the units it did) on that
/// many threads.
template <class Function>
double best_rate(int threads, Function&& f) {
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::vector<double> done(static_cast<std::size_t>(threads));
    const auto start = std::chrono::steady_clock::now();
    {
      std::vector<std::jthread> others;
      for (int t = 1; t < threads; ++t)
        others.emplace_back([&, t] { done[static_cast<std::size_t>(t)] = f(t); });
      done[0] = f(0);
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    double total = 0;
    for (const double d : done) total += d;
    best = std::max(best, total / took.count());
  }
  return best;
}

/// Operations per second of the FMA units, or of the instructions of int8 products.
inline double peak(int threads, kernels::precision factors = kernels::precision::fp32) {
  static std::map<std::pair<int, bool>, double> known;
  const bool whole = factors == kernels::precision::int8;
  auto& rate = known[{threads, whole}];
  if (rate == 0)
    rate = best_rate(threads, [&](int) {
      return whole ? kernel.int8_peak(2'000'000) : kernel.fma_peak(4'000'000);
    });
  return rate;
}

/// Bytes per second that stream through memory: c = a + b over arrays beyond any cache (McCalpin's
/// STREAM counts the same way).
inline double bandwidth(int threads) {
  static std::map<int, double> known;
  auto& rate = known[threads];
  if (rate != 0) return rate;
  constexpr index_t n = 1 << 24;
  const auto count = static_cast<std::size_t>(threads);
  std::vector<tensor<float>> a(count), b(count), c(count);
  for (std::size_t t = 0; t < count; ++t)
    for (tensor<float>* x : {&a[t], &b[t], &c[t]}) *x = tensor<float>(shape{n});
  return rate = best_rate(threads, [&](int thread) {
           const auto t = static_cast<std::size_t>(thread);
           kernel.add(n, a[t].data(), b[t].data(), c[t].data());
           return 12.0 * n;
         });
}

/// What a kernel has to do: operations, and bytes that it must read and write at least once.
struct work {
  double flops, bytes;
  kernels::precision factors = kernels::precision::fp32;
};

/// Runs f once per iteration and reports the rates of all threads together, the share of the peak,
/// and that of the roof (Williams, Waterman and Patterson, Roofline, 2009): the lower of the peak
/// and of the bandwidth of memory times the FLOPs per byte. Data in a cache may exceed it.
template <class Function>
void measure(benchmark::State& state, work w, Function&& f) {
  for (auto _ : state) f();
  const double runs = static_cast<double>(state.iterations());
  const double most = peak(state.threads(), w.factors);
  const double roof = std::min(most, bandwidth(state.threads()) * w.flops / w.bytes);
  const auto rate = [&](double value) {
    return benchmark::Counter(runs * value, benchmark::Counter::kIsRate);
  };
  state.counters["GFLOP/s"] = rate(w.flops / 1e9);
  state.counters["GB/s"] = rate(w.bytes / 1e9);
  state.counters["peak_%"] = rate(100 * w.flops / most);
  state.counters["roof_%"] = rate(100 * w.flops / roof);
}

/// Bytes of n floats.
inline double floats(index_t n) {
  return static_cast<double>(n) * sizeof(float);
}

}  // namespace microtome::bench
