// Products with pruned weights over sparsity, beside the dense product of the same shape, without
// activation: sparse/LAYER/ROWSxCOLUMNSxDEPTH/dense, .../sparsity:PERCENT and .../2:4. FLOPs are
// those of the dense product, so that rates compare. --benchmark_enable_random_interleaving takes
// turns.
#include <random>
#include <string>
#include <vector>

#include "shapes.hpp"

namespace microtome::bench {

namespace {

using kernels::precision;

constexpr int two_of_four = -1, dense = -2;

/// B (k, n) with that percentage of zeros, drawn at random, or two of each four along k.
tensor<float> pruned(index_t k, index_t n, int percent) {
  tensor<float> b = values({k, n});
  std::mt19937 generator(2);
  std::uniform_int_distribution<int> draw(0, 99);
  for (index_t j = 0; j < n; ++j)
    for (index_t i = 0; i < k; ++i) {
      const int first = draw(generator) % 4;  // of the four that start here
      if (percent != two_of_four) {
        if (draw(generator) < percent) b[i * n + j] = 0;
      } else if (i % 4 == 0) {
        for (const int at : {first, (first + 1 + draw(generator) % 3) % 4})
          if (i + at < k) b[(i + at) * n + j] = 0;
      }
    }
  return b;
}

void product(benchmark::State& state, gemm_shape s, int percent, precision inputs) {
  const kernels::matrix_kernels& matrix = kernel.matrix(inputs);
  s.act = activation::none;
  const operands factors(s, pruned(s.taps * s.k, s.n, percent));
  const bool skips = percent != dense;
  const tensor<std::byte> packed = skips ? factors.packed_sparse(matrix) : factors.packed(matrix);
  const kernels::gemm_args args = factors.with(packed);
  measure(state, factors.todo(packed, inputs),
          [&] { skips ? matrix.sparse_gemm(args) : matrix.gemm(args); });
}

}  // namespace

void register_sparse() {
  for (const auto& [inputs, suffix] :
       {std::pair{precision::fp32, ""}, std::pair{precision::bf16, "_bf16"},
        std::pair{precision::int8, "_int8"}})
    for (const gemm_shape& s : gemm_shapes) {
      if (s.k < 32 || s.n < 32 || s.n == 56 || s.k == 56) continue;  // no weights, or hardly any
      for (const int percent : {dense, 0, 20, 50, two_of_four, 70, 80, 90, 95}) {
        const std::string of = percent == dense         ? "dense"
                               : percent == two_of_four ? "2:4"
                                                        : "sparsity:" + std::to_string(percent);
        add("sparse" + std::string(suffix) + "/" + s.layer + "/" + size_name(s) + "/" + of, product,
            s, percent, inputs);
      }
    }
}

}  // namespace microtome::bench
