/// Whether results are to be equal to the bit.
#pragma once

#include <cstdint>
#include <string>

#include <kernels/active.hpp>
#include <microtome/core/bits.hpp>

#include "../support.hpp"

namespace microtome::tests {

/// Whether the target multiplies and adds with one rounding, as bf16 and int8 are defined.
inline bool has_fma() {
  return kernels::active().fused;
}

/// Says that a test is left out, or part of it.
inline void skip_without_fma() {
  MESSAGE("skipped: " << std::string(kernels::active().name) << " has no fused multiply-add");
}

/// What a sum of products of standard normal numbers may be off by in fp32. Partial sums grow with
/// the root of their number, and so does the rounding of each; without fused multiply-adds each
/// product is rounded, too.
inline double sum_tolerance(index_t products) {
  return (has_fma() ? 1.5e-7 : 2.5e-7) * static_cast<double>(products) + 3e-6;
}

/// FNV-1a over the bits of floats.
inline std::uint64_t hash_of(view<const float> values) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const float v : values) hash = (hash ^ bit_cast<std::uint32_t>(v)) * 0x100000001b3;
  return hash;
}

}  // namespace microtome::tests
