/// Factors of 8 bits: quantised activations times whole-numbered weights with exact sums, and
/// weights alone. What they compute is said, to the bit, in contract.hpp.
///
/// Instructions differ in how many products they add into a lane at once, and so the packed orders
/// do, but exact sums do not:
///
///     4  vpdpbusd (AVX-512 VNNI), unsigned by signed: A as it is, and zero_point times the
///        column's sum subtracted; sdot (Arm), signed by signed: A less 128
///     2  vpmaddwd (x86), 16 by 16 bits: A less its zero point, B widened as it is loaded.
///        (vpmaddubsw takes bytes, but its 16-bit sums saturate.)
///     1  32-bit multiply-add
#pragma once

#include <cstdint>

#include "contract.hpp"
#include "inputs.hpp"

#if defined(__AVX512VNNI__) && (HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL)
#include <immintrin.h>
#define MICROTOME_INT8_STEP 4
#elif defined(__ARM_FEATURE_DOTPROD) && HWY_TARGET == HWY_NEON
#include <arm_neon.h>
#define MICROTOME_INT8_STEP 4
#elif HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR
#define MICROTOME_INT8_STEP 2
#else
#define MICROTOME_INT8_STEP 1
#endif

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// Quantises vectors of floats to whole numbers from -zero_point to 255 - zero_point.
class quantizer {
public:
  explicit quantizer(quantization q)
      : inverse_(1.0f / q.scale),
        least_(static_cast<float>(-q.zero_point)),
        most_(static_cast<float>(255 - q.zero_point)) {}

  template <class Tag>
  HWY_INLINE hn::Vec<hn::RebindToSigned<Tag>> operator()(Tag tag, const float* x) const {
    const auto scaled = hn::Mul(hn::LoadU(tag, x), hn::Set(tag, inverse_));
    return hn::NearestInt(hn::Min(hn::Max(scaled, hn::Set(tag, least_)), hn::Set(tag, most_)));
  }

private:
  float inverse_, least_, most_;
};

inline void quantize(ptrdiff_t n, const float* x, quantization to, float* out) {
  const quantizer quantized(to);
  for_lanes(n, [&](auto tag, ptrdiff_t i) {
    hn::StoreU(hn::ConvertTo(tag, quantized(tag, x + i)), tag, out + i);
  });
}

struct int8_inputs {
  using sum = std::int32_t;
  using sums_vector = hn::Vec<bits_tag>;
  static constexpr ptrdiff_t step = MICROTOME_INT8_STEP;
  static constexpr ptrdiff_t a_per_step = 1;
  static constexpr bool converts = true;
  static constexpr bool scaled = true;

#if MICROTOME_INT8_STEP == 4
  using a_element = std::uint32_t;  ///< 4 bytes
  using b_element = std::uint32_t;
  using factor_tag = hn::RebindToUnsigned<float_tag>;
  using factors = hn::Vec<factor_tag>;
  static HWY_INLINE factors broadcast(a_element a) {
    return hn::Set(factor_tag(), a);
  }
  static HWY_INLINE factors load_column(const b_element* b) {
    return hn::Load(factor_tag(), b);
  }
#if HWY_TARGET == HWY_NEON
  using a_byte = std::int8_t;
  /// What is missing of A, as it is multiplied, to A less its zero point.
  static constexpr int offset(quantization input) {
    return 128 - input.zero_point;
  }
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    return sums_vector(
        vdotq_s32(sum.raw, vreinterpretq_s8_u32(b.raw), vreinterpretq_s8_u32(a.raw)));
  }
#else
  using a_byte = std::uint8_t;
  static constexpr int offset(quantization input) {
    return -input.zero_point;
  }
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    return sums_vector{_mm512_dpbusd_epi32(sum.raw, a.raw, b.raw)};
  }
