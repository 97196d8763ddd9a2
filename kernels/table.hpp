/// The kernel table of the target that this translation unit is compiled for.
#pragma once

#include "macros_off.hpp"

// Up to version 12 g++ takes the "undefined" operand of its own AVX-512 intrinsics for a variable
// that somebody forgot to set (GCC bug 105593), and says so at each place that they are inlined to.
// All kernels come in here, so that who includes microtome sees nothing of it, whatever the flags.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "attention.hpp"
#include "contract.hpp"
#include "depthwise.hpp"
#include "elementwise.hpp"
#include "gemm.hpp"
#include "layer_norm.hpp"
#include "linear_attention.hpp"
#include "peak.hpp"
#include "softmax.hpp"
#include "sparse.hpp"
#include "winograd.hpp"
#include "winograd_int8.hpp"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

namespace microtome::kernels {

namespace MICROTOME_TARGET_NAMESPACE {

/// Products with factors of one precision, and attention near them.
template <class Inputs, class Attention = Inputs>
inline constexpr matrix_kernels kernels_of{.packed_bytes = packed_bytes<Inputs>,
                                           .pack_b = pack_b<Inputs>,
                                           .gemm = gemm<Inputs>,
                                           .attention_scratch = attention_scratch<Attention>,
                                           .attention = attention<Attention>,
                                           .sparse_bytes = sparse_bytes,
                                           .pack_sparse = pack_sparse<Inputs>,
                                           .sparse_gemm = sparse_gemm<Inputs>};

inline constexpr table kernel_table{
    .name = target::name,
    .description = target::description,
    .needs = target::needs,
    .fused = target::fused,
    .matrices = {kernels_of<fp32_inputs>, kernels_of<bf16_inputs>,
                 kernels_of<int8_inputs, fp32_inputs>, kernels_of<int8_weight_inputs, fp32_inputs>},
    .native_bf16 = target::bf16 != bf16_dot::none,
    .sparse_time = sparse_time,
    .attention_columns = attention_columns,
    .depthwise = depthwise,
    .linear_attention = linear_attention,
    .winograd_weights = winograd_weights,
    .winograd_input = winograd_input,
    .winograd_output = winograd_output,
    .winograd_int8 = winograd_int8<target::int8>,
    .quantize = quantize,
    .layer_norm = layer_norm,
    .activate = activate,
    .sigmoid = sigmoid,
    .add = add,
    .add_scaled = add_scaled,
    .softmax = softmax,
    .softmax_columns = softmax_columns,
    .fma_peak = fma_peak,
    .int8_peak = int8_peak,
};

}  // namespace MICROTOME_TARGET_NAMESPACE

}  // namespace microtome::kernels

#include "macros_on.hpp"
