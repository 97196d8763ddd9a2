/// The micro-kernel that GEMM and attention share: a register tile of sums, an outer product per k.
#pragma once

#include "target.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

using vector = hn::Vec<float_tag>;

/// Packs up to panel_width columns of a (k, n) matrix, element (i, j) at b[i * row_stride +
/// j * column_stride], into panel[i][panel_width]; missing columns become zeros.
inline void pack_panel(ptrdiff_t k, ptrdiff_t columns, const float* b, ptrdiff_t row_stride,
                       ptrdiff_t column_stride, float* panel) {
  for (ptrdiff_t i = 0; i < k; ++i) {
    for (ptrdiff_t j = 0; j < columns; ++j) panel[j] = b[i * row_stride + j * column_stride];
    for (ptrdiff_t j = columns; j < panel_width; ++j) panel[j] = 0.0f;
    panel += panel_width;
  }
}

/// A tile of Rows x panel_width sums in registers:
///
///     tile[r][j] = start[r * start_stride + j] + sum over i < k of a[r][i] * panel[i][j]
///
/// `panel` is 64-byte aligned. Per step of k it loads tile_vectors vectors of B, broadcasts Rows
/// elements of A and issues Rows * tile_vectors FMAs: compute bound as long as the panel is in L1.
template <ptrdiff_t Rows>
class register_tile {
public:
  HWY_INLINE void load(const float* start, ptrdiff_t start_stride) {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < tile_vectors; ++v)
        sums_[r][v] = hn::LoadU(tag_, start + r * start_stride + v * lanes);
  }

  HWY_INLINE void clear() {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < tile_vectors; ++v) sums_[r][v] = hn::Zero(tag_);
  }

  HWY_INLINE void accumulate(ptrdiff_t k, const float* const* a, ptrdiff_t offset,
                             const float* panel) {
    const float* row[Rows];
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) row[r] = a[r] + offset;
#pragma GCC unroll 2
    for (ptrdiff_t i = 0; i < k; ++i) {
      vector b[tile_vectors];
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < tile_vectors; ++v)
        b[v] = hn::Load(tag_, panel + i * panel_width + v * lanes);
#pragma GCC unroll 16
      for (ptrdiff_t r = 0; r < Rows; ++r) {
        const vector x = hn::Set(tag_, row[r][i]);
#pragma GCC unroll 2
        for (ptrdiff_t v = 0; v < tile_vectors; ++v) sums_[r][v] = hn::MulAdd(x, b[v], sums_[r][v]);
      }
    }
  }

  /// out[r * out_stride + j] = tile[r][j]
  HWY_INLINE void store(float* out, ptrdiff_t out_stride) const {
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) store_row(r, out + r * out_stride);
  }

  HWY_INLINE void store_row(ptrdiff_t r, float* out) const {
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < tile_vectors; ++v) hn::StoreU(sums_[r][v], tag_, out + v * lanes);
  }

  /// out[j] = tile[r][j] + addend[j]
  HWY_INLINE void store_row_plus(ptrdiff_t r, const float* addend, float* out) const {
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < tile_vectors; ++v)
      hn::StoreU(hn::Add(sums_[r][v], hn::LoadU(tag_, addend + v * lanes)), tag_, out + v * lanes);
  }

private:
  static constexpr float_tag tag_{};
  vector sums_[Rows][tile_vectors];
};

/// Calls f with `rows` (1 to tile_rows) as a compile-time constant: f.template operator()<Rows>().
template <ptrdiff_t Rows = tile_rows, class Function>
HWY_INLINE void with_rows(ptrdiff_t rows, Function&& f) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return with_rows<Rows - 1>(rows, static_cast<Function&&>(f));
  }
  f.template operator()<Rows>();
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
