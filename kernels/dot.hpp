/// How lanes of 32 bits add up products of 8-bit numbers: which instruction, and the form it takes
/// its factors in. Instructions differ in how many products they add into a lane at once, and so
/// the packed orders do, but exact sums do not.
///
/// An int8_products has
///
///     step                   products a lane adds up at once
///     a_element, b_element   a step of a row of A, of a column of B
///     a_byte                 an element of A in a step
///     keeps_zero_point, less whether bytes of A still have their zero point in them, and what else
///                            is taken from them: both are made up for at the end
///     broadcast, load_column, dot    a step of A, lanes steps of B, sum + their products
#pragma once

#include "contract.hpp"
#include "lanes.hpp"

#if defined(__AVX512VNNI__) && HWY_TARGET == HWY_AVX3
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD) && HWY_TARGET == HWY_NEON
#include <arm_neon.h>
#endif

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

template <int8_dot>
struct int8_products;

/// A multiplication of 32 bits and an addition: any CPU.
template <>
struct int8_products<int8_dot::one> {
  static constexpr ptrdiff_t step = 1;
  using sums_vector = hn::Vec<bits_tag>;
  using a_element = std::int32_t;
  using b_element = std::int8_t;
  using a_byte = std::int32_t;
  static constexpr bool keeps_zero_point = false;
  static constexpr int less = 0;
  using factor_tag = bits_tag;
  using factors = sums_vector;
  static HWY_INLINE factors broadcast(a_element a) { return hn::Set(bits_tag(), a); }
  static HWY_INLINE factors load_column(const b_element* b) {
    const hn::Rebind<std::int8_t, bits_tag> bytes;
    return hn::PromoteTo(bits_tag(), hn::LoadU(bytes, b));
  }
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    return hn::Add(sum, hn::Mul(a, b));
  }
};

#if HWY_TARGET != HWY_SCALAR
/// vpmaddwd (x86) or i32x4.dot_i16x8_s (WebAssembly), 16 by 16 bits: A less its zero point, B
/// widened as it is loaded. (vpmaddubsw takes bytes, but its 16-bit sums saturate.)
template <>
struct int8_products<int8_dot::vpmaddwd> {
  static constexpr ptrdiff_t step = 2;
  using sums_vector = hn::Vec<bits_tag>;
  using a_element = std::uint32_t;  ///< two 16-bit numbers
  using b_element = std::uint16_t;  ///< two bytes
  using a_byte = std::int16_t;
  static constexpr bool keeps_zero_point = false;
  static constexpr int less = 0;
  using factor_tag = hn::Repartition<std::int16_t, float_tag>;
  using factors = hn::Vec<factor_tag>;
  static HWY_INLINE factors broadcast(a_element a) {
    return hn::BitCast(factor_tag(), hn::Set(bits_tag(), static_cast<std::int32_t>(a)));
  }
  static HWY_INLINE factors load_column(const b_element* b) {
    const hn::Rebind<std::int8_t, factor_tag> bytes;
    return hn::PromoteTo(factor_tag(), hn::Load(bytes, reinterpret_cast<const std::int8_t*>(b)));
  }
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    sums_vector unused = hn::Zero(bits_tag());  // these CPUs add pairs, and leave this alone
    return hn::ReorderWidenMulAccumulate(bits_tag(), a, b, sum, unused);
  }
};
#endif

/// Four bytes a lane.
struct int8_quads {
  static constexpr ptrdiff_t step = 4;
  using sums_vector = hn::Vec<bits_tag>;
  using a_element = std::uint32_t;  ///< 4 bytes
  using b_element = std::uint32_t;
  using factor_tag = hn::RebindToUnsigned<float_tag>;
  using factors = hn::Vec<factor_tag>;
  static HWY_INLINE factors broadcast(a_element a) { return hn::Set(factor_tag(), a); }
  static HWY_INLINE factors load_column(const b_element* b) { return hn::Load(factor_tag(), b); }
};

/// Unsigned by signed: A as it is.
struct unsigned_quads : int8_quads {
  using a_byte = std::uint8_t;
  static constexpr bool keeps_zero_point = true;
  static constexpr int less = 0;
};

#if defined(__AVX512VNNI__) && HWY_TARGET == HWY_AVX3
/// AVX-512 VNNI.
template <>
struct int8_products<int8_dot::vpdpbusd> : unsigned_quads {
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    return sums_vector{_mm512_dpbusd_epi32(sum.raw, a.raw, b.raw)};
  }
};
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8) && HWY_TARGET == HWY_NEON
/// Arm, i8mm.
template <>
struct int8_products<int8_dot::usdot> : unsigned_quads {
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    return sums_vector(
        vusdotq_s32(sum.raw, vreinterpretq_u8_u32(a.raw), vreinterpretq_s8_u32(b.raw)));
  }
};
#endif

#if defined(__ARM_FEATURE_DOTPROD) && HWY_TARGET == HWY_NEON
/// Arm, signed by signed: A less 128.
template <>
struct int8_products<int8_dot::sdot> : int8_quads {
  using a_byte = std::int8_t;
  static constexpr bool keeps_zero_point = true;
  static constexpr int less = 128;
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    return sums_vector(
        vdotq_s32(sum.raw, vreinterpretq_s8_u32(b.raw), vreinterpretq_s8_u32(a.raw)));
  }
};
#endif

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