#endif
#elif MICROTOME_INT8_STEP == 2
  using a_element = std::uint32_t;  ///< two 16-bit numbers
  using b_element = std::uint16_t;  ///< two bytes
  using a_byte = std::int16_t;
  static constexpr int offset(quantization) {
    return 0;
  }
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
    sums_vector unused = hn::Zero(bits_tag());  // x86 adds pairs, and leaves this alone
    return hn::ReorderWidenMulAccumulate(bits_tag(), a, b, sum, unused);
  }
#else
  using a_element = std::int32_t;
  using b_element = std::int8_t;
  using a_byte = std::int32_t;
  static constexpr int offset(quantization) {
    return 0;
  }
  using factor_tag = bits_tag;
  using factors = sums_vector;
  static HWY_INLINE factors broadcast(a_element a) {
    return hn::Set(bits_tag(), a);
  }
  static HWY_INLINE factors load_column(const b_element* b) {
    const hn::Rebind<std::int8_t, bits_tag> bytes;
    return hn::PromoteTo(bits_tag(), hn::LoadU(bytes, b));
  }
  static HWY_INLINE sums_vector dot(sums_vector sum, factors a, factors b) {
    return hn::Add(sum, hn::Mul(a, b));
  }
#endif

  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const a_element* const (&a)[Rows], ptrdiff_t i,
                                      const b_element* b, sums_vector (&sums)[Rows][Vectors]) {
    factors column[Vectors];
#pragma GCC unroll 8
    for (ptrdiff_t v = 0; v < Vectors; ++v) column[v] = load_column(b + v * lanes);
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      const factors x = broadcast(a[r][i]);
#pragma GCC unroll 8
      for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = dot(sums[r][v], x, column[v]);
    }
  }

  static b_element pack(const float (&x)[step]) {
    b_element out = 0;
    for (ptrdiff_t i = 0; i < step; ++i)
      out = static_cast<b_element>(
          out | static_cast<b_element>(static_cast<std::uint8_t>(static_cast<std::int8_t>(x[i])))
                    << 8 * i);
    return out;
  }

  /// Makes rows of A of the form that is multiplied: quantised, less the zero point or by offset()
  /// more. What is missing of the last step meets zeros of B.
  class converter {
  public:
    explicit converter(const gemm_args& args)
        : quantized_(args.input), offset_(-offset(args.input)) {}

    void operator()(ptrdiff_t n, const float* x, a_element* row) const {
      auto* out = reinterpret_cast<a_byte*>(row);
      for_lanes(n, [&](auto tag, ptrdiff_t i) {
        const hn::RebindToSigned<decltype(tag)> whole;
        const auto q = hn::Sub(quantized_(tag, x + i), hn::Set(whole, -offset_));
        if constexpr (sizeof(a_byte) == 4) {
          hn::StoreU(q, whole, out + i);
        } else {
          const hn::Rebind<a_byte, decltype(tag)> narrow;
          hn::StoreU(hn::DemoteTo(narrow, q), narrow, out + i);
        }
      });
      for (ptrdiff_t i = n; i % step; ++i) out[i] = 0;
    }

  private:
    quantizer quantized_;
    int offset_;
  };
};

/// fp32 factors, of which B is kept as whole numbers: they become floats as they are loaded, which
/// the units beside the FMAs do meanwhile.
struct int8_weight_inputs : fp32_inputs {
  using b_element = std::int8_t;
  static constexpr bool scaled = true;

  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const float* const (&a)[Rows], ptrdiff_t i,
                                      const b_element* b, vector (&sums)[Rows][Vectors]) {
    const float_tag tag;
    const hn::Rebind<std::int8_t, float_tag> bytes;
    vector column[Vectors];
#pragma GCC unroll 8
    for (ptrdiff_t v = 0; v < Vectors; ++v)
      column[v] = hn::ConvertTo(tag, hn::PromoteTo(bits_tag(), hn::LoadU(bytes, b + v * lanes)));
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      const vector x = hn::Set(tag, a[r][i]);
#pragma GCC unroll 8
      for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = hn::MulAdd(x, column[v], sums[r][v]);
    }
  }

  static b_element pack(const float (&x)[1]) {
    return static_cast<b_element>(x[0]);
  }
};

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
