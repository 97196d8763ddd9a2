#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "fma.hpp"

namespace microtome::tests {

namespace {

struct gemm_case {
  index_t m, n, k, taps = 1;
  bool bias = true, residual = false;
  kernels::activation act = kernels::activation::none;
};

void check(const gemm_case& g) {
  CAPTURE(g.m);
  CAPTURE(g.n);
  CAPTURE(g.k);
  CAPTURE(g.taps);
  const kernels::table& kernel = kernels::active();
  const index_t depth = g.taps * g.k;
  // Rows lie apart, in shuffled order, and between guards that must survive.
  const index_t a_stride = g.k + 3, c_stride = g.n + 5;
  const tensor<float> a = random_tensor({g.taps * g.m, a_stride}, 1);
  const tensor<float> b = random_tensor({depth, g.n}, 2);
  const tensor<float> bias = random_tensor({g.n}, 3);
  const tensor<float> residual = random_tensor({g.m, c_stride}, 4);
  std::vector<const float*> a_rows = row_pointers_of(a.data(), g.taps * g.m, a_stride);
  std::shuffle(a_rows.begin(), a_rows.end(), std::mt19937(5));
  const auto residual_rows = row_pointers_of(residual.data(), g.m, c_stride);

  tensor<float> slow(shape{g.m, c_stride});
  const auto run = [&](auto&& function, const void* weights, tensor<float>& c) {
    const auto c_rows = row_pointers_of(c.data(), g.m, c_stride);
    function(kernels::gemm_args{.m = g.m,
                                .n = g.n,
                                .k = g.k,
                                .taps = g.taps,
                                .a = a_rows.data(),
                                .b = weights,
                                .c = c_rows.data(),
                                .bias = g.bias ? bias.data() : nullptr,
                                .residual = g.residual ? residual_rows.data() : nullptr,
                                .act = g.act});
  };
  const auto run_packed = [&](const kernels::matrix_kernels& matrix) {
    tensor<std::byte> packed(shape{matrix.packed_bytes(depth, g.n)});
    matrix.pack_b(depth, g.n, b.data(), g.n, 1, nullptr, packed.data());
    tensor<float> fast(slow.extents());
    run(matrix.gemm, packed.data(), fast);
    return fast;
  };
  run(kernels::reference::gemm, b.data(), slow);
  CHECK(max_error(run_packed(kernel.matrix(kernels::precision::fp32)), slow) <=
        sum_tolerance(depth));
  // bf16 is off by 2^-9 at most in each factor.
  const tensor<float> rounded = run_packed(kernel.matrix(kernels::precision::bf16));
  CHECK(max_error(rounded, slow) <= 0.02 * std::sqrt(static_cast<double>(depth)) + 0.02);
  if (g.residual || g.act != kernels::activation::none || !has_fma()) return;
  run(kernels::reference::gemm_bf16, b.data(), slow);
  CHECK(max_error(rounded, slow) == 0);
}

}  // namespace

TEST_CASE("gemm equals the scalar reference at every remainder of the register tile") {
  for (const index_t m : {1, 2, 5, 6, 7, 11, 13, 14, 15, 29})
    for (const index_t n : {1, 3, 7, 8, 15, 16, 17, 31, 33, 47})
      for (const index_t k : {1, 2, 3, 19}) check({.m = m, .n = n, .k = k});
}

TEST_CASE("gemm equals the reference beyond its cache blocks") {
  check({.m = 3, .n = 37, .k = 2050});
  check({.m = 401, .n = 70, .k = 131});
  check({.m = 97, .n = 19, .k = 700});
}

TEST_CASE("gemm sums over taps") {
  check({.m = 23, .n = 35, .k = 17, .taps = 9});
  check({.m = 5, .n = 8, .k = 1, .taps = 4});
  check({.m = 31, .n = 16, .k = 256, .taps = 9});
}

TEST_CASE("gemm applies bias, residual and activation") {
  using kernels::activation;
  for (const activation act : {activation::none, activation::relu, activation::gelu})
    for (const bool bias : {false, true})
      for (const bool residual : {false, true})
        for (const index_t n : {16, 21})
          check({.m = 17, .n = n, .k = 33, .bias = bias, .residual = residual, .act = act});
}

TEST_CASE("gemm gives the same bits for a row wherever it stands") {
  kernels::precision inputs{};
  SUBCASE("fp32") {
    inputs = kernels::precision::fp32;
  }
  SUBCASE("bf16") {
    inputs = kernels::precision::bf16;
  }
  const index_t m = 53, n = 41, k = 300;
  const tensor<float> a = random_tensor({m, k}, 1);
  const tensor<float> b = random_tensor({k, n}, 2);
  const kernels::matrix_kernels& matrix = kernels::active().matrix(inputs);
  tensor<std::byte> packed(shape{matrix.packed_bytes(k, n)});
  matrix.pack_b(k, n, b.data(), n, 1, nullptr, packed.data());
  const auto run = [&](index_t first, index_t count, tensor<float>& c) {
    const auto a_rows = row_pointers_of(a.row(first), count, k);
    const auto c_rows = row_pointers_of(c.row(first), count, n);
    matrix.gemm(
        {.m = count, .n = n, .k = k, .a = a_rows.data(), .b = packed.data(), .c = c_rows.data()});
  };
  tensor<float> whole(shape{m, n}), parts(shape{m, n});
  run(0, m, whole);
  for (index_t row = 0; row < m; row += 5) run(row, std::min<index_t>(5, m - row), parts);
  CHECK(std::equal(whole.begin(), whole.end(), parts.begin()));
}

TEST_CASE("pack_b takes a transposed matrix") {
  const index_t n = 21, k = 11;
  const tensor<float> b = random_tensor({k, n}, 2);
  tensor<float> transposed(shape{n, k});
  for (index_t i = 0; i < k; ++i)
    for (index_t j = 0; j < n; ++j) transposed[j * k + i] = b[i * n + j];
  for (const auto inputs : {kernels::precision::fp32, kernels::precision::bf16}) {
    const kernels::matrix_kernels& matrix = kernels::active().matrix(inputs);
    tensor<std::byte> one(shape{matrix.packed_bytes(k, n)}), other(one.extents());
    matrix.pack_b(k, n, b.data(), n, 1, nullptr, one.data());
    matrix.pack_b(k, n, transposed.data(), 1, k, nullptr, other.data());
    CHECK(std::equal(one.begin(), one.end(), other.begin()));
  }
}

TEST_CASE("bf16 rounds to even, keeps signs, infinities and what is not a number") {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {0.0f,    -0.0f,         1.0f,     1.00390625f, 1.01171875f,
                                -1.005f, 3.0e38f,       -3.4e38f, infinity,    -infinity,
                                1e-38f,  -1.17549e-38f, 1.2e-38f, 65504.0f,    0.1f};
  const index_t count = static_cast<index_t>(x.size());
  const kernels::matrix_kernels& matrix = kernels::active().matrix(kernels::precision::bf16);
  const float one = 1.0f, beyond = NAN;
  tensor<std::byte> packed(shape{matrix.packed_bytes(1, 1)});
  matrix.pack_b(1, 1, &one, 1, 1, nullptr, packed.data());
  tensor<float> out(shape{count + 1});
  auto a = row_pointers_of(x.data(), count, 1);
  a.push_back(&beyond);
  const auto c = row_pointers_of(out.data(), count + 1, 1);
  matrix.gemm({.m = count + 1, .n = 1, .k = 1, .a = a.data(), .b = packed.data(), .c = c.data()});
  for (index_t i = 0; i < count; ++i) {
    CAPTURE(x[static_cast<std::size_t>(i)]);
    CHECK(out[i] == kernels::reference::round_to_bf16(x[static_cast<std::size_t>(i)]));
  }
  CHECK(std::isnan(out[count]));
}

}  // namespace microtome::tests
