/// SSE4.2: any x86-64 CPU since about 2010. It has no fused multiply-add: a product is rounded
/// before it is added, so that the last bits of results differ from other targets'.
///
/// processor: x86_64
/// gnu flags: -msse4.2
#pragma once

#include <xsimd/xsimd.hpp>

#define MICROTOME_TARGET_NAMESPACE sse4
#define MICROTOME_HIGHWAY_TARGET HWY_SSE4

namespace microtome::kernels::sse4 {

struct target : any_target {
  static constexpr const char* name = "sse4";
  static constexpr const char* description = "SSE4.2, 16 registers of 4 floats, no FMA";
  static constexpr const char* needs = "sse4_2";
  static constexpr bool fused = false;
  static constexpr ptrdiff_t tile_rows = 6, tile_vectors = 2;
  static constexpr int8_dot int8 = int8_dot::vpmaddwd;
  using batch = xsimd::batch<float, xsimd::sse4_2>;
};

}  // namespace microtome::kernels::sse4
