/// Sums and maxima over a row, sums in an order that does not depend on the vector width.
#pragma once

#include <algorithm>
#include <cmath>

#include "target.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// Every target adds a row in 16 virtual lanes (lane i takes elements i, i + 16, ...), then folds
/// the lanes 16 -> 8 -> 4 -> 2 -> 1, adding lane i + width to lane i. So a sum has the same bits
/// whatever the vector width.
inline constexpr ptrdiff_t virtual_lanes = 16;
inline constexpr ptrdiff_t lane_batches = virtual_lanes / batch_lanes;
static_assert(virtual_lanes % batch_lanes == 0);

/// lane[0] op lane[1] op ... over `count` (a power of two) lanes, folded in halves.
template <class Op>
HWY_INLINE float fold(float* lane, ptrdiff_t count, Op op) {
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> quad;
  if (count >= 4) {
    for (ptrdiff_t width = count / 2; width >= 4; width /= 2)
      for (ptrdiff_t i = 0; i < width; i += 4)
        hn::Store(op(hn::Load(quad, lane + i), hn::Load(quad, lane + i + width)), quad, lane + i);
    auto v = hn::Load(quad, lane);
    v = op(v, hn::Shuffle1032(v));
    return hn::GetLane(op(v, hn::Shuffle2301(v)));
  }
#endif
  const hn::CappedTag<float, 1> one;
  for (ptrdiff_t width = count / 2; width > 0; width /= 2)
    for (ptrdiff_t i = 0; i < width; ++i)
      hn::Store(op(hn::Load(one, lane + i), hn::Load(one, lane + i + width)), one, lane + i);
  return lane[0];
}

/// The sum over 16 virtual lanes.
HWY_INLINE float fold_sum(const batch (&sums)[lane_batches]) {
  alignas(64) float lane[virtual_lanes];
  for (ptrdiff_t b = 0; b < lane_batches; ++b) sums[b].store_aligned(lane + b * batch_lanes);
  return fold(lane, virtual_lanes, [](auto a, auto b) { return hn::Add(a, b); });
}

HWY_INLINE float fold_max(batch v) {
  alignas(64) float lane[static_cast<size_t>(batch_lanes)];
  v.store_aligned(lane);
  return fold(lane, batch_lanes, [](auto a, auto b) { return hn::Max(a, b); });
}

/// Sum over i of what f adds to a sum for x[i]: f(sum, x), which adds nothing for `padding`.
template <class Function>
inline float sum_of(ptrdiff_t n, const float* x, float padding, Function f) {
  batch sums[lane_batches];
  for (batch& s : sums) s = batch(0.0f);
  ptrdiff_t i = 0;
  for (; i + virtual_lanes <= n; i += virtual_lanes)
    for (ptrdiff_t b = 0; b < lane_batches; ++b)
      sums[b] = f(sums[b], batch::load_unaligned(x + i + b * batch_lanes));
  if (i < n) {
    alignas(64) float lane[virtual_lanes];
    for (ptrdiff_t j = 0; j < virtual_lanes; ++j) lane[j] = i + j < n ? x[i + j] : padding;
    for (ptrdiff_t b = 0; b < lane_batches; ++b)
      sums[b] = f(sums[b], batch::load_aligned(lane + b * batch_lanes));
  }
  return fold_sum(sums);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
