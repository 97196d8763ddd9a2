/// Any CPU, without vectors: one float at a time, the same bits as on those that have them. It is
/// slow, above all where fma() is a function.
///
/// processor: any
/// gnu flags: -DMICROTOME_SCALAR
/// msvc flags: -DMICROTOME_SCALAR
#pragma once

#define MICROTOME_TARGET_NAMESPACE scalar
#define MICROTOME_HIGHWAY_TARGET HWY_SCALAR

namespace microtome::kernels::scalar {

struct target : any_target {
  static constexpr const char* name = "scalar";
  static constexpr const char* description = "no vectors, any CPU";
  static constexpr bool fused = true;  // by std::fma: see mul_add in lanes.hpp
  static constexpr ptrdiff_t tile_rows = 2, tile_vectors = 8;
};

}  // namespace microtome::kernels::scalar
