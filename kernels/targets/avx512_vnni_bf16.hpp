/// AVX-512 with VNNI and dot products of bf16: Intel Cooper Lake (2020), servers from Sapphire
/// Rapids (2023), AMD from Zen 4 (2022) on. Their tiles (AMX) would be a target of their own, with
/// a tile of 16 x 32 sums: AMX holds them outside the vector registers, and so needs another
/// register_tile.
///
/// processor: x86_64
/// gnu flags: -mavx2 -mfma -mf16c -mbmi -mbmi2
/// gnu flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mavx512vnni -mavx512bf16
#pragma once

#include <xsimd/xsimd.hpp>

#define MICROTOME_TARGET_NAMESPACE avx512_vnni_bf16
#define MICROTOME_HIGHWAY_TARGET HWY_AVX3

namespace microtome::kernels::avx512_vnni_bf16 {

struct target : any_target {
  static constexpr const char* name = "avx512_vnni_bf16";
  static constexpr const char* description =
      "AVX-512 with VNNI and BF16, 32 registers of 16 floats";
  static constexpr const char* needs =
      "avx2 fma f16c bmi1 bmi2 avx512f avx512bw avx512dq avx512vl avx512cd avx512_vnni avx512_bf16";
  static constexpr bool fused = true;
  static constexpr ptrdiff_t tile_rows = 14, tile_vectors = 2;
  static constexpr int8_dot int8 = int8_dot::vpdpbusd;
  static constexpr bf16_dot bf16 = bf16_dot::vdpbf16ps;
  using batch = xsimd::batch<float, xsimd::avx512bw>;
};

}  // namespace microtome::kernels::avx512_vnni_bf16
