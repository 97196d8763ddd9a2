/// The one header that names instruction sets: it turns the compiler's flags into a target
/// namespace and its register blocking. Everything compiled for a target lives in that namespace,
/// so that the linker can never take one target's code for another's.
#pragma once

#include <cstddef>

// One target for a translation unit, that of its flags. (Highway 1.0.3 otherwise refuses flags that
// include AVX3_DL, such as those of Sapphire Rapids.)
#if !defined(HWY_COMPILE_ONLY_STATIC) && !defined(HWY_COMPILE_ONLY_SCALAR) && \
    !defined(HWY_COMPILE_ONLY_EMU128)
#define HWY_COMPILE_ONLY_STATIC
#endif
#include <hwy/highway.h>
#include <xsimd/xsimd.hpp>

#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
#define MICROTOME_TARGET_NAMESPACE avx512
#define MICROTOME_TARGET_DESCRIPTION "AVX-512 (F, BW, DQ, VL), 32 registers of 16 floats"
#elif HWY_TARGET == HWY_AVX2
#define MICROTOME_TARGET_NAMESPACE avx2
#define MICROTOME_TARGET_DESCRIPTION "AVX2 with FMA, 16 registers of 8 floats"
#elif HWY_TARGET == HWY_SSE4
#define MICROTOME_TARGET_NAMESPACE sse4
#define MICROTOME_TARGET_DESCRIPTION "SSE4.2, 16 registers of 4 floats, no FMA"
#elif HWY_TARGET == HWY_SSSE3
#define MICROTOME_TARGET_NAMESPACE ssse3
#define MICROTOME_TARGET_DESCRIPTION "SSSE3, 16 registers of 4 floats, no FMA"
#elif HWY_TARGET == HWY_NEON
#define MICROTOME_TARGET_NAMESPACE neon
#define MICROTOME_TARGET_DESCRIPTION "NEON (AArch64), 32 registers of 4 floats"
#else
#define MICROTOME_TARGET_NAMESPACE portable
#define MICROTOME_TARGET_DESCRIPTION "whatever the compiler has, through Highway"
#endif

#define MICROTOME_STRINGIZE_(x) #x
#define MICROTOME_STRINGIZE(x) MICROTOME_STRINGIZE_(x)
#define MICROTOME_TARGET_NAME MICROTOME_STRINGIZE(MICROTOME_TARGET_NAMESPACE)

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using std::ptrdiff_t;

/// Widest float vector of the target.
using float_tag = hn::ScalableTag<float>;
inline constexpr ptrdiff_t lanes = static_cast<ptrdiff_t>(hn::MaxLanes(float_tag()));

/// xsimd's batch of the same target, for element-wise maths.
using batch = xsimd::batch<float>;
inline constexpr ptrdiff_t batch_lanes = static_cast<ptrdiff_t>(batch::size);

/// a * b + c, with one rounding where the target has such an instruction. (xsimd 8's own fma rounds
/// twice on AVX-512.)
HWY_INLINE batch fused(batch a, batch b, batch c) {
#if HWY_TARGET == HWY_SCALAR
  return xsimd::fma(a, b, c);
#else
  using vector = hn::Vec<float_tag>;
  return batch(hn::MulAdd(vector{a.data}, vector{b.data}, vector{c.data}).raw);
#endif
}

/// a / b, rounded once. (xsimd 8's own division is two steps of Newton's on Arm.)
HWY_INLINE batch quotient(batch a, batch b) {
#if HWY_TARGET == HWY_SCALAR
  return a / b;
#else
  using vector = hn::Vec<float_tag>;
  return batch(hn::Div(vector{a.data}, vector{b.data}).raw);
#endif
}

/// The GEMM micro-kernel holds a tile of tile_rows x (tile_vectors * lanes) sums in registers,
/// beside tile_vectors of B and one broadcast of A: 6 * 2 + 3 = 15 of 16 registers, or 14 * 2 + 3 =
/// 31 of 32.
#if HWY_TARGET == HWY_SCALAR
inline constexpr ptrdiff_t tile_vectors = 8;  // a panel is a whole number of xsimd's batches
inline constexpr ptrdiff_t tile_rows = 2;
#else
inline constexpr ptrdiff_t tile_vectors = 2;
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
inline constexpr ptrdiff_t tile_rows = 14;
#elif HWY_TARGET == HWY_NEON
inline constexpr ptrdiff_t tile_rows = 12;
#else
inline constexpr ptrdiff_t tile_rows = 6;
#endif
#endif
inline constexpr ptrdiff_t panel_width = tile_vectors * lanes;
static_assert(panel_width % batch_lanes == 0);

constexpr ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
