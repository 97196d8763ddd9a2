/// ReLU linear attention: see contract.hpp. Small beside the products around it, so it is made of
/// add_scaled, in which every element is on its own: bits do not depend on the vectors' width.
#pragma once

#include <algorithm>

#include "contract.hpp"
#include "elementwise.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline void linear_attention(const linear_attention_args& args) {
  const ptrdiff_t d = args.d;
  float* products = args.scratch;  // (d, d), the sum of k+ v^T
  float* keys = products + d * d;  // (d), the sum of k+
  std::fill_n(products, d * (d + 1), 0.0f);
  // A few rows of the sums at a time stay in L1 while all positions pass.
  constexpr ptrdiff_t rows = 4;
  for (ptrdiff_t first = 0; first < d; first += rows)
    for (ptrdiff_t j = 0; j < args.n; ++j)
      for (ptrdiff_t r = first; r < std::min(first + rows, d); ++r) {
        const float k = std::max(args.qkv[j][d + r], 0.0f);
        keys[r] += k;
        add_scaled(d, k, args.qkv[j] + 2 * d, products + r * d);
      }
  for (ptrdiff_t i = 0; i < args.n; ++i) {
    float* out = args.out[i];
    std::fill_n(out, d, 0.0f);
    batch normaliser(0.0f);
    for (ptrdiff_t r = 0; r < d; ++r) {
      const float q = std::max(args.qkv[i][r], 0.0f);
      normaliser = fused(batch(q), batch(keys[r]), normaliser);
      add_scaled(d, q, products + r * d, out);
    }
    const batch divisor = normaliser + batch(args.epsilon);
    map(d, out, out, [&](batch x) { return quotient(x, divisor); });
  }
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
