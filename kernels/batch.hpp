/// The vector of element-wise maths: xsimd's, where xsimd knows the target, or one with the same
/// words over Highway's.
#pragma once

#include "lanes.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// What math.hpp and its users need of xsimd::batch<float>, in Highway's operations.
struct highway_batch {
  static constexpr std::size_t size = static_cast<std::size_t>(lanes);
  vector data;

  highway_batch() = default;
  explicit HWY_INLINE highway_batch(vector v) : data(v) {}
  explicit HWY_INLINE highway_batch(float x) : data(hn::Set(float_tag(), x)) {}

  static HWY_INLINE highway_batch load_aligned(const float* x) {
    return highway_batch(hn::Load(float_tag(), x));
  }
  static HWY_INLINE highway_batch load_unaligned(const float* x) {
    return highway_batch(hn::LoadU(float_tag(), x));
  }
  HWY_INLINE void store_aligned(float* out) const { hn::Store(data, float_tag(), out); }
  HWY_INLINE void store_unaligned(float* out) const { hn::StoreU(data, float_tag(), out); }

  using mask = decltype(hn::Lt(vector(), vector()));
  using integers = hn::Vec<bits_tag>;

  friend HWY_INLINE highway_batch operator+(highway_batch a, highway_batch b) {
    return highway_batch(hn::Add(a.data, b.data));
  }
  friend HWY_INLINE highway_batch operator-(highway_batch a, highway_batch b) {
    return highway_batch(hn::Sub(a.data, b.data));
  }
  friend HWY_INLINE highway_batch operator*(highway_batch a, highway_batch b) {
    return highway_batch(hn::Mul(a.data, b.data));
  }
  friend HWY_INLINE highway_batch operator/(highway_batch a, highway_batch b) {
    return highway_batch(hn::Div(a.data, b.data));
  }
  friend HWY_INLINE highway_batch operator-(highway_batch a) {
    return highway_batch(hn::Neg(a.data));
  }
  HWY_INLINE highway_batch& operator+=(highway_batch b) { return *this = *this + b; }
  friend HWY_INLINE mask operator<(highway_batch a, highway_batch b) {
    return hn::Lt(a.data, b.data);
  }
  friend HWY_INLINE highway_batch select(mask m, highway_batch yes, highway_batch no) {
    return highway_batch(hn::IfThenElse(m, yes.data, no.data));
  }
  friend HWY_INLINE highway_batch min(highway_batch a, highway_batch b) {
    return highway_batch(hn::Min(a.data, b.data));
  }
  friend HWY_INLINE highway_batch max(highway_batch a, highway_batch b) {
    return highway_batch(hn::Max(a.data, b.data));
  }
  /// Of numbers below 2^31.
  friend HWY_INLINE highway_batch nearbyint(highway_batch x) {
    return highway_batch(hn::ConvertTo(float_tag(), nearest_int(x.data)));
  }
  friend HWY_INLINE integers to_int(highway_batch x) { return hn::ConvertTo(bits_tag(), x.data); }
  /// x * 2^n for -126 <= n <= 127.
  friend HWY_INLINE highway_batch ldexp(highway_batch x, integers n) {
    const auto exponent = hn::Add(n, hn::Set(bits_tag(), 127));
    return highway_batch(hn::Mul(x.data, hn::BitCast(float_tag(), hn::ShiftLeft<23>(exponent))));
  }
};

using batch = std::conditional_t<std::is_void_v<target::batch>, highway_batch, target::batch>;
inline constexpr ptrdiff_t batch_lanes = static_cast<ptrdiff_t>(batch::size);
static_assert(panel_width % batch_lanes == 0);

/// a * b + c, with one rounding where target::fused. (xsimd 8's own fma rounds twice on AVX-512.)
template <class Batch>
HWY_INLINE Batch fused(Batch a, Batch b, Batch c) {
  if constexpr (std::is_same_v<Batch, highway_batch>)
    return Batch(mul_add(a.data, b.data, c.data));
  else
    return Batch(mul_add(vector{a.data}, vector{b.data}, vector{c.data}).raw);
}

/// a / b, rounded once. (xsimd 8's own division is two steps of Newton's on Arm.)
template <class Batch>
HWY_INLINE Batch quotient(Batch a, Batch b) {
  if constexpr (std::is_same_v<Batch, highway_batch>)
    return a / b;
  else
    return Batch(hn::Div(vector{a.data}, vector{b.data}).raw);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
