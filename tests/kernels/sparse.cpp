// Sparse products against the same products by the dense kernels, to the bit, and the scalar
// reference.
#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "fma.hpp"
#include "levels.hpp"

namespace microtome::tests {

namespace {

using kernels::precision;

struct sparse_case {
  index_t m, n, k, taps = 1;
  double density = 0.3;
  precision inputs = precision::fp32;
  bool bias = true, residual = false;
  kernels::activation act = kernels::activation::none;
  index_t column = 0;  ///< columns from here on are multiplied
};

/// B (taps * k, n), whole numbers for 8 bits; a column of zeros and a full one among the others.
tensor<float> pruned_matrix(const sparse_case& s) {
  std::mt19937 generator(7);
  std::bernoulli_distribution keeps(s.density);
  tensor<float> b = random_tensor({s.taps * s.k, s.n}, 2, 30.0f);
  for (index_t i = 0; i < b.size(); ++i) {
    const index_t column = i % s.n;
    if (s.inputs != precision::fp32) b[i] = std::clamp(std::round(b[i]), -127.0f, 127.0f);
    if (!keeps(generator) && column != 2) b[i] = 0;
    if (column == 1) b[i] = 0;
  }
  return b;
}

/// Sparse products for many rows and for few take different tiles.
enum class kernel { dense, sparse_many, sparse_few, reference };

/// A * B, or its columns from `column` on.
tensor<float> multiply(const sparse_case& s, const tensor<float>& b, kernel which,
                       index_t column = 0) {
  const bool sparse = which == kernel::sparse_many || which == kernel::sparse_few;
  const index_t rows = which == kernel::sparse_few ? 1 : 96;
  const tensor<float> a = random_tensor({s.taps * s.m, s.k + 3}, 1), bias = random_tensor({s.n}, 3);
  const tensor<float> residual = random_tensor({s.m, s.n + 5}, 4);
  tensor<float> scale = random_tensor({s.n}, 5, 1e-2f), c(shape{s.m, s.n + 5});
  const kernels::matrix_kernels& matrix = kernels::active().matrix(s.inputs);
  const index_t depth = s.taps * s.k;
  const levels input(depth, 0.02f, 117, s.k % 2 == 0);
  const kernels::sparse_matrix pruned{s.taps, s.k, s.n, b.data(), s.n, 1, rows};
  tensor<std::byte> packed(
      shape{sparse ? matrix.sparse_bytes(pruned) : matrix.packed_bytes(depth, s.n)});
  if (sparse)
    matrix.pack_sparse(pruned, packed.data());
  else
    matrix.pack_b(depth, s.n, b.data(), s.n, 1, input.get().zero_point, packed.data());
  auto a_rows = row_pointers_of(a.data(), s.taps * s.m, s.k + 3);
  std::shuffle(a_rows.begin(), a_rows.end(), std::mt19937(5));
  const auto c_rows = row_pointers_of(c.data(), s.m, s.n + 5);
  const auto residual_rows = row_pointers_of(residual.data(), s.m, s.n + 5);
  const bool scaled = s.inputs == precision::int8 || s.inputs == precision::int8_weights;
  kernels::gemm_args args{.m = s.m,
                          .n = s.n,
                          .k = s.k,
                          .taps = s.taps,
                          .a = a_rows.data(),
                          .b = packed.data(),
                          .c = c_rows.data(),
                          .bias = s.bias ? bias.data() : nullptr,
                          .residual = s.residual ? residual_rows.data() : nullptr,
                          .act = s.act,
                          .scale = scaled ? scale.data() : nullptr,
                          .input = input.get()};
  args.column = column;
  args.n -= column;
  if (args.bias) args.bias += column;
  if (args.scale) args.scale += column;
  if (which == kernel::reference) {
    args.b = b.data();
    kernels::reference::gemm(args);
  } else {
    sparse ? matrix.sparse_gemm(args) : matrix.gemm(args);
  }
  return c;
}

void check_sparse(const sparse_case& s) {
  CAPTURE(s.m);
  CAPTURE(s.n);
  CAPTURE(s.k);
  CAPTURE(s.taps);
  CAPTURE(s.density);
  CAPTURE(static_cast<int>(s.inputs));
  const tensor<float> b = pruned_matrix(s);
  const tensor<float> dense = multiply(s, b, kernel::dense);
  for (const kernel which : {kernel::sparse_many, kernel::sparse_few, kernel::dense}) {
    const tensor<float> part = multiply(s, b, which, s.column);
    bool equal = true;
    for (index_t i = 0; i < s.m; ++i)
      for (index_t j = 0; j < s.n + 5; ++j)
        equal &= j < s.n - s.column ? part.row(i)[j] == dense.row(i)[j + s.column]
                                    : part.row(i)[j] == 0;  // what lies after a row is not written
    CHECK(equal);
  }
  if (s.inputs != precision::fp32) return;
  // Elements of B have a deviation of 30, and the largest of many sums is in question.
  CHECK(max_error(dense, multiply(s, b, kernel::reference)) <= 60 * sum_tolerance(s.taps * s.k));
}

constexpr precision all_precisions[] = {precision::fp32, precision::bf16, precision::int8,
                                        precision::int8_weights};

}  // namespace

TEST_CASE("sparse gemm equals the dense one at every remainder") {
  for (const precision inputs : all_precisions)
    for (const index_t m : {1, 3, 4, 7, 8, 13, 33})
      for (const index_t n : {1, 2, 3, 4, 17})
        for (const index_t k : {1, 2, 3, 4, 21}) check_sparse({m, n, k, 1, 0.5, inputs});
}

TEST_CASE("sparse gemm equals the dense one beyond its tiles, blocks and chunks") {
  for (const precision inputs : all_precisions)
    for (const double density : {0.0, 0.02, 0.2, 0.5, 1.0}) {
      check_sparse({98, 67, 131, 1, density, inputs});
      check_sparse({47, 6, 400, 1, density, inputs, false, true});
      check_sparse({203, 19, 64, 1, density, inputs});
    }
  check_sparse({5, 1500, 37});
  check_sparse({50, 701, 300, 1, 0.1, precision::int8, true, true});
  check_sparse({3, 9, 2050, 1, 0.3, precision::bf16});
}

TEST_CASE("sparse gemm takes taps, activations and a part of the columns") {
  for (const precision inputs : all_precisions) {
    check_sparse({23, 35, 18, 9, 0.3, inputs});
    check_sparse({31, 16, 256, 4, 0.3, inputs, true, true});
    for (const auto act : {kernels::activation::relu, kernels::activation::gelu})
      check_sparse({29, 70, 33, 1, 0.3, inputs, true, true, act});
    check_sparse({29, 170, 33, 1, 0.3, inputs, true, false, {}, 64});
    check_sparse({9, 140, 300, 1, 0.3, inputs, true, false, {}, 128});
  }
}

TEST_CASE("sparse gemm gives the same bits for a row wherever it stands") {
  const index_t m = 53, n = 41, k = 300;
  const sparse_case s{m, n, k};
  const tensor<float> a = random_tensor({m, k}, 1), b = pruned_matrix(s);
  const kernels::matrix_kernels& matrix = kernels::active().matrix(precision::fp32);
  const kernels::sparse_matrix pruned{1, k, n, b.data(), n, 1, m};
  tensor<std::byte> packed(shape{matrix.sparse_bytes(pruned)});
  matrix.pack_sparse(pruned, packed.data());
  const auto run = [&](index_t first, index_t count, tensor<float>& c) {
    const auto a_rows = row_pointers_of(a.row(first), count, k);
    const auto c_rows = row_pointers_of(c.row(first), count, n);
    matrix.sparse_gemm(
        {.m = count, .n = n, .k = k, .a = a_rows.data(), .b = packed.data(), .c = c_rows.data()});
  };
  tensor<float> whole(shape{m, n}), parts(shape{m, n});
  run(0, m, whole);
  for (index_t row = 0; row < m; row += 5) run(row, std::min<index_t>(5, m - row), parts);
  CHECK(std::equal(whole.begin(), whole.end(), parts.begin()));
}

}  // namespace microtome::tests
