/// Element-wise functions over arrays. Memory bound but for GELU and sigmoid (about 2 FMAs a byte).
#pragma once

#include <algorithm>

#include "contract.hpp"
#include "math.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// The first `count` < batch_lanes floats at x, then zeros.
inline batch load_first(ptrdiff_t count, const float* x) {
  alignas(64) float edge[static_cast<size_t>(batch_lanes)] = {};
  for (ptrdiff_t j = 0; j < std::min(count, batch_lanes); ++j) edge[j] = x[j];
  return batch::load_aligned(edge);
}

/// Stores the first `count` < batch_lanes floats of v.
inline void store_first(ptrdiff_t count, batch v, float* out) {
  alignas(64) float edge[static_cast<size_t>(batch_lanes)];
  v.store_aligned(edge);
  for (ptrdiff_t j = 0; j < std::min(count, batch_lanes); ++j) out[j] = edge[j];
}

/// out[i] = f(x[i]) for n floats. Every element takes the same arithmetic wherever it lies.
template <class Function>
inline void map(ptrdiff_t n, const float* x, float* out, Function f) {
  ptrdiff_t i = 0;
  for (; i + batch_lanes <= n; i += batch_lanes)
    f(batch::load_unaligned(x + i)).store_unaligned(out + i);
  if (i < n) store_first(n - i, f(load_first(n - i, x + i)), out + i);
}

template <activation Act>
inline batch apply_batch(batch x) {
  if constexpr (Act == activation::gelu) return gelu_batch(x);
  if constexpr (Act == activation::gelu_tanh) return gelu_tanh_batch(x);
  if constexpr (Act == activation::relu) return relu_batch(x);
  return x;
}

/// Calls f.template operator()<Act>() with `act` as a compile-time constant.
template <class Function>
HWY_INLINE void with_activation(activation act, Function&& f) {
  switch (act) {
    case activation::none:
      return f.template operator()<activation::none>();
    case activation::relu:
      return f.template operator()<activation::relu>();
    case activation::gelu:
      return f.template operator()<activation::gelu>();
    case activation::gelu_tanh:
      return f.template operator()<activation::gelu_tanh>();
  }
}

inline void activate(activation act, ptrdiff_t n, const float* x, float* out) {
  if (act == activation::none && x == out) return;
  with_activation(act, [&]<activation Act>() { map(n, x, out, apply_batch<Act>); });
}

inline void sigmoid(ptrdiff_t n, const float* x, float* out) {
  map(n, x, out, [](batch v) { return sigmoid_batch(v); });
}

inline void add(ptrdiff_t n, const float* a, const float* b, float* out) {
  ptrdiff_t i = 0;
  for (; i + batch_lanes <= n; i += batch_lanes)
    (batch::load_unaligned(a + i) + batch::load_unaligned(b + i)).store_unaligned(out + i);
  for (; i < n; ++i) out[i] = a[i] + b[i];
}

inline void add_scaled(ptrdiff_t n, float factor, const float* x, float* out) {
  const batch scale(factor);
  ptrdiff_t i = 0;
  for (; i + batch_lanes <= n; i += batch_lanes)
    fused(scale, batch::load_unaligned(x + i), batch::load_unaligned(out + i))
        .store_unaligned(out + i);
  if (i < n)
    store_first(n - i, fused(scale, load_first(n - i, x + i), load_first(n - i, out + i)), out + i);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
