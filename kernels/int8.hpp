/// Factors of 8 bits: quantised activations times whole-numbered weights with exact sums, and
/// weights alone. What they compute is said, to the bit, in contract.hpp.
#pragma once

#include <cstdint>

#include "contract.hpp"
#include "dot.hpp"
#include "inputs.hpp"

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
    return nearest_int(hn::Min(hn::Max(scaled, hn::Set(tag, least_)), hn::Set(tag, most_)));
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

struct int8_inputs : int8_products<target::int8> {
  using sum = std::int32_t;
  static constexpr ptrdiff_t a_per_step = 1;
  static constexpr bool converts = true;

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

/// fp32 factors, of which B is kept as whole numbers. A piece of it becomes floats in L1 before a
/// block of rows is multiplied with it.
struct int8_weight_inputs : fp32_inputs {
  using b_element = std::int8_t;

  static b_element pack(const float (&x)[1]) { return static_cast<b_element>(x[0]); }

  /// `count` rows of a panel, times the scales of their columns.
  static void expand(ptrdiff_t count, const b_element* piece, const float* scale, float* out) {
    const float_tag tag;
    const hn::Rebind<std::int8_t, float_tag> bytes;
    vector factor[tile_vectors];
    for (ptrdiff_t v = 0; v < tile_vectors; ++v) factor[v] = hn::Load(tag, scale + v * lanes);
#pragma GCC unroll 4
    for (ptrdiff_t i = 0; i < count; ++i)
#pragma GCC unroll 8
      for (ptrdiff_t v = 0; v < tile_vectors; ++v) {
        const ptrdiff_t at = i * panel_width + v * lanes;
        const auto whole = hn::PromoteTo(bits_tag(), hn::LoadU(bytes, piece + at));
        hn::Store(hn::Mul(hn::ConvertTo(tag, whole), factor[v]), tag, out + at);
      }
  }
};

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
