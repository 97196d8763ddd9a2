/// Fused attention for one head: scores, bias, softmax and values per tile of queries, reading the
/// rows of q, k and v where they lie.
///
/// K (transposed) and V are packed once per call into panels; then each tile of tile_rows queries
/// goes through scores -> softmax -> values with its scores in L1. The FMAs of both products run in
/// the GEMM's register tile; packing costs O(n_k d), the exponentials one in d of the FMAs.
#pragma once

#include <algorithm>
#include <limits>

#include "contract.hpp"
#include "elementwise.hpp"
#include "reduce.hpp"
#include "tile.hpp"
#include "transpose.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline ptrdiff_t attention_columns(ptrdiff_t n_k) {
  return round_up(n_k, half_panel);
}

/// Floats of a row of A in the form that Inputs multiply.
template <class Inputs>
constexpr ptrdiff_t converted_size(ptrdiff_t n) {
  return Inputs::converts ? steps<Inputs>(n) * Inputs::a_per_step : 0;
}

template <class Inputs>
inline ptrdiff_t attention_scratch(ptrdiff_t n_k, ptrdiff_t d_k, ptrdiff_t d_v) {
  const ptrdiff_t columns = attention_columns(n_k);
  return columns * d_k + n_k * round_up(d_v, half_panel) +
         tile_rows * (columns + converted_size<Inputs>(d_k));
}

/// Columns `first` and on of n rows of d floats: panel[i][j] = row[i][first + j], zeros after d.
template <ptrdiff_t Vectors>
HWY_INLINE void pack_columns(ptrdiff_t n, ptrdiff_t d, const float* const* row, ptrdiff_t first,
                             float* panel) {
  constexpr ptrdiff_t width = Vectors * lanes;
  const float_tag tag;
  for (ptrdiff_t i = 0; i < n; ++i, panel += width) {
    const float* from = row[i] + first;
    if (first + width <= d) {
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v)
        hn::Store(hn::LoadU(tag, from + v * lanes), tag, panel + v * lanes);
    } else {
      for (ptrdiff_t j = 0; j < width; ++j) panel[j] = first + j < d ? from[j] : 0.0f;
    }
  }
}

struct softmax_result {
  float max, sum;
};

/// scores = exp(scale * scores + bias - max), about 0 where there is no key, and their sum.
HWY_INLINE softmax_result softmax_scores(const attention_args& args, ptrdiff_t columns,
                                         const float* bias, float* scores) {
  const batch scale(args.scale);
  batch best(-std::numeric_limits<float>::infinity());
  if (bias) {
    for (ptrdiff_t j = 0; j < columns; j += batch_lanes) {
      const batch s =
          fused(batch::load_aligned(scores + j), scale, batch::load_unaligned(bias + j));
      s.store_aligned(scores + j);
      best = max(best, s);
    }
  } else {
    for (ptrdiff_t j = args.n_k; j < columns; ++j)
      scores[j] = -std::numeric_limits<float>::infinity();
    for (ptrdiff_t j = 0; j < columns; j += batch_lanes) {
      const batch s = batch::load_aligned(scores + j) * scale;
      s.store_aligned(scores + j);
      best = max(best, s);
    }
  }
  // exp_batch makes 1e-38 of -infinity, which no sum and no value notices.
  const float max = fold_max(best);
  const batch shift(max);
  batch sums[lane_batches];
  for (batch& s : sums) s = batch(0.0f);
  ptrdiff_t j = 0;
  for (; j + virtual_lanes <= columns; j += virtual_lanes)
    for (ptrdiff_t b = 0; b < lane_batches; ++b) {
      float* at = scores + j + b * batch_lanes;
      const batch e = exp_batch(batch::load_aligned(at) - shift);
      e.store_aligned(at);
      sums[b] += e;
    }
  for (ptrdiff_t b = 0; j < columns; j += batch_lanes, ++b) {
    const batch e = exp_batch(batch::load_aligned(scores + j) - shift);
    e.store_aligned(scores + j);
    sums[b] += e;
  }
  return {max, fold_sum(sums)};
}

