/// The packed, blocked GEMM with its epilogue, for factors of every precision.
///
/// Loop order, from the outside: blocks of rows (their A stays in L2), panels of B, blocks of k (a
/// k_block x panel_width piece of B stays in L1), register tiles. B is read from L2 or L3 once per
/// block of rows, A from L2 once per panel; C is written once, with bias, residual and activation
/// applied while the tile is in L1. Bound by the FMA units: each tile step issues tile_rows *
/// tile_vectors FMAs for tile_rows + tile_vectors loads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "contract.hpp"
#include "elementwise.hpp"
#include "tile.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// A piece of B of this many steps along k fills at most 3/4 of a 32 KiB L1 cache.
template <class Inputs>
inline constexpr ptrdiff_t k_block = 24 * 1024 / panel_width /
                                     static_cast<ptrdiff_t>(sizeof(typename Inputs::b_element));
/// Rows of A that are swept with one piece of B: a block of A is at most 256 KiB, half an L2.
inline constexpr ptrdiff_t max_block_rows = 18 * tile_rows;
inline ptrdiff_t block_rows(ptrdiff_t row_bytes, ptrdiff_t least) {
  return std::clamp(256 * 1024 / row_bytes / tile_rows * tile_rows, least, max_block_rows);
}

/// Bytes of what follows a panel of whole numbers: for each column the sum of what is missing of A
/// times B.
template <class Inputs>
inline constexpr ptrdiff_t column_sum_bytes =
    std::is_integral_v<typename Inputs::sum> ? panel_width * 4 : 0;

/// Bytes of a panel. Panels start at multiples of 64.
template <class Inputs>
inline ptrdiff_t panel_bytes(ptrdiff_t k) {
  const ptrdiff_t elements = steps<Inputs>(k) * panel_width;
  const auto size = static_cast<ptrdiff_t>(sizeof(typename Inputs::b_element));
  return round_up(elements * size, 64) + column_sum_bytes<Inputs>;
}

static_assert(column_slice % panel_width == 0);

template <class Inputs>
inline ptrdiff_t packed_bytes(ptrdiff_t k, ptrdiff_t n) {
  return panel_bytes<Inputs>(k) * (round_up(n, panel_width) / panel_width);
}

