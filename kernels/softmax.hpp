/// Softmax of one row, in place.
#pragma once

#include <limits>

#include "elementwise.hpp"
#include "reduce.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline float row_max(ptrdiff_t n, const float* x) {
  batch best(-std::numeric_limits<float>::infinity());
  ptrdiff_t i = 0;
  for (; i + batch_lanes <= n; i += batch_lanes)
    best = xsimd::max(best, batch::load_unaligned(x + i));
  alignas(64) float lane[static_cast<size_t>(batch_lanes)];
  best.store_aligned(lane);
  for (; i < n; ++i) lane[0] = std::fmax(lane[0], x[i]);
  for (const float v : lane) lane[0] = std::fmax(lane[0], v);
  return lane[0];
}

/// x[i] = exp(x[i] - shift), and returns their sum. A column of -infinity becomes exactly 0.
inline float exp_and_sum(ptrdiff_t n, float* x, float shift) {
  const batch s(shift);
  map(n, x, x, [s](batch v) {
    const batch d = v - s;
    return xsimd::select(d < batch(-87.3f), batch(0.0f), exp_batch(d));
  });
  return sum_of(n, x, 0.0f, [](batch v) { return v; });
}

inline void softmax(ptrdiff_t n, float* x) {
  const float sum = exp_and_sum(n, x, row_max(n, x));
  const batch inverse(1.0f / sum);
  map(n, x, x, [inverse](batch v) { return v * inverse; });
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
