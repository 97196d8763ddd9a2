/// bf16 is the upper half of a float (8 bits of mantissa). Products of it are added in pairs along
/// k, the odd one of a pair first, as a dot-product instruction does in a lane (Intel SDM,
/// VDPBF16PS):
///
///     sum = fma(a[2i + 1], b[2i + 1], sum), then sum = fma(a[2i], b[2i], sum)
///
/// A product of two bf16 numbers is exact in fp32, so that targets without instructions for it do
/// the same in two FMAs and get the same bits; only VDPBF16PS takes sums below 2^-126 for zero.
/// (Arm's BFDOT and BFMMLA round otherwise; its BFMLALT and BFMLALB are those two FMAs.)
#pragma once

#include <bit>

#include "lanes.hpp"

#if defined(__AVX512BF16__) && HWY_TARGET == HWY_AVX3
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && HWY_TARGET == HWY_NEON
#include <arm_neon.h>
#endif

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

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

/// Two floats rounded, the first in the lower half.
inline std::uint32_t pair_of(float low, float high) {
  const hn::CappedTag<float, 1> one;
  const auto bits = [&](float x) {
    return static_cast<std::uint32_t>(hn::GetLane(round_to_bf16(one, hn::Set(one, x))));
  };
  return bits(low) >> 16 | bits(high);
}

/// How products of pairs are added: the form a row of A takes, and multiply_add as register_tile
/// has it.
template <bf16_dot>
struct bf16_products;

/// Two FMAs a pair.
template <>
struct bf16_products<bf16_dot::none> {
  using a_element = float;  ///< already rounded
  static constexpr ptrdiff_t a_per_step = 2;

  /// One half of the pairs after the other, which needs no more registers than fp32 does.
  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const a_element* const (&a)[Rows], ptrdiff_t i,
                                      const std::uint32_t* b, vector (&sums)[Rows][Vectors]) {
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
        for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = mul_add(x, column[v], sums[r][v]);
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
};

#if HWY_TARGET != HWY_SCALAR
/// A as pairs.
struct bf16_pairs {
  using a_element = std::uint32_t;  ///< elements 2i and 2i + 1 of a row
  static constexpr ptrdiff_t a_per_step = 1;

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
};
#endif

#if defined(__AVX512BF16__) && HWY_TARGET == HWY_AVX3
template <>
struct bf16_products<bf16_dot::vdpbf16ps> : bf16_pairs {
  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const a_element* const (&a)[Rows], ptrdiff_t i,
                                      const std::uint32_t* b, vector (&sums)[Rows][Vectors]) {
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
};
#endif

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && HWY_TARGET == HWY_NEON
template <>
struct bf16_products<bf16_dot::bfmlal> : bf16_pairs {
  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const a_element* const (&a)[Rows], ptrdiff_t i,
                                      const std::uint32_t* b, vector (&sums)[Rows][Vectors]) {
    bfloat16x8_t column[Vectors];
#pragma GCC unroll 2
    for (ptrdiff_t v = 0; v < Vectors; ++v)
      column[v] = vreinterpretq_bf16_u32(vld1q_u32(b + v * lanes));
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      const bfloat16x8_t x = vreinterpretq_bf16_u32(vdupq_n_u32(a[r][i]));
#pragma GCC unroll 2
      for (ptrdiff_t v = 0; v < Vectors; ++v)
        sums[r][v].raw = vbfmlalbq_f32(vbfmlaltq_f32(sums[r][v].raw, column[v], x), column[v], x);
    }
  }
};
#endif

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
