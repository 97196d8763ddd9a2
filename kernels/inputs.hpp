/// What a product's factors are kept as: fp32, or bf16 in pairs along k, with sums in fp32.
/// (int8.hpp has the others.)
#pragma once

#include <cstdint>

#include "bf16.hpp"
#include "contract.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

struct fp32_inputs {
  using sum = float;
  using a_element = float;
  using b_element = float;  ///< of one step along k and one column
  static constexpr ptrdiff_t a_per_step = 1;
  static constexpr ptrdiff_t step = 1;     ///< elements of k in a step
  static constexpr bool converts = false;  ///< A is read where it lies

  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const float* const (&a)[Rows], ptrdiff_t i, const float* b,
                                      vector (&sums)[Rows][Vectors]) {
    const float_tag tag;
    vector column[Vectors];
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < Vectors; ++v) column[v] = hn::Load(tag, b + v * lanes);
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      const vector x = hn::Set(tag, a[r][i]);
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = mul_add(x, column[v], sums[r][v]);
    }
  }

  static b_element pack(const float (&x)[step]) {
    return x[0];
  }
  /// Rows of a panel as they were packed: nothing to do.
  static void finish_panel(ptrdiff_t, ptrdiff_t, float*) {}
};

struct bf16_inputs : bf16_products<target::bf16> {
  using sum = float;
  using b_element = std::uint32_t;  ///< elements 2i (lower half) and 2i + 1 of a column
  static constexpr ptrdiff_t step = 2;
  static constexpr bool converts = true;

  struct converter {
    explicit converter(const gemm_args&) {}
    void operator()(ptrdiff_t n, const float* x, a_element* row) const { convert_row(n, x, row); }
  };

  static b_element pack(const float (&x)[step]) { return pair_of(x[0], x[1]); }

  /// Makes pairs of the rows (n, width) of a panel in place; a missing last row counts as zeros.
  /// `width` is a multiple of lanes.
  static void finish_panel(ptrdiff_t n, ptrdiff_t width, float* panel) {
    const float_tag tag;
    const bits_tag bits;
    const hn::RebindToUnsigned<float_tag> unsigned_bits;
    auto* out = reinterpret_cast<std::int32_t*>(panel);
    for (ptrdiff_t i = 0; i < n; i += 2, out += width) {
      const float* low = panel + i * width;
      const float* high = low + width;
      for (ptrdiff_t j = 0; j < width; j += lanes) {
        const auto a = round_to_bf16(tag, hn::LoadU(tag, low + j));
        const auto b = i + 1 < n ? round_to_bf16(tag, hn::LoadU(tag, high + j)) : hn::Zero(bits);
        const auto shifted = hn::ShiftRight<16>(hn::BitCast(unsigned_bits, a));
        hn::StoreU(hn::Or(hn::BitCast(bits, shifted), b), bits, out + j);
      }
    }
  }
};

/// Steps along k that take n elements.
template <class Inputs>
constexpr ptrdiff_t steps(ptrdiff_t n) {
  return (n + Inputs::step - 1) / Inputs::step;
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
