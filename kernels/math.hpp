/// exp, erf and what is made of them, over one xsimd batch. The constants come from
/// scripts/fit_maths.py; the errors in the comments are measured by tests/kernels/test_math.cpp.
#pragma once

#include "target.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// exp(x), for x from -87.3 (below: the value there, 1.2e-38) to 88. Relative error <= 2e-7.
///
/// exp(x) = 2^n exp(r) with n = round(x / log 2) and |r| <= log(2) / 2; log(2) is split in two so
/// that x - n log 2 is exact to the last bit (Cody and Waite, 1980).
inline batch exp_batch(batch x) {
  x = xsimd::min(xsimd::max(x, batch(-87.3f)), batch(88.0f));
  const batch n = xsimd::nearbyint(x * batch(1.44269504f));
  batch r = xsimd::fma(n, batch(-0.693359375f), x);
  r = xsimd::fma(n, batch(2.12194440e-4f), r);
  batch p(0.00138146121f);
  p = xsimd::fma(p, r, batch(0.00836871013f));
  p = xsimd::fma(p, r, batch(0.0416683874f));
  p = xsimd::fma(p, r, batch(0.166665207f));
  p = xsimd::fma(p, r, batch(0.499999935f));
  p = xsimd::fma(p * r, r, r) + batch(1.0f);
  return xsimd::ldexp(p, xsimd::to_int(n));
}

/// erf(z) as an odd rational function of degree 11 over 10, clamped to [-1, 1].
/// Absolute error <= 4e-7.
inline batch erf_batch(batch z) {
  z = xsimd::min(xsimd::max(z, batch(-3.85f)), batch(3.85f));  // erf(3.85) rounds to 1
  const batch t = z * z;
  batch p(2.1082701e-06f);
  p = xsimd::fma(p, t, batch(0.000285667141f));
  p = xsimd::fma(p, t, batch(0.00367372965f));
  p = xsimd::fma(p, t, batch(0.0524790675f));
  p = xsimd::fma(p, t, batch(0.187893455f));
  p = xsimd::fma(p, t, batch(1.12837915f));
  batch q(3.87314202e-05f);
  q = xsimd::fma(q, t, batch(0.00114544656f));
  q = xsimd::fma(q, t, batch(0.0147844896f));
  q = xsimd::fma(q, t, batch(0.113127137f));
  q = xsimd::fma(q, t, batch(0.499849115f));
  q = xsimd::fma(q, t, batch(1.0f));
  return xsimd::min(xsimd::max(z * p / q, batch(-1.0f)), batch(1.0f));
}

/// The exact GELU of Hendrycks and Gimpel (2016): x Phi(x) = x / 2 (1 + erf(x / sqrt 2)).
inline batch gelu_batch(batch x) {
  const batch half = x * batch(0.5f);
  return xsimd::fma(half, erf_batch(x * batch(0.707106781f)), half);
}

inline batch relu_batch(batch x) {
  return xsimd::max(x, batch(0.0f));
}

inline batch sigmoid_batch(batch x) {
  return batch(1.0f) / (batch(1.0f) + exp_batch(-x));
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
