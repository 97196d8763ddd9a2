/// What a product's factors are kept as: fp32, or bf16 in pairs along k, with sums in fp32.
/// (int8.hpp has the others.)
///
/// bf16 is the upper half of a float (8 bits of mantissa). A dot-product instruction takes a pair
/// of products per lane, the odd one of the pair first (Intel SDM, VDPBF16PS):
///
///     sum = fma(a[2i + 1], b[2i + 1], sum), then sum = fma(a[2i], b[2i], sum)
///
/// A product of two bf16 numbers is exact in fp32, so that targets without the instruction do the
/// same in two FMAs and get the same bits; only the instruction takes sums below 2^-126 for zero.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "contract.hpp"
#include "target.hpp"

#if defined(__AVX512BF16__) && (HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL)
#include <immintrin.h>
#define MICROTOME_HAS_BF16_DOT 1
#else
#define MICROTOME_HAS_BF16_DOT 0
#endif

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

using vector = hn::Vec<float_tag>;
using bits_tag = hn::RebindToSigned<float_tag>;

/// The nearest bf16 number, ties to even, in the upper half; numbers below 2^-126 become zero, as
/// the conversion instructions of the CPUs have it, and NaN stays NaN.
template <class Tag>
HWY_INLINE hn::Vec<hn::RebindToSigned<Tag>> round_to_bf16(Tag, hn::Vec<Tag> x) {
  const hn::RebindToSigned<Tag> bits;
  const auto u = hn::BitCast(bits, x);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(bits, 1));
  const auto rounded = hn::Add(u, hn::Add(odd, hn::Set(bits, 0x7fff)));
  const auto size = hn::And(u, hn::Set(bits, 0x7fffffff));
  const auto infinity = hn::Set(bits, 0x7f800000);
  const auto number =
      hn::IfThenElse(hn::Gt(size, infinity), hn::Or(u, hn::Set(bits, 0x400000)), rounded);
  const auto kept = hn::IfThenElse(hn::Lt(size, hn::Set(bits, 0x00800000)),
                                   hn::AndNot(hn::Set(bits, 0x7fffffff), u), number);
  return hn::And(kept, hn::Set(bits, static_cast<std::int32_t>(0xffff0000)));
}

/// Calls f(tag, i) with vectors, then with single lanes, until n elements are covered.
template <class Function>
HWY_INLINE void for_lanes(ptrdiff_t n, Function&& f) {
  ptrdiff_t i = 0;
  for (; i + lanes <= n; i += lanes) f(float_tag{}, i);
  for (; i < n; ++i) f(hn::CappedTag<float, 1>{}, i);
}

struct fp32_inputs {
  using sum = float;
  using a_element = float;
  using b_element = float;  ///< of one step along k and one column
  static constexpr ptrdiff_t a_per_step = 1;
  static constexpr ptrdiff_t step = 1;     ///< elements of k in a step
  static constexpr bool converts = false;  ///< A is read where it lies
  static constexpr bool scaled = false;    ///< B is whole numbers, to be scaled

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
      for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = hn::MulAdd(x, column[v], sums[r][v]);
    }
  }

  static b_element pack(const float (&x)[step]) {
    return x[0];
  }
  /// Rows of a panel as they were packed: nothing to do.
  static void finish_panel(ptrdiff_t, ptrdiff_t, float*) {}
};

struct bf16_inputs {
  using sum = float;
  using b_element = std::uint32_t;  ///< elements 2i (lower half) and 2i + 1 of a column
  static constexpr ptrdiff_t step = 2;
  static constexpr bool converts = true;
  static constexpr bool scaled = false;

#if MICROTOME_HAS_BF16_DOT
  using a_element = std::uint32_t;  ///< elements 2i and 2i + 1 of a row
  static constexpr ptrdiff_t a_per_step = 1;

  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const a_element* const (&a)[Rows], ptrdiff_t i,
                                      const b_element* b, vector (&sums)[Rows][Vectors]) {
    __m512bh column[Vectors];
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < Vectors; ++v)
      column[v] = std::bit_cast<__m512bh>(_mm512_load_si512(b + v * lanes));
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      const auto x = std::bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[r][i])));
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v)
        sums[r][v].raw = _mm512_dpbf16_ps(sums[r][v].raw, column[v], x);
    }
  }

  /// n floats as pairs, and a zero after an odd number. `out` may be x.
  static void convert_row(ptrdiff_t n, const float* x, a_element* out) {
    const float_tag tag;
    ptrdiff_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      const auto low = round_to_bf16(tag, hn::LoadU(tag, x + i));
      const auto high = round_to_bf16(tag, hn::LoadU(tag, x + i + lanes));
      const hn::Repartition<std::uint16_t, float_tag> half;
      const auto packed = hn::ConcatOdd(half, hn::BitCast(half, high), hn::BitCast(half, low));
      hn::StoreU(packed, half, reinterpret_cast<std::uint16_t*>(out) + i);
    }
    for (; i < n; i += 2) out[i / 2] = pair_of(x[i], i + 1 < n ? x[i + 1] : 0.0f);
  }
#else
  using a_element = float;  ///< already rounded
  static constexpr ptrdiff_t a_per_step = 2;

  /// One half of the pairs after the other, which needs no more registers than fp32 does.
  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const a_element* const (&a)[Rows], ptrdiff_t i,
                                      const b_element* b, vector (&sums)[Rows][Vectors]) {
    const float_tag tag;
    const bits_tag bits;
    const auto* pairs = reinterpret_cast<const std::int32_t*>(b);
#pragma GCC unroll 2
    for (ptrdiff_t half = 1; half >= 0; --half) {
      vector column[Vectors];
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v) {
        const auto pair = hn::Load(bits, pairs + v * lanes);
        const auto upper = hn::Set(bits, static_cast<std::int32_t>(0xffff0000));
        column[v] = hn::BitCast(tag, half ? hn::And(pair, upper) : hn::ShiftLeft<16>(pair));
      }
#pragma GCC unroll 16
      for (ptrdiff_t r = 0; r < Rows; ++r) {
        const vector x = hn::Set(tag, a[r][2 * i + half]);
#pragma GCC unroll 2
        for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = hn::MulAdd(x, column[v], sums[r][v]);
      }
    }
  }

  /// n floats rounded, and a zero after an odd number. `out` may be x.
  static void convert_row(ptrdiff_t n, const float* x, a_element* out) {
    for_lanes(n, [&](auto tag, ptrdiff_t i) {
      hn::StoreU(hn::BitCast(tag, round_to_bf16(tag, hn::LoadU(tag, x + i))), tag, out + i);
    });
    if (n % 2) out[n] = 0.0f;
  }
#endif

  struct converter {
    explicit converter(const gemm_args&) {}
    void operator()(ptrdiff_t n, const float* x, a_element* row) const { convert_row(n, x, row); }
  };

  static b_element pack(const float (&x)[step]) {
    return pair_of(x[0], x[1]);
  }
  static std::uint32_t pair_of(float low, float high) {
    const hn::CappedTag<float, 1> one;
    const auto bits = [&](float x) {
      return static_cast<std::uint32_t>(hn::GetLane(round_to_bf16(one, hn::Set(one, x))));
    };
    return bits(low) >> 16 | bits(high);
  }

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
