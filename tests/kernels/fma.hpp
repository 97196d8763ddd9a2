/// Whether results are to be equal to the bit.
#pragma once

#include <string>

#include <kernels/table.hpp>

#include "../support.hpp"

namespace microtome::tests {

/// Whether the target multiplies and adds with one rounding, as bf16 and int8 are defined.
inline bool has_fma() {
  const std::string name = kernels::active().name;
  return name != "sse4" && name != "ssse3" && name != "portable";
}

}  // namespace microtome::tests
