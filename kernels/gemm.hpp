/// The packed, blocked fp32 GEMM with its epilogue.
///
/// Loop order, from the outside: blocks of rows (their A stays in L2), panels of B, blocks of k (a
/// k_block x panel_width piece of B stays in L1), register tiles. B is read from L2 or L3 once per
/// block of rows, A from L2 once per panel; C is written once, with bias, residual and activation
/// applied while the tile is in L1. Bound by the FMA units: each tile step issues tile_rows *
/// tile_vectors FMAs for tile_rows + tile_vectors loads.
#pragma once

#include <algorithm>

#include "contract.hpp"
#include "elementwise.hpp"
#include "tile.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// A piece of B of this depth fills at most 3/4 of a 32 KiB L1 cache.
inline constexpr ptrdiff_t k_block =
    24 * 1024 / (panel_width * static_cast<ptrdiff_t>(sizeof(float)));
/// Rows of A that are swept with one piece of B: a block of A is at most 256 KiB, half an L2.
inline constexpr ptrdiff_t max_block_rows = 16 * tile_rows;
inline ptrdiff_t block_rows(ptrdiff_t k) {
  const ptrdiff_t fit = 256 * 1024 / static_cast<ptrdiff_t>(sizeof(float)) / k;
  return std::clamp(fit / tile_rows * tile_rows, 4 * tile_rows, max_block_rows);
}

inline ptrdiff_t packed_size(ptrdiff_t k, ptrdiff_t n) {
  return k * round_up(n, panel_width);
}

inline void pack_b(ptrdiff_t k, ptrdiff_t n, const float* b, ptrdiff_t row_stride,
                   ptrdiff_t column_stride, float* packed) {
  for (ptrdiff_t j = 0; j < n; j += panel_width)
    pack_panel(k, std::min(panel_width, n - j), b + j * column_stride, row_stride, column_stride,
               packed + j * k);
}

/// Applies the activation to Rows x panel_width floats that were just stored, all in one loop: its
/// constants stay in registers, and the rows' chains of operations overlap.
template <ptrdiff_t Rows>
inline void activate_tile(activation act, float* const* c, ptrdiff_t column) {
  with_activation(act, [&]<activation Act>() {
    for (ptrdiff_t r = 0; r < Rows; ++r)
      for (ptrdiff_t j = 0; j < panel_width; j += batch_lanes) {
        float* at = c[r] + column + j;
        apply_batch<Act>(batch::load_unaligned(at)).store_unaligned(at);
      }
  });
}

/// Writes a finished tile: residual, store, activation. `columns` < panel_width at the right edge.
template <ptrdiff_t Rows>
HWY_INLINE void finish_tile(const register_tile<Rows>& tile, const gemm_args& args, ptrdiff_t row,
                            ptrdiff_t column, ptrdiff_t columns) {
  if (columns == panel_width) {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      float* c = args.c[row + r] + column;
      if (args.residual)
        tile.store_row_plus(r, args.residual[row + r] + column, c);
      else
        tile.store_row(r, c);
    }
    if (args.act != activation::none) activate_tile<Rows>(args.act, args.c + row, column);
    return;
  }
  alignas(64) float edge[Rows * panel_width];
  tile.store(edge, panel_width);
  for (ptrdiff_t r = 0; r < Rows; ++r) {
    float* from = edge + r * panel_width;
    if (args.residual) add(columns, from, args.residual[row + r] + column, from);
    activate(args.act, columns, from, from);
    std::copy_n(from, columns, args.c[row + r] + column);
  }
}

inline void gemm(const gemm_args& args) {
  const ptrdiff_t depth = args.taps * args.k;
  const ptrdiff_t rows_at_once = block_rows(depth);
  alignas(64) float partial[max_block_rows * panel_width];
  alignas(64) float bias[panel_width];

  for (ptrdiff_t m0 = 0; m0 < args.m; m0 += rows_at_once) {
    const ptrdiff_t m1 = std::min(args.m, m0 + rows_at_once);
    for (ptrdiff_t n0 = 0; n0 < args.n; n0 += panel_width) {
      const ptrdiff_t columns = std::min(panel_width, args.n - n0);
      const float* panel = args.b + n0 * depth;
      std::fill_n(bias, panel_width, 0.0f);
      if (args.bias) std::copy_n(args.bias + n0, columns, bias);

      for (ptrdiff_t t = 0; t < args.taps; ++t)
        for (ptrdiff_t k0 = 0; k0 < args.k; k0 += k_block) {
          const ptrdiff_t k1 = std::min(args.k, k0 + k_block);
          const bool first = t == 0 && k0 == 0;
          const bool last = t == args.taps - 1 && k1 == args.k;
          const float* piece = panel + (t * args.k + k0) * panel_width;
          for (ptrdiff_t m = m0; m < m1; m += tile_rows) {
            const float* const* a = args.a + t * args.m + m;
            float* spill = partial + (m - m0) * panel_width;
            with_rows(std::min(tile_rows, m1 - m), [&]<ptrdiff_t Rows>() {
              register_tile<Rows> tile;
              first ? tile.load(bias, 0) : tile.load(spill, panel_width);
              tile.accumulate(k1 - k0, a, k0, piece);
              last ? finish_tile(tile, args, m, n0, columns) : tile.store(spill, panel_width);
            });
          }
        }
    }
  }
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
