/// WebAssembly's vectors of 128 bits. They have no fused multiply-add: a product is rounded before
/// it is added, so that the last bits of results differ from other targets'.
///
/// processor: wasm32
/// gnu flags: -msimd128
#pragma once

#define MICROTOME_TARGET_NAMESPACE wasm_simd128
#define MICROTOME_HIGHWAY_TARGET HWY_WASM

namespace microtome::kernels::wasm_simd128 {

struct target : any_target {
  static constexpr const char* name = "wasm_simd128";
  static constexpr const char* description = "WebAssembly, vectors of 4 floats, no FMA";
  static constexpr bool fused = false;
  static constexpr ptrdiff_t tile_rows = 6, tile_vectors = 2;
  static constexpr int8_dot int8 = int8_dot::vpmaddwd;
};

}  // namespace microtome::kernels::wasm_simd128
