/// NEON with dot products of bytes: Arm from Cortex-A75 and Neoverse N1 (2018), Apple from A13 and
/// M1 on.
///
/// processor: aarch64
/// gnu flags: -march=armv8.2-a+dotprod
#pragma once

#define MICROTOME_TARGET_NAMESPACE neon_dotprod
#define MICROTOME_HIGHWAY_TARGET HWY_NEON

namespace microtome::kernels::neon_dotprod {

struct target : any_target {
  static constexpr const char* name = "neon_dotprod";
  static constexpr const char* description = "NEON with dot products, 32 registers of 4 floats";
  static constexpr const char* needs = "asimd asimddp";
  static constexpr bool fused = true;
  static constexpr ptrdiff_t tile_rows = 12, tile_vectors = 2;
  static constexpr int8_dot int8 = int8_dot::sdot;
};

}  // namespace microtome::kernels::neon_dotprod
