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
  if constexpr (Act == activation::relu) return relu_batch(x);
  return x;
}

inline void activate(activation act, ptrdiff_t n, const float* x, float* out) {
  switch (act) {
    case activation::gelu:
      return map(n, x, out, [](batch v) { return gelu_batch(v); });
    case activation::relu:
      return map(n, x, out, [](batch v) { return relu_batch(v); });
    case activation::none:
      if (x != out) map(n, x, out, [](batch v) { return v; });
  }
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

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
