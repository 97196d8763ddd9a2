#include <limits>

#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "../support.hpp"

namespace microtome::tests {

namespace {

double attention_error(index_t n_q, index_t n_k, index_t d_k, index_t d_v, bool with_bias,
                       float spread, kernels::precision inputs = kernels::precision::fp32) {
  const kernels::table& kernel = kernels::active();
  const kernels::matrix_kernels& matrix = kernel.matrix(inputs);
  const index_t stride = 3 * d_k + d_v;  // as q, k and v lie side by side in a row of qkv
  const tensor<float> q = random_tensor({n_q, stride}, 1, spread);
  const tensor<float> k = random_tensor({n_k, stride}, 2, spread);
  const tensor<float> v = random_tensor({n_k, stride}, 3);
  const index_t columns = kernel.attention_columns(n_k);
  tensor<float> bias = random_tensor({n_q, columns}, 4);
  for (index_t i = 0; i < n_q; ++i)
    for (index_t j = n_k; j < columns; ++j)
      bias[i * columns + j] = -std::numeric_limits<float>::infinity();
  tensor<float> scratch(shape{matrix.attention_scratch(n_k, d_k, d_v)});
  tensor<float> fast(shape{n_q, d_v}), slow(shape{n_q, d_v});
  tensor<float> fast_lse(shape{n_q}), slow_lse(shape{n_q});
  const auto run = [&](auto&& function, tensor<float>& out, tensor<float>& lse) {
    const auto q_rows = row_pointers_of(q.data(), n_q, stride);
    const auto k_rows = row_pointers_of(k.data(), n_k, stride);
    const auto v_rows = row_pointers_of(v.data(), n_k, stride);
    const auto out_rows = row_pointers_of(out.data(), n_q, d_v);
    function(kernels::attention_args{.n_q = n_q,
                                     .n_k = n_k,
                                     .d_k = d_k,
                                     .d_v = d_v,
                                     .q = q_rows.data(),
                                     .k = k_rows.data(),
                                     .v = v_rows.data(),
                                     .out = out_rows.data(),
                                     .scale = 1 / std::sqrt(static_cast<float>(d_k)),
                                     .bias = with_bias ? bias.data() : nullptr,
                                     .bias_stride = columns,
                                     .scratch = scratch.data(),
                                     .lse = lse.data()});
  };
  run(matrix.attention, fast, fast_lse);
  run(kernels::reference::attention, slow, slow_lse);
  return std::max(max_error(fast, slow), max_error(fast_lse, slow_lse));
}

}  // namespace

TEST_CASE("attention equals the scalar reference") {
  for (const bool bias : {false, true})
    for (const index_t n_q : {1, 6, 13, 49})
      for (const index_t n_k : {1, 2, 7, 8, 9, 50, 197})
        for (const index_t d : {1, 4, 16, 19, 32}) {
          CAPTURE(n_q);
          CAPTURE(n_k);
          CAPTURE(d);
          CHECK(attention_error(n_q, n_k, d, d, bias, 1.0f) < 1e-5);
          CHECK(attention_error(n_q, n_k, d, d, bias, 1.0f, kernels::precision::bf16) < 0.03);
        }
}

TEST_CASE("attention over many keys, values of another width") {
  CHECK(attention_error(7, 4096, 16, 16, false, 1.0f) < 1e-5);
  CHECK(attention_error(33, 65, 8, 21, true, 1.0f) < 1e-5);
}

TEST_CASE("attention stands large scores") {
  CHECK(attention_error(9, 30, 16, 16, true, 12.0f) < 2e-4);
}

}  // namespace microtome::tests
