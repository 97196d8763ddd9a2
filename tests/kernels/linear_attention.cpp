#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "fma.hpp"

namespace microtome::tests {

namespace {

tensor<float> attend(index_t n, index_t d, const tensor<float>& qkv,
                     void (*function)(const kernels::linear_attention_args&)) {
  tensor<float> out(shape{n, d}), scratch(shape{d * (d + 1)});
  const auto in = row_pointers_of<const float>(qkv.data(), n, 3 * d);
  const auto rows = row_pointers_of(out.data(), n, d);
  function({.n = n,
            .d = d,
            .qkv = in.data(),
            .out = rows.data(),
            .epsilon = 1e-15f,
            .scratch = scratch.data()});
  return out;
}

}  // namespace

TEST_CASE("linear attention equals the scalar reference") {
  for (const index_t n : {1, 2, 7, 33, 100})
    for (const index_t d : {1, 3, 8, 13, 32, 37}) {
      CAPTURE(n);
      CAPTURE(d);
      tensor<float> qkv = random_tensor({n, 3 * d}, 1);
      // A position whose queries are all below zero attends to nothing.
      for (index_t c = 0; c < d; ++c) qkv[c] = -std::abs(qkv[c]);
      const tensor<float> fast = attend(n, d, qkv, kernels::active().linear_attention);
      CHECK(max_error(fast, attend(n, d, qkv, kernels::reference::linear_attention)) < 1e-5);
      for (index_t c = 0; c < d; ++c) CHECK(fast[c] == 0.0f);
    }
}

TEST_CASE("linear attention gives the same bits on every target with fused multiply-adds") {
  if (!has_fma()) {
    skip_without_fma();
    return;
  }
  const tensor<float> qkv = random_tensor({19, 3 * 21}, 1);
  CHECK(hash_of(attend(19, 21, qkv, kernels::active().linear_attention)) == 13222074452738653777u);
}

}  // namespace microtome::tests
