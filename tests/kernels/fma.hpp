/// Whether results are to be equal to the bit.
#pragma once

#include <kernels/active.hpp>

#include "../support.hpp"

namespace microtome::tests {

/// Whether the target multiplies and adds with one rounding, as bf16 and int8 are defined.
inline bool has_fma() {
  return kernels::active().fused;
}

}  // namespace microtome::tests
