/// AVX-512 with VNNI, which adds up four products of bytes a lane: Intel servers from Cascade Lake
/// (2019), AMD from Zen 4 (2022) on.
///
/// processor: x86_64
/// gnu flags: -mavx2 -mfma -mf16c -mbmi -mbmi2
/// gnu flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx512vnni
#pragma once

#include <xsimd/xsimd.hpp>

#define MICROTOME_TARGET_NAMESPACE avx512_vnni
#define MICROTOME_HIGHWAY_TARGET HWY_AVX3

namespace microtome::kernels::avx512_vnni {

struct target : any_target {
  static constexpr const char* name = "avx512_vnni";
  static constexpr const char* description = "AVX-512 with VNNI, 32 registers of 16 floats";
  static constexpr const char* needs =
      "avx2 fma f16c bmi1 bmi2 avx512f avx512bw avx512dq avx512vl avx512cd avx512_vnni";
  static constexpr bool fused = true;
  static constexpr ptrdiff_t tile_rows = 14, tile_vectors = 2;
  static constexpr int8_dot int8 = int8_dot::vpdpbusd;
  using batch = xsimd::batch<float, xsimd::avx512bw>;
};

}  // namespace microtome::kernels::avx512_vnni
