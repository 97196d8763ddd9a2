/// exp, GELU and the like, over one xsimd batch. The constants come from scripts/fit_maths.py; the
/// errors in the comments are those that tests/kernels/elementwise.cpp allows.
#pragma once

#include "target.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// exp(x), for x from -87.3 (below: the value there, 1.2e-38) to 88. Relative error <= 2e-7.
///
/// exp(x) = 2^n exp(r) with n = round(x / log 2) and |r| <= log(2) / 2; log(2) is split in two so
/// that x - n log 2 is exact to the last bit (Cody and Waite, 1980).
inline batch exp_batch(batch x) {
  x = min(max(x, batch(-87.3f)), batch(88.0f));
  const batch n = nearbyint(x * batch(1.44269504f));
  batch r = fused(n, batch(-0.693359375f), x);
  r = fused(n, batch(2.12194440e-4f), r);
  batch p(0.00138146132f);
  p = fused(p, r, batch(0.00836870993f));
  p = fused(p, r, batch(0.0416683874f));
  p = fused(p, r, batch(0.166665207f));
  p = fused(p, r, batch(0.499999935f));
  p = fused(p * r, r, r) + batch(1.0f);
  return ldexp(p, to_int(n));
}

/// The exact GELU of Hendrycks and Gimpel (2016): x Phi(x), with Phi(x) - 1/2 as an odd rational
/// function of degree 9 over 10 up to |x| = 5.2, where Phi is 1e-7 from 0 or 1, and constant
/// beyond. Error <= 3e-7 max(1, |x|).
inline batch gelu_batch(batch x) {
  const batch c = min(max(x, batch(-5.2f)), batch(5.2f));
  const batch t = c * c;
  batch p(6.11374579e-06f);
  p = fused(p, t, batch(0.000329196452f));
  p = fused(p, t, batch(0.00560821416f));
  p = fused(p, t, batch(0.0508828563f));
  p = fused(p, t, batch(0.398941451f));
  batch q(5.224986e-07f);
  q = fused(q, t, batch(0.00011848076f));
  q = fused(q, t, batch(0.00278556765f));
  q = fused(q, t, batch(0.0381067108f));
  q = fused(q, t, batch(0.29420128f));
  q = fused(q, t, batch(1.0f));
  return fused(x, quotient(c * p, q), x * batch(0.5f));
}

/// GELU's approximation by tanh, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as
/// x / (1 + exp(-2 u)). Error <= 3e-7 max(1, |x|).
inline batch gelu_tanh_batch(batch x) {
  const batch t = x * x;
  const batch factor = fused(t, batch(-0.0713548162726f), batch(-1.59576912161f));
  return quotient(x, batch(1.0f) + exp_batch(x * factor));
}

inline batch relu_batch(batch x) {
  return max(x, batch(0.0f));
}

inline batch sigmoid_batch(batch x) {
  return quotient(batch(1.0f), batch(1.0f) + exp_batch(-x));
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
