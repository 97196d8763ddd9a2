/// Refuses relaxed arithmetic. With it compilers drop the checks for NaN and infinite weights,
/// reorder sums and divide by multiplying, so that neither the bits that contract.hpp promises nor
/// the protection from damaged files would be left. Nothing is gained, either: the kernels say
/// themselves where products and sums are fused, and in which order they are added.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(_M_FP_FAST)
#error "microtome computes defined bits: compile this file without -ffast-math, -Ofast or /fp:fast"
#endif
