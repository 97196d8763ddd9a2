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

#include <kernels/table.hpp>
#include <microtome/tensor.hpp>

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

/// FLOP/s of the FMA units.
inline double peak(int threads) {
  static std::map<int, double> known;
  auto& rate = known[threads];
  if (rate == 0) rate = best_rate(threads, [](int) { return kernel.fma_peak(4'000'000); });
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

/// Runs f once per iteration and reports its rate, of all threads together, and its share of a
/// roof.
template <class Function>
void measure(benchmark::State& state, double units, const char* rate_name, const char* share_name,
             double (*roof)(int), Function&& f) {
  for (auto _ : state) f();
  const double total = units * static_cast<double>(state.iterations());
  state.counters[rate_name] = benchmark::Counter(total / 1e9, benchmark::Counter::kIsRate);
  state.counters[share_name] =
      benchmark::Counter(100 * total / roof(state.threads()), benchmark::Counter::kIsRate);
}

template <class Function>
void measure_flops(benchmark::State& state, double flops, Function&& f) {
  measure(state, flops, "GFLOP/s", "peak_%", peak, f);
}

template <class Function>
void measure_bytes(benchmark::State& state, double bytes, Function&& f) {
  measure(state, bytes, "GB/s", "stream_%", bandwidth, f);
}

}  // namespace microtome::bench
