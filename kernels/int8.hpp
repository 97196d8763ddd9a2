/// Factors of 8 bits: quantised activations times whole-numbered weights with exact sums, and
/// weights alone. What they compute is said, to the bit, in contract.hpp.
#pragma once

#include <cstdint>

#include "contract.hpp"
#include "dot.hpp"
#include "inputs.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// Floats as whole numbers from -zero_point to 255 - zero_point.
template <class Tag>
HWY_INLINE hn::Vec<hn::RebindToSigned<Tag>> quantized(Tag tag, hn::Vec<Tag> x, hn::Vec<Tag> inverse,
                                                      hn::Vec<Tag> zero_point) {
  const auto least = hn::Neg(zero_point);
  const auto most = hn::Sub(hn::Set(tag, 255.0f), zero_point);
  return nearest_int(hn::Min(hn::Max(hn::Mul(x, inverse), least), most));
}

inline void quantize(ptrdiff_t rows, ptrdiff_t channels, const float* x, channel_quantization to,
                     float* out) {
  for (ptrdiff_t i = 0; i < rows; ++i, x += channels, out += channels)
    for_lanes(channels, [&](auto tag, ptrdiff_t c) {
      const auto whole = quantized(tag, hn::LoadU(tag, x + c), hn::LoadU(tag, to.inverse + c),
                                   hn::LoadU(tag, to.zero_point + c));
      hn::StoreU(hn::ConvertTo(tag, whole), tag, out + c);
    });
}

/// Whole numbers, multiplied and added as Products does.
template <class Products>
struct whole_inputs : Products {
  using typename Products::a_byte;
  using typename Products::a_element;
  using typename Products::b_element;
  using typename Products::sums_vector;
  using sum = std::int32_t;
  static constexpr ptrdiff_t a_per_step = 1;

  template <ptrdiff_t Rows, ptrdiff_t Vectors>
  static HWY_INLINE void multiply_add(const a_element* const (&a)[Rows], ptrdiff_t i,
                                      const b_element* b, sums_vector (&sums)[Rows][Vectors]) {
    typename Products::factors column[Vectors];
#pragma GCC unroll 8
    for (ptrdiff_t v = 0; v < Vectors; ++v) column[v] = Products::load_column(b + v * lanes);
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < Rows; ++r) {
      const typename Products::factors x = Products::broadcast(a[r][i]);
#pragma GCC unroll 8
      for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = Products::dot(sums[r][v], x, column[v]);
    }
  }

  /// Makes rows of A of the form that is multiplied: quantised, but for what is `missing`. What is
  /// missing of the last step meets zeros of B.
  class converter {
  public:
    explicit converter(const gemm_args& args) : converter(args.input) {}
    explicit converter(channel_quantization input) : input_(input) {}

    void operator()(ptrdiff_t n, const float* x, a_element* row) const {
      auto* out = reinterpret_cast<a_byte*>(row);
      for_lanes(n, [&](auto tag, ptrdiff_t i) {
        const hn::RebindToSigned<decltype(tag)> whole;
        const auto zero_point = hn::LoadU(tag, input_.zero_point + i);
        auto q =
            quantized(tag, hn::LoadU(tag, x + i), hn::LoadU(tag, input_.inverse + i), zero_point);
        if constexpr (Products::keeps_zero_point) q = hn::Add(q, hn::ConvertTo(whole, zero_point));
        if constexpr (Products::less != 0) q = hn::Sub(q, hn::Set(whole, Products::less));
        if constexpr (sizeof(a_byte) == 4) {
          hn::StoreU(q, whole, out + i);
        } else {
          const hn::Rebind<a_byte, decltype(tag)> narrow;
          hn::StoreU(hn::DemoteTo(narrow, q), narrow, out + i);
        }
      });
      for (ptrdiff_t i = n; i % Products::step; ++i) out[i] = 0;
    }

  private:
    channel_quantization input_;
  };
};

struct int8_inputs : whole_inputs<int8_products<target::int8>> {
  static constexpr bool converts = true;
  static constexpr bool scaled = true;

  static b_element pack(const float (&x)[step]) {
    b_element out = 0;
    for (ptrdiff_t i = 0; i < step; ++i)
      out = static_cast<b_element>(
          out | static_cast<b_element>(static_cast<std::uint8_t>(static_cast<std::int8_t>(x[i])))
                    << 8 * i);
    return out;
  }

  /// What is missing of an element of A, as it is multiplied, to A less its zero point.
  static constexpr int missing(int zero_point) {
    return int8_inputs::less - (int8_inputs::keeps_zero_point ? zero_point : 0);
  }
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
      for (ptrdiff_t v = 0; v < Vectors; ++v) sums[r][v] = mul_add(x, column[v], sums[r][v]);
    }
  }

  static b_element pack(const float (&x)[1]) {
    return static_cast<b_element>(x[0]);
  }
};

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
