/// What kernels do with Highway's vectors that Highway leaves open, or has no word for.
#pragma once

#include <cmath>
#include <cstdint>

#include "target.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

using vector = hn::Vec<float_tag>;
using bits_tag = hn::RebindToSigned<float_tag>;

/// a * b + c, with one rounding where target::fused. (Highway's scalar target rounds twice.)
template <class V>
HWY_INLINE V mul_add(V a, V b, V c) {
#if HWY_TARGET == HWY_SCALAR
  return V(std::fma(a.raw, b.raw, c.raw));
#else
  return hn::MulAdd(a, b, c);
#endif
}

/// To the nearest integer, ties to even. (Highway's scalar target makes 1 of the number before
/// 0.5.)
template <class V>
HWY_INLINE auto nearest_int(V x) {
#if HWY_TARGET == HWY_SCALAR
  return hn::ConvertTo(bits_tag(), V(std::nearbyint(x.raw)));
#else
  return hn::NearestInt(x);
#endif
}

/// Calls f(tag, i) with vectors, then with single lanes, until n elements are covered.
template <class Function>
HWY_INLINE void for_lanes(ptrdiff_t n, Function&& f) {
  ptrdiff_t i = 0;
  for (; i + lanes <= n; i += lanes) f(float_tag{}, i);
  for (; i < n; ++i) f(hn::CappedTag<float, 1>{}, i);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
