/// Whether results are to be equal to the bit.
#pragma once

#include <cstdint>

#include <kernels/active.hpp>
#include <microtome/bits.hpp>

#include "../support.hpp"

namespace microtome::tests {

/// Whether the target multiplies and adds with one rounding, as bf16 and int8 are defined.
inline bool has_fma() {
  return kernels::active().fused;
}

/// FNV-1a over the bits of floats.
inline std::uint64_t hash_of(view<const float> values) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const float v : values) hash = (hash ^ bit_cast<std::uint32_t>(v)) * 0x100000001b3;
  return hash;
}

}  // namespace microtome::tests