/// Panels of [step][panel_width] elements; missing columns, and what is missing of the last step,
/// are zeros.
template <class Inputs>
inline void pack_b(ptrdiff_t k, ptrdiff_t n, const float* b, ptrdiff_t row_stride,
                   ptrdiff_t column_stride, const float* zero_point, void* packed) {
  auto* panel = static_cast<std::byte*>(packed);
  for (ptrdiff_t n0 = 0; n0 < n; n0 += panel_width, panel += panel_bytes<Inputs>(k)) {
    auto* out = reinterpret_cast<typename Inputs::b_element*>(panel);
    std::int32_t missing[panel_width] = {};
    for (ptrdiff_t i = 0; i < k; i += Inputs::step)
      for (ptrdiff_t j = 0; j < panel_width; ++j) {
        float x[Inputs::step] = {};
        for (ptrdiff_t s = 0; s < Inputs::step && i + s < k && n0 + j < n; ++s) {
          x[s] = b[(i + s) * row_stride + (n0 + j) * column_stride];
          if constexpr (column_sum_bytes<Inputs> != 0)
            missing[j] += Inputs::missing(zero_point ? static_cast<int>(zero_point[i + s]) : 0) *
                          static_cast<std::int32_t>(x[s]);
        }
        *out++ = Inputs::pack(x);
      }
    if constexpr (column_sum_bytes<Inputs> != 0)
      std::copy_n(missing, panel_width,
                  reinterpret_cast<std::int32_t*>(panel + panel_bytes<Inputs>(k) -
                                                  column_sum_bytes<Inputs>));
  }
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

/// Rows of A for the micro-kernel: for each of `taps`, from a[tap * stride] on, pointers to the
/// `count` steps of a row.
template <class Inputs>
struct a_rows {
  const typename Inputs::a_element* const* a;
  ptrdiff_t stride, taps, count;
};

/// Rows m0 to m1 of C.
template <class Inputs>
inline void gemm_rows(const gemm_args& args, const a_rows<Inputs>& rows, ptrdiff_t m0,
                      ptrdiff_t m1) {
  using sum = typename Inputs::sum;
  using b_element = typename Inputs::b_element;
  constexpr bool whole = std::is_integral_v<sum>;
  alignas(64) sum partial[max_block_rows * panel_width];
  alignas(64) sum start[panel_width];
  alignas(64) float bias[panel_width], scale[panel_width];
  const ptrdiff_t depth = args.taps * args.k;
  const auto* panel =
      static_cast<const std::byte*>(args.b) + packed_bytes<Inputs>(depth, args.column);
  for (ptrdiff_t n0 = 0; n0 < args.n; n0 += panel_width, panel += panel_bytes<Inputs>(depth)) {
    const ptrdiff_t columns = std::min(panel_width, args.n - n0);
    std::fill_n(bias, panel_width, 0.0f);
    if (args.bias) std::copy_n(args.bias + n0, columns, bias);
    if constexpr (Inputs::scaled) {
      std::fill_n(scale, panel_width, 0.0f);
      std::copy_n(args.scale + n0, columns, scale);
    }
    if constexpr (whole) {
      std::copy_n(reinterpret_cast<const std::int32_t*>(panel + panel_bytes<Inputs>(depth) -
                                                        column_sum_bytes<Inputs>),
                  panel_width, start);
    } else if constexpr (Inputs::scaled) {
      std::fill_n(start, panel_width, 0.0f);
    } else {
      std::copy_n(bias, panel_width, start);
    }

    for (ptrdiff_t t = 0; t < rows.taps; ++t)
      for (ptrdiff_t k0 = 0; k0 < rows.count; k0 += k_block<Inputs>) {
        const ptrdiff_t k1 = std::min(rows.count, k0 + k_block<Inputs>);
        const bool first = t == 0 && k0 == 0;
        const bool last = t == rows.taps - 1 && k1 == rows.count;
        const auto* packed = reinterpret_cast<const b_element*>(panel);
        const auto* piece = packed + (t * rows.count + k0) * panel_width;
        for_tiles(m1 - m0, [&]<ptrdiff_t Rows>(ptrdiff_t row) {
          const ptrdiff_t m = m0 + row;
          const auto* const* a = rows.a + t * rows.stride + row;
          sum* spill = partial + row * panel_width;
          register_tile<Rows, tile_vectors, sum> tile;
          first ? tile.load(start, 0) : tile.load(spill, panel_width);
          tile.template accumulate<Inputs>(k1 - k0, a, k0, piece);
          if (!last)
            tile.store(spill, panel_width);
          else if constexpr (Inputs::scaled)
            finish_tile(tile.scaled(scale, bias), args, m, n0, columns);
          else
            finish_tile(tile, args, m, n0, columns);
        });
      }
  }
}

/// A is read where it lies.
template <class Inputs>
inline void gemm_in_place(const gemm_args& args) {
  const ptrdiff_t depth = args.taps * args.k;
  const ptrdiff_t most = block_rows(depth * static_cast<ptrdiff_t>(sizeof(float)), 4 * tile_rows);
  const ptrdiff_t blocks = (args.m + most - 1) / most;
  for (ptrdiff_t i = 0, m = 0; i < blocks; ++i) {
    const ptrdiff_t end = args.m * (i + 1) / blocks;
    gemm_rows<Inputs>(args, {args.a + m, args.m, args.taps, args.k}, m, end);
    m = end;
  }
}

/// A is converted block by block, its taps joined to one row.
template <class Inputs>
inline void gemm_converted(const gemm_args& args) {
  using element = typename Inputs::a_element;
  constexpr ptrdiff_t room = 128 * 1024 / static_cast<ptrdiff_t>(sizeof(element));
  alignas(64) element converted[room];
  alignas(64) float joined[max_gemm_depth];
  const element* pointers[max_block_rows];
  const typename Inputs::converter convert(args);
  const ptrdiff_t depth = args.taps * args.k;
  const ptrdiff_t size = steps<Inputs>(depth) * Inputs::a_per_step;
  const ptrdiff_t most =
      std::clamp<ptrdiff_t>(room / size / tile_rows * tile_rows, 1, max_block_rows);
  const ptrdiff_t blocks = (args.m + most - 1) / most;
  for (ptrdiff_t i = 0, m = 0; i < blocks; ++i) {
    const ptrdiff_t end = args.m * (i + 1) / blocks;
    for (ptrdiff_t r = m; r < end; ++r) {
      const float* from = args.a[r];
      if (args.taps > 1) {
        for (ptrdiff_t t = 0; t < args.taps; ++t)
          std::copy_n(args.a[t * args.m + r], args.k, joined + t * args.k);
        from = joined;
      }
      element* row = converted + (r - m) * size;
      convert(depth, from, row);
      pointers[r - m] = row;
    }
    gemm_rows<Inputs>(args, {pointers, 0, 1, steps<Inputs>(depth)}, m, end);
    m = end;
  }
}

template <class Inputs>
inline void gemm(const gemm_args& args) {
  if constexpr (Inputs::converts)
    gemm_converted<Inputs>(args);
  else
    gemm_in_place<Inputs>(args);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
