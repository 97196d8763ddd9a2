/// The roofs of the roofline: how many fused multiply-adds, or products of bytes, the units can do
/// when nothing is in the way.
#pragma once

#include "int8.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline double fma_peak(ptrdiff_t iterations) {
  constexpr ptrdiff_t chains = tile_rows * tile_vectors;  // as many sums as the micro-kernel keeps
  const float_tag tag;
  hn::Vec<float_tag> sums[chains];
#pragma GCC unroll 32
  for (ptrdiff_t i = 0; i < chains; ++i) sums[i] = hn::Set(tag, static_cast<float>(i));
  const auto factor = hn::Set(tag, 0.999f);
  const auto addend = hn::Set(tag, 1e-3f);
  for (ptrdiff_t n = 0; n < iterations; ++n)
#pragma GCC unroll 32
    for (ptrdiff_t i = 0; i < chains; ++i) sums[i] = mul_add(sums[i], factor, addend);
  float sink[lanes] = {};
  for (ptrdiff_t i = 0; i < chains; ++i)
    hn::StoreU(hn::Add(sums[i], hn::LoadU(tag, sink)), tag, sink);
  // The result must be used, or the loop is no work at all.
  volatile float keep = sink[0];
  static_cast<void>(keep);
  return 2.0 * static_cast<double>(chains * lanes) * static_cast<double>(iterations);
}

inline double int8_peak(ptrdiff_t iterations) {
  using inputs = int8_inputs;
  constexpr ptrdiff_t chains = 10;  // two a cycle, of five cycles each; more would not fit AVX2
  alignas(64) inputs::b_element column[2 * lanes];
  std::fill_n(column, 2 * lanes, inputs::b_element{1});
  const inputs::factors b = inputs::load_column(column);
  inputs::sums_vector sums[chains];
#pragma GCC unroll 32
  for (ptrdiff_t i = 0; i < chains; ++i) sums[i] = hn::Set(bits_tag(), static_cast<int>(i));
  // Each sum is its own factor, or the compiler would make the products once.
  for (ptrdiff_t n = 0; n < iterations; ++n)
#pragma GCC unroll 32
    for (ptrdiff_t i = 0; i < chains; ++i)
      sums[i] = inputs::dot(sums[i], hn::BitCast(inputs::factor_tag(), sums[i]), b);
  std::int32_t sink[lanes] = {};
  for (ptrdiff_t i = 0; i < chains; ++i)
    hn::StoreU(hn::Add(sums[i], hn::LoadU(bits_tag(), sink)), bits_tag(), sink);
  volatile std::int32_t keep = sink[0];
  static_cast<void>(keep);
  return 2.0 * static_cast<double>(chains * lanes * inputs::step) * static_cast<double>(iterations);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
