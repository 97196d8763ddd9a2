/// AVX2 with FMA: Intel from Haswell (2013), AMD from Zen (2017) on.
///
/// processor: x86_64
/// gnu flags: -mavx2 -mfma -mf16c -mbmi -mbmi2
/// msvc flags: /arch:AVX2
#pragma once

#include <xsimd/xsimd.hpp>

#define MICROTOME_TARGET_NAMESPACE avx2
#define MICROTOME_HIGHWAY_TARGET HWY_AVX2

namespace microtome::kernels::avx2 {

struct target : any_target {
  static constexpr const char* name = "avx2";
  static constexpr const char* description = "AVX2 with FMA, 16 registers of 8 floats";
  static constexpr const char* needs = "avx2 fma f16c bmi1 bmi2";
  static constexpr bool fused = true;
  static constexpr ptrdiff_t tile_rows = 6, tile_vectors = 2;
  static constexpr int8_dot int8 = int8_dot::vpmaddwd;
  using batch = xsimd::batch<float, xsimd::fma3<xsimd::avx2>>;
};

}  // namespace microtome::kernels::avx2
