/// Fused attention for one head: scores, bias, softmax and values per tile of queries, reading the
/// rows of q, k and v where they lie.
///
/// K (transposed) and V are packed once per call into panels; then each tile of tile_rows queries
/// goes through scores -> softmax -> values with its scores in L1. The FMAs of both products run in
/// the GEMM's register tile; packing costs O(n_k d), the exponentials one in d of the FMAs.
#pragma once

#include <algorithm>

#include "contract.hpp"
#include "softmax.hpp"
#include "tile.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline ptrdiff_t attention_columns(ptrdiff_t n_k) {
  return round_up(n_k, panel_width);
}

inline ptrdiff_t attention_scratch(ptrdiff_t n_k, ptrdiff_t d_k, ptrdiff_t d_v) {
  const ptrdiff_t columns = attention_columns(n_k);
  return columns * d_k + n_k * round_up(d_v, panel_width) + tile_rows * columns;
}

/// Panels of K transposed: panel p holds keys p * panel_width and on, as [d_k][panel_width].
inline void pack_keys(ptrdiff_t n_k, ptrdiff_t d_k, const float* const* k, float* packed) {
  for (ptrdiff_t j0 = 0; j0 < n_k; j0 += panel_width) {
    for (ptrdiff_t j = 0; j < panel_width; ++j) {
      float* column = packed + j0 * d_k + j;
      const float* key = j0 + j < n_k ? k[j0 + j] : nullptr;
      for (ptrdiff_t i = 0; i < d_k; ++i) column[i * panel_width] = key ? key[i] : 0.0f;
    }
  }
}

/// Panels of V: panel p holds channels p * panel_width and on, as [n_k][panel_width].
inline void pack_values(ptrdiff_t n_k, ptrdiff_t d_v, const float* const* v, float* packed) {
  for (ptrdiff_t c = 0; c < d_v; c += panel_width) {
    const ptrdiff_t columns = std::min(panel_width, d_v - c);
    float* panel = packed + c * n_k;
    for (ptrdiff_t j = 0; j < n_k; ++j)
      pack_panel(1, columns, v[j] + c, 0, 1, panel + j * panel_width);
  }
}

/// scores = exp(scale * scores + bias - max), with -infinity where there is no key. Returns the
/// sum.
inline float softmax_scores(const attention_args& args, const float* bias, float* scores) {
  const ptrdiff_t columns = attention_columns(args.n_k);
  const batch scale(args.scale);
  batch best(-std::numeric_limits<float>::infinity());
  if (bias) {
    for (ptrdiff_t j = 0; j < columns; j += batch_lanes) {
      const batch s =
          xsimd::fma(batch::load_aligned(scores + j), scale, batch::load_unaligned(bias + j));
      s.store_aligned(scores + j);
      best = xsimd::max(best, s);
    }
  } else {
    std::fill(scores + args.n_k, scores + columns, -std::numeric_limits<float>::infinity());
    for (ptrdiff_t j = 0; j < columns; j += batch_lanes) {
      const batch s = batch::load_aligned(scores + j) * scale;
      s.store_aligned(scores + j);
      best = xsimd::max(best, s);
    }
  }
  alignas(64) float lane[static_cast<size_t>(batch_lanes)];
  best.store_aligned(lane);
  return exp_and_sum(columns, scores, row_max(batch_lanes, lane));
}

template <ptrdiff_t Rows>
HWY_INLINE void attention_tile(const attention_args& args, ptrdiff_t row, const float* keys,
                               const float* values, float* scores) {
  const ptrdiff_t columns = attention_columns(args.n_k);
  register_tile<Rows> tile;
  for (ptrdiff_t j = 0; j < columns; j += panel_width) {
    tile.clear();
    tile.accumulate(args.d_k, args.q + row, 0, keys + j * args.d_k);
    tile.store(scores + j, columns);
  }

  const float* score_row[Rows];
  float inverse[Rows];
  for (ptrdiff_t r = 0; r < Rows; ++r) {
    score_row[r] = scores + r * columns;
    const float* bias = args.bias ? args.bias + (row + r) * args.bias_stride : nullptr;
    inverse[r] = 1.0f / softmax_scores(args, bias, scores + r * columns);
  }

  alignas(64) float result[panel_width];
  for (ptrdiff_t c = 0; c < args.d_v; c += panel_width) {
    tile.clear();
    tile.accumulate(args.n_k, score_row, 0, values + c * args.n_k);
    const ptrdiff_t width = std::min(panel_width, args.d_v - c);
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      tile.store_row(r, result);
      const batch factor(inverse[r]);
      map(width, result, args.out[row + r] + c, [factor](batch v) { return v * factor; });
    }
  }
}

inline void attention(const attention_args& args) {
  const ptrdiff_t columns = attention_columns(args.n_k);
  float* keys = args.scratch;
  float* values = keys + columns * args.d_k;
  float* scores = values + args.n_k * round_up(args.d_v, panel_width);
  pack_keys(args.n_k, args.d_k, args.k, keys);
  pack_values(args.n_k, args.d_v, args.v, values);
  for (ptrdiff_t row = 0; row < args.n_q; row += tile_rows)
    with_rows(std::min(tile_rows, args.n_q - row),
              [&]<ptrdiff_t Rows>() { attention_tile<Rows>(args, row, keys, values, scores); });
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
