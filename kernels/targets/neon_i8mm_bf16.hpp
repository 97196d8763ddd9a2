/// NEON with unsigned by signed dot products and bf16: Arm from Neoverse V1 and N2 (2020), Apple
/// from M2 on. Longer vectors (SVE) would be a target of their own: Highway's have no size at
/// compile time, which register_tile's arrays and batch need, unless the compiler is told it
/// (-msve-vector-bits).
///
/// processor: aarch64
/// gnu flags: -march=armv8.6-a
#pragma once

#define MICROTOME_TARGET_NAMESPACE neon_i8mm_bf16
#define MICROTOME_HIGHWAY_TARGET HWY_NEON

namespace microtome::kernels::neon_i8mm_bf16 {

struct target : any_target {
  static constexpr const char* name = "neon_i8mm_bf16";
  static constexpr const char* description = "NEON with i8mm and bf16, 32 registers of 4 floats";
  static constexpr const char* needs = "asimd asimddp i8mm bf16";
  static constexpr bool fused = true;
  static constexpr ptrdiff_t tile_rows = 12, tile_vectors = 2;
  static constexpr int8_dot int8 = int8_dot::usdot;
  static constexpr bf16_dot bf16 = bf16_dot::bfmlal;
};

}  // namespace microtome::kernels::neon_i8mm_bf16
