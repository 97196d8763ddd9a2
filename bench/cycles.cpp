// The inner loops of the kernels as functions of their own, for bench/cycles.py to find in
// assembly.
#include <kernels/table.hpp>

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

template <class Inputs>
HWY_INLINE void tile(ptrdiff_t steps, const typename Inputs::a_element* const* a,
                     const typename Inputs::b_element* panel, typename Inputs::sum* out) {
  register_tile<tile_rows, tile_vectors, typename Inputs::sum> sums;
  sums.clear();
  sums.template accumulate<Inputs>(steps, a, 0, panel);
  sums.store(out, panel_width);
}

extern "C" {

extern const ptrdiff_t cycles_products;
const ptrdiff_t cycles_products = tile_rows * tile_vectors;

void cycles_gemm(ptrdiff_t steps, const float* const* a, const float* panel, float* out) {
  tile<fp32_inputs>(steps, a, panel, out);
}

void cycles_gemm_bf16(ptrdiff_t steps, const bf16_inputs::a_element* const* a,
                      const bf16_inputs::b_element* panel, float* out) {
  tile<bf16_inputs>(steps, a, panel, out);
}

void cycles_gemm_int8(ptrdiff_t steps, const int8_inputs::a_element* const* a,
                      const int8_inputs::b_element* panel, int8_inputs::sum* out) {
  tile<int8_inputs>(steps, a, panel, out);
}

extern const ptrdiff_t cycles_sparse_products, cycles_sparse_wide_products;
const ptrdiff_t cycles_sparse_products = deep_tile::vectors;
const ptrdiff_t cycles_sparse_wide_products = wide_tile::vectors;

HWY_FLATTEN void cycles_sparse(const gemm_args* args, const sparse_header* b, const float* in,
                               float* sums) {
  sparse_block<false, deep_tile, deep_tile::vectors>(*args, *b, 0, in).add(0, b->groups, sums);
}

HWY_FLATTEN void cycles_sparse_wide(const gemm_args* args, const sparse_header* b, const float* in,
                                    float* sums) {
  sparse_block<false, wide_tile, wide_tile::vectors>(*args, *b, 0, in).add(0, b->groups, sums);
}

void cycles_depthwise(const depthwise_args* args, ptrdiff_t end) {
  for (ptrdiff_t c = 0; c < end; c += lanes)
    depthwise_inside<3, pixels_at_once, 1>(*args, float_tag{}, 1, c);
}

void cycles_gelu(ptrdiff_t n, const float* x, float* out) {
  for (ptrdiff_t i = 0; i < n; i += batch_lanes)
    gelu_batch(batch::load_unaligned(x + i)).store_unaligned(out + i);
}

void cycles_exp(ptrdiff_t n, const float* x, float* out) {
  for (ptrdiff_t i = 0; i < n; i += batch_lanes)
    exp_batch(batch::load_unaligned(x + i)).store_unaligned(out + i);
}
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
