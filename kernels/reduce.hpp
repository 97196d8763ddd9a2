/// Sums over a row in an order that does not depend on the vector width.
#pragma once

#include <cmath>

#include "target.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// Every target adds a row in 16 virtual lanes (lane i takes elements i, i + 16, ...), then folds
/// the lanes 16 -> 8 -> 4 -> 2 -> 1. So a sum has the same bits whatever the vector width.
inline constexpr ptrdiff_t virtual_lanes = 16;
inline constexpr ptrdiff_t lane_batches = virtual_lanes / batch_lanes;
static_assert(virtual_lanes % batch_lanes == 0);

inline float fold_lanes(float* lane) {
  for (ptrdiff_t width = virtual_lanes / 2; width > 0; width /= 2)
    for (ptrdiff_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

/// sum over i of f(x[i]), where f maps a batch to a batch and f(padding) is 0.
template <class Function>
inline float sum_of(ptrdiff_t n, const float* x, float padding, Function f) {
  batch sums[lane_batches];
  for (batch& s : sums) s = batch(0.0f);
  ptrdiff_t i = 0;
  for (; i + virtual_lanes <= n; i += virtual_lanes)
    for (ptrdiff_t b = 0; b < lane_batches; ++b)
      sums[b] += f(batch::load_unaligned(x + i + b * batch_lanes));
  alignas(64) float lane[virtual_lanes];
  if (i < n) {
    for (ptrdiff_t j = 0; j < virtual_lanes; ++j) lane[j] = i + j < n ? x[i + j] : padding;
    for (ptrdiff_t b = 0; b < lane_batches; ++b)
      sums[b] += f(batch::load_aligned(lane + b * batch_lanes));
  }
  for (ptrdiff_t b = 0; b < lane_batches; ++b) sums[b].store_aligned(lane + b * batch_lanes);
  return fold_lanes(lane);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
