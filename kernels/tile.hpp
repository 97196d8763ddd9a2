/// The micro-kernel that GEMM and attention share: a register tile of sums, an outer product per k.
#pragma once

#include <type_traits>

#include "inputs.hpp"
#include "int8.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// Steps along k that the compiler unrolls. On Arm clang would load both steps' elements of A as
/// pairs, and spill sums to keep them: twice the time.
inline constexpr int steps_at_once = HWY_ARCH_ARM ? 1 : 2;

/// A tile of Rows x (Vectors * lanes) sums in registers:
///
///     tile[r][j] = start[r * start_stride + j] + sum over i < k of a[r][i] * panel[i][j]
///
/// `panel` has rows of Vectors * lanes elements and vector alignment. Per step along k it loads
/// Vectors vectors of B, broadcasts Rows elements of A and issues Rows * Vectors FMAs or dot
/// products: compute bound as long as the panel is in L1. Sum is float or std::int32_t.
template <ptrdiff_t Rows, ptrdiff_t Vectors = tile_vectors, class Sum = float>
class register_tile {
public:
  static constexpr ptrdiff_t width = Vectors * lanes;

  HWY_INLINE void load(const Sum* start, ptrdiff_t start_stride) {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v)
        sums_[r][v] = hn::LoadU(tag_, start + r * start_stride + v * lanes);
  }

  HWY_INLINE void clear() {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v) sums_[r][v] = hn::Zero(tag_);
  }

  /// Adds `count` steps of Inputs along k, from step `first` of the rows of A on.
  template <class Inputs>
  HWY_INLINE void accumulate(ptrdiff_t count, const typename Inputs::a_element* const* a,
                             ptrdiff_t first, const typename Inputs::b_element* panel) {
    const typename Inputs::a_element* row[Rows];
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) row[r] = a[r] + first * Inputs::a_per_step;
#pragma GCC unroll steps_at_once
    for (ptrdiff_t i = 0; i < count; ++i) Inputs::multiply_add(row, i, panel + i * width, sums_);
  }

  /// float(tile[r][j]) * scale[j] + bias[j], with one rounding of the product and sum.
  HWY_INLINE register_tile<Rows, Vectors> scaled(const float* scale, const float* bias) const {
    const float_tag tag;
    register_tile<Rows, Vectors> out;
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < Vectors; ++v) {
      const vector factor = hn::Load(tag, scale + v * lanes);
      const vector addend = hn::Load(tag, bias + v * lanes);
#pragma GCC unroll 16
      for (ptrdiff_t r = 0; r < Rows; ++r)
        out.sums_[r][v] = mul_add(as_floats(sums_[r][v]), factor, addend);
    }
    return out;
  }

  /// tile[r][j] *= factor[r]
  HWY_INLINE void scale(const float (&factor)[Rows]) {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v)
        sums_[r][v] = hn::Mul(sums_[r][v], hn::Set(tag_, factor[r]));
  }

  /// out[r * out_stride + j] = tile[r][j]
  HWY_INLINE void store(Sum* out, ptrdiff_t out_stride) const {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) store_row(r, out + r * out_stride);
  }

  HWY_INLINE void store_row(ptrdiff_t r, Sum* out) const {
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < Vectors; ++v) hn::StoreU(sums_[r][v], tag_, out + v * lanes);
  }

  /// out[j] = tile[r][j] + addend[j]
  HWY_INLINE void store_row_plus(ptrdiff_t r, const float* addend, float* out) const {
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < Vectors; ++v)
      hn::StoreU(hn::Add(sums_[r][v], hn::LoadU(tag_, addend + v * lanes)), tag_, out + v * lanes);
  }

private:
  template <ptrdiff_t, ptrdiff_t, class>
  friend class register_tile;

  static HWY_INLINE vector as_floats(hn::Vec<hn::Rebind<Sum, float_tag>> v) {
    if constexpr (std::is_integral_v<Sum>)
      return hn::ConvertTo(float_tag(), v);
    else
      return v;
  }

  static constexpr hn::Rebind<Sum, float_tag> tag_{};
  hn::Vec<hn::Rebind<Sum, float_tag>> sums_[Rows][Vectors];
};

/// Half a panel: what is left of a matrix may need no more, and its sums take half the work.
inline constexpr ptrdiff_t half_panel = panel_width / 2;
static_assert(tile_vectors % 2 == 0 && half_panel % batch_lanes == 0);

/// Cuts n columns into panels and, where no more than half of one is left, half a panel: calls
/// f.template operator()<Vectors>(first column) for each.
template <class Function>
HWY_INLINE void for_panels(ptrdiff_t n, Function&& f) {
  ptrdiff_t j = 0;
  for (; j + half_panel < n; j += panel_width) f.template operator()<tile_vectors>(j);
  if (j < n) f.template operator()<tile_vectors / 2>(j);
}

/// Calls f with `rows` (1 to tile_rows) as a compile-time constant: f.template operator()<Rows>().
template <ptrdiff_t Rows = tile_rows, class Function>
HWY_INLINE void with_rows(ptrdiff_t rows, Function&& f) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return with_rows<Rows - 1>(rows, static_cast<Function&&>(f));
  }
  f.template operator()<Rows>();
}

/// Cuts m rows into as few tiles as there can be, of nearly equal heights, since low ones are slow:
/// calls f.template operator()<Rows>(first row) for each.
template <class Function>
HWY_INLINE void for_tiles(ptrdiff_t m, Function&& f) {
  const ptrdiff_t tiles = (m + tile_rows - 1) / tile_rows;
  for (ptrdiff_t i = 0, row = 0; i < tiles; ++i) {
    const ptrdiff_t end = m * (i + 1) / tiles;
    with_rows(end - row, [&]<ptrdiff_t Rows>() { f.template operator()<Rows>(row); });
    row = end;
  }
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