/// A panel that was packed in the memory of floats, in the form that Inputs multiply.
template <class Inputs>
HWY_INLINE const typename Inputs::b_element* panel_at(const float* panel) {
  return reinterpret_cast<const typename Inputs::b_element*>(panel);
}

template <class Inputs, ptrdiff_t Rows>
HWY_INLINE void attention_tile(const attention_args& args, ptrdiff_t row, const float* keys,
                               const float* values, float* scores) {
  using element = typename Inputs::a_element;
  const ptrdiff_t columns = attention_columns(args.n_k);
  const element* a[Rows];
  for (ptrdiff_t r = 0; r < Rows; ++r) {
    if constexpr (Inputs::converts) {
      auto* out = reinterpret_cast<element*>(scores + tile_rows * columns) +
                  r * converted_size<Inputs>(args.d_k);
      Inputs::convert_row(args.d_k, args.q[row + r], out);
      a[r] = out;
    } else {
      a[r] = args.q[row + r];
    }
  }
  for_panels(columns, [&]<ptrdiff_t Vectors>(ptrdiff_t j) {
    register_tile<Rows, Vectors> tile;
    tile.clear();
    tile.template accumulate<Inputs>(steps<Inputs>(args.d_k), a, 0,
                                     panel_at<Inputs>(keys + j * args.d_k));
    tile.store(scores + j, columns);
  });

  float inverse[Rows];
  for (ptrdiff_t r = 0; r < Rows; ++r) {
    float* score_row = scores + r * columns;
    const float* bias = args.bias ? args.bias + (row + r) * args.bias_stride : nullptr;
    const auto [max, sum] = softmax_scores(args, columns, bias, score_row);
    inverse[r] = 1.0f / sum;
    if (args.lse) args.lse[row + r] = max + static_cast<float>(std::log(double{sum}));
    auto* out = reinterpret_cast<element*>(score_row);
    if constexpr (Inputs::converts) Inputs::convert_row(args.n_k, score_row, out);
    a[r] = out;
  }

  for_panels(args.d_v, [&]<ptrdiff_t Vectors>(ptrdiff_t c) {
    register_tile<Rows, Vectors> tile;
    tile.clear();
    tile.template accumulate<Inputs>(steps<Inputs>(args.n_k), a, 0,
                                     panel_at<Inputs>(values + c * args.n_k));
    tile.scale(inverse);
    if (c + tile.width <= args.d_v) {
      for (ptrdiff_t r = 0; r < Rows; ++r) tile.store_row(r, args.out[row + r] + c);
    } else {
      alignas(64) float result[tile.width];
      for (ptrdiff_t r = 0; r < Rows; ++r) {
        tile.store_row(r, result);
        std::copy_n(result, args.d_v - c, args.out[row + r] + c);
      }
    }
  });
}

template <class Inputs>
inline void attention(const attention_args& args) {
  const ptrdiff_t columns = attention_columns(args.n_k);
  float* keys = args.scratch;
  float* values = keys + columns * args.d_k;
  float* scores = values + args.n_k * round_up(args.d_v, half_panel);
  for_panels(columns, [&]<ptrdiff_t Vectors>(ptrdiff_t j) {
    constexpr ptrdiff_t width = Vectors * lanes;
    float* panel = keys + j * args.d_k;
    transpose_rows<width>(std::min(width, args.n_k - j), width, args.d_k, args.k + j, 0, panel);
    Inputs::finish_panel(args.d_k, width, panel);
  });
  for_panels(args.d_v, [&]<ptrdiff_t Vectors>(ptrdiff_t c) {
    float* panel = values + c * args.n_k;
    pack_columns<Vectors>(args.n_k, args.d_v, args.v, c, panel);
    Inputs::finish_panel(args.n_k, Vectors * lanes, panel);
  });
  for_tiles(args.n_q, [&]<ptrdiff_t Rows>(ptrdiff_t row) {
    attention_tile<Inputs, Rows>(args, row, keys, values, scores);
  });
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
