/// Softmax of one row, in place.
#pragma once

#include <limits>

#include "elementwise.hpp"
#include "reduce.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline void softmax(ptrdiff_t n, float* x) {
  batch best(-std::numeric_limits<float>::infinity());
  ptrdiff_t i = 0;
  for (; i + batch_lanes <= n; i += batch_lanes)
    best = xsimd::max(best, batch::load_unaligned(x + i));
  float greatest = fold_max(best);
  for (; i < n; ++i) greatest = std::fmax(greatest, x[i]);

  const batch shift(greatest);
  map(n, x, x, [shift](batch v) {
    const batch d = v - shift;  // a column of -infinity becomes exactly 0
    return xsimd::select(d < batch(-87.3f), batch(0.0f), exp_batch(d));
  });
  const batch inverse(1.0f / sum_of(n, x, 0.0f, [](batch v) { return v; }));
  map(n, x, x, [inverse](batch v) { return v * inverse; });
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
