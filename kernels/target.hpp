/// From the compiler's flags to a CPU target: the table of targets, and what all of them share.
/// Everything compiled for a target lives in its namespace, so that the linker can never take one
/// target's code for another's. What a target is made of is in targets/, one file each; PORTING.md
/// tells how to write another.
#pragma once

#include "macros_off.hpp"

#include <cstddef>
#include <type_traits>

#if defined(_MSC_VER) && !defined(__clang__)
#pragma warning(disable : 4068)  // `#pragma GCC unroll` is nothing to MSVC, and a hint elsewhere
#endif

namespace microtome::kernels {

using std::ptrdiff_t;

/// Who adds up products of 8-bit numbers, in lanes of 32 bits: see dot.hpp.
enum class int8_dot { one, vpmaddwd, vpdpbusd, sdot, usdot };

/// Who adds up products of bf16 numbers: see bf16.hpp.
enum class bf16_dot { none, vdpbf16ps, bfmlal };

/// What a target has that says nothing else.
struct any_target {
  /// What the CPU has to have, in the words of cpu_features() in cpu.hpp, between spaces.
  static constexpr const char* needs = "";
  static constexpr int8_dot int8 = int8_dot::one;
  static constexpr bf16_dot bf16 = bf16_dot::none;
  using batch = void;  ///< xsimd's, where it knows the target
};

}  // namespace microtome::kernels

#if defined(__AVX2__) && (defined(_MSC_VER) || (defined(__FMA__) && defined(__F16C__) && \
                                                defined(__BMI__) && defined(__BMI2__)))
#define MICROTOME_FLAGS_AVX2 1
#else
#define MICROTOME_FLAGS_AVX2 0
#endif
#if MICROTOME_FLAGS_AVX2 && defined(__AVX512F__) && defined(__AVX512BW__) &&   \
    defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512CD__) && \
    (!defined(_MSC_VER) || defined(__clang__))
#define MICROTOME_FLAGS_AVX512 1
#else
#define MICROTOME_FLAGS_AVX512 0
#endif

// The table: the first row whose condition holds. MICROTOME_SCALAR takes none of them. The
// dispatch library knows the targets from here, too, the best first.
#if defined(MICROTOME_SCALAR)
#elif MICROTOME_FLAGS_AVX512 && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include "targets/avx512_vnni_bf16.hpp"
#elif MICROTOME_FLAGS_AVX512 && defined(__AVX512VNNI__)
#include "targets/avx512_vnni.hpp"
#elif MICROTOME_FLAGS_AVX512
#include "targets/avx512.hpp"
#elif MICROTOME_FLAGS_AVX2
#include "targets/avx2.hpp"
#elif defined(__SSE4_2__) || (defined(_MSC_VER) && defined(__AVX__))
#include "targets/sse4.hpp"
#elif defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8) && \
    defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include "targets/neon_i8mm_bf16.hpp"
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "targets/neon_dotprod.hpp"
#elif (defined(__aarch64__) && defined(__ARM_NEON)) || defined(_M_ARM64)
#include "targets/neon.hpp"
#elif defined(__wasm_simd128__)
#include "targets/wasm_simd128.hpp"
#endif
#ifndef MICROTOME_TARGET_NAMESPACE
#include "targets/scalar.hpp"
#endif

// Highway has one target for a translation unit, and it is ours. Without the rest it would ask for
// AES, or give functions an attribute for it, and refuse to inline them into ours.
#ifndef HWY_COMPILE_ONLY_STATIC
#define HWY_COMPILE_ONLY_STATIC
#endif
#ifndef HWY_BASELINE_TARGETS
#define HWY_BASELINE_TARGETS MICROTOME_HIGHWAY_TARGET
#endif
#ifndef HWY_DISABLE_PCLMUL_AES
#define HWY_DISABLE_PCLMUL_AES
#endif
#if defined(__aarch64__) && !defined(TOOLCHAIN_MISS_SYS_AUXV_H)
#define TOOLCHAIN_MISS_SYS_AUXV_H
#endif
#include <hwy/highway.h>
static_assert(HWY_TARGET == MICROTOME_HIGHWAY_TARGET,
              "include microtome before Highway, which else chooses another target");

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using std::ptrdiff_t;

/// Widest float vector of the target.
using float_tag = hn::ScalableTag<float>;
inline constexpr ptrdiff_t lanes = static_cast<ptrdiff_t>(hn::MaxLanes(float_tag()));

/// The GEMM micro-kernel holds a tile of tile_rows x (tile_vectors * lanes) sums in registers,
/// beside tile_vectors of B and one broadcast of A: 6 * 2 + 3 = 15 of 16 registers, or 14 * 2 + 3 =
/// 31 of 32.
inline constexpr ptrdiff_t tile_rows = target::tile_rows;
inline constexpr ptrdiff_t tile_vectors = target::tile_vectors;
inline constexpr ptrdiff_t panel_width = tile_vectors * lanes;

constexpr ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE

#include "batch.hpp"

#include "macros_on.hpp"
