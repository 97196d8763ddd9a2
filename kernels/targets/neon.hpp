/// NEON: any 64-bit Arm CPU. Its batch, as that of the other Arm targets, is Highway's: xsimd 8
/// calls NEON through tables of functions, which are not inlined and have no target in their names.
///
/// processor: aarch64
/// gnu flags: -march=armv8-a
/// msvc flags:
#pragma once

#define MICROTOME_TARGET_NAMESPACE neon
#define MICROTOME_HIGHWAY_TARGET HWY_NEON

namespace microtome::kernels::neon {

struct target : any_target {
  static constexpr const char* name = "neon";
  static constexpr const char* description = "NEON (AArch64), 32 registers of 4 floats";
  static constexpr const char* needs = "asimd";
  static constexpr bool fused = true;
  static constexpr ptrdiff_t tile_rows = 12, tile_vectors = 2;
};

}  // namespace microtome::kernels::neon
