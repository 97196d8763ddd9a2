/// Softmax of a row, and of the columns of small matrices, in place.
#pragma once

#include <limits>
#include <type_traits>

#include "elementwise.hpp"
#include "reduce.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline void softmax(ptrdiff_t n, float* x) {
  batch best(-std::numeric_limits<float>::infinity());
  ptrdiff_t i = 0;
  for (; i + batch_lanes <= n; i += batch_lanes) best = max(best, batch::load_unaligned(x + i));
  float greatest = fold_max(best);
  for (; i < n; ++i) greatest = std::fmax(greatest, x[i]);

  const batch shift(greatest);
  map(n, x, x, [shift](batch v) {
    const batch d = v - shift;  // a column of -infinity becomes exactly 0
    return select(d < batch(-87.3f), batch(0.0f), exp_batch(d));
  });
  const batch inverse(1.0f / sum_of(n, x, 0.0f, [](batch sum, batch v) { return sum + v; }));
  map(n, x, x, [inverse](batch v) { return v * inverse; });
}

/// Columns are few (the heads of an attention) and may be fewer than a vector has lanes, so that
/// the exponentials run over a whole matrix at once; the loops over columns are left to the
/// compiler, which is told their most common number.
inline void softmax_columns(ptrdiff_t count, ptrdiff_t rows, ptrdiff_t columns, float* x) {
  constexpr ptrdiff_t strip = 8;
  const ptrdiff_t n = rows * columns;
  const auto for_strips = [&](float* matrix, auto&& f) {
    ptrdiff_t c = 0;
    for (; c + strip <= columns; c += strip)
      f(matrix + c, std::integral_constant<ptrdiff_t, strip>());
    if (c < columns) f(matrix + c, columns - c);
  };
  for (float* const end = x + count * n; x != end; x += n) {
    for_strips(x, [&](float* part, auto width) {
      float greatest[strip];
      std::copy_n(part, +width, greatest);
      for (ptrdiff_t r = 1; r < rows; ++r)
        for (ptrdiff_t c = 0; c < width; ++c)
          greatest[c] = std::max(greatest[c], part[r * columns + c]);
      for (ptrdiff_t r = 0; r < rows; ++r)
        for (ptrdiff_t c = 0; c < width; ++c) part[r * columns + c] -= greatest[c];
    });
    map(n, x, x, exp_batch);
    for_strips(x, [&](float* part, auto width) {
      float sums[strip] = {}, inverse[strip];
      for (ptrdiff_t r = 0; r < rows; ++r)
        for (ptrdiff_t c = 0; c < width; ++c) sums[c] += part[r * columns + c];
      for (ptrdiff_t c = 0; c < width; ++c) inverse[c] = 1.0f / sums[c];
      for (ptrdiff_t r = 0; r < rows; ++r)
        for (ptrdiff_t c = 0; c < width; ++c) part[r * columns + c] *= inverse[c];
    });
  }
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
