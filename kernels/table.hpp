/// The kernel table of the target that this translation unit is compiled for.
#pragma once

#include "attention.hpp"
#include "contract.hpp"
#include "depthwise.hpp"
#include "elementwise.hpp"
#include "gemm.hpp"
#include "layer_norm.hpp"
#include "peak.hpp"
#include "softmax.hpp"

namespace microtome::kernels {

namespace MICROTOME_TARGET_NAMESPACE {

inline constexpr table kernel_table{
    .name = MICROTOME_TARGET_NAME,
    .description = MICROTOME_TARGET_DESCRIPTION,
    .matrices = {{.packed_bytes = packed_bytes<fp32_inputs>,
                  .pack_b = pack_b<fp32_inputs>,
                  .gemm = gemm<fp32_inputs>,
                  .attention_scratch = attention_scratch<fp32_inputs>,
                  .attention = attention<fp32_inputs>},
                 {.packed_bytes = packed_bytes<bf16_inputs>,
                  .pack_b = pack_b<bf16_inputs>,
                  .gemm = gemm<bf16_inputs>,
                  .attention_scratch = attention_scratch<bf16_inputs>,
                  .attention = attention<bf16_inputs>},
                 {.packed_bytes = packed_bytes<int8_inputs>,
                  .pack_b = pack_b<int8_inputs>,
                  .gemm = gemm<int8_inputs>,
                  .attention_scratch = attention_scratch<fp32_inputs>,
                  .attention = attention<fp32_inputs>},
                 {.packed_bytes = packed_bytes<int8_weight_inputs>,
                  .pack_b = pack_b<int8_weight_inputs>,
                  .gemm = gemm<int8_weight_inputs>,
                  .attention_scratch = attention_scratch<fp32_inputs>,
                  .attention = attention<fp32_inputs>}},
    .native_bf16 = MICROTOME_HAS_BF16_DOT,
    .int8_step = int8_inputs::step,
    .panel_width = panel_width,
    .attention_columns = attention_columns,
    .depthwise3x3 = depthwise3x3,
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

/// The kernels that the runtime calls. Header-only, they are those of the compiler's own flags.
inline const table& active() {
  return MICROTOME_TARGET_NAMESPACE::kernel_table;
}

}  // namespace microtome::kernels
