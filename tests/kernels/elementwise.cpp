#include <limits>

#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "fma.hpp"

namespace microtome::tests {

TEST_CASE("layer_norm equals the scalar reference, also in place") {
  const kernels::table& kernel = kernels::active();
  for (const index_t channels : {1, 2, 7, 15, 16, 17, 64, 160, 257})
    for (const float mean : {0.0f, 100.0f}) {
      CAPTURE(channels);
      tensor<float> x = random_tensor({5, channels}, 1);
      for (float& value : x) value += mean;
      const tensor<float> gamma = random_tensor({channels}, 2);
      const tensor<float> beta = random_tensor({channels}, 3);
      tensor<float> slow(x.extents());
      const auto in = row_pointers_of<const float>(x.data(), 5, channels);
      const auto slow_rows = row_pointers_of(slow.data(), 5, channels);
      kernels::layer_norm_args args{.n = 5,
                                    .c = channels,
                                    .x = in.data(),
                                    .out = slow_rows.data(),
                                    .gamma = gamma.data(),
                                    .beta = beta.data(),
                                    .epsilon = 1e-5f};
      kernels::reference::layer_norm(args);
      const auto same_rows = row_pointers_of(x.data(), 5, channels);
      args.out = same_rows.data();
      kernel.layer_norm(args);
      CHECK(max_error(x, slow) < (mean == 0 ? 1e-5 : 2e-4));
    }
}

TEST_CASE("activations are accurate over the whole range, at every length") {
  const kernels::table& kernel = kernels::active();
  tensor<float> x(shape{40001});
  for (index_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i - 20000) * 1e-3f;
  tensor<float> y(x.extents());
  for (const auto act : {kernels::activation::none, kernels::activation::relu,
                         kernels::activation::gelu, kernels::activation::gelu_tanh}) {
    kernel.activate(act, x.size(), x.data(), y.data());
    double worst = 0;
    for (index_t i = 0; i < x.size(); ++i)
      worst = std::max(worst, std::abs(y[i] - kernels::reference::activate(act, double{x[i]})) /
                                  std::max(1.0, std::abs(double{x[i]})));
    CHECK(worst < 3e-7);
  }
  for (const index_t n : {1, 3, 7, 8, 9, 15, 33}) {
    tensor<float> z(shape{n + 1});
    z[n] = 42;
    kernel.activate(kernels::activation::gelu, n, x.data() + 20100, z.data());
    for (index_t i = 0; i < n; ++i)
      CHECK(z[i] == doctest::Approx(kernels::reference::activate(kernels::activation::gelu,
                                                                 double{x[20100 + i]})));
    CHECK(z[n] == 42);
  }
}

TEST_CASE("GELU, sigmoid and softmax give the same bits on every target with fused multiply-adds") {
  if (!has_fma()) {
    skip_without_fma();
    return;
  }
  const kernels::table& kernel = kernels::active();
  tensor<float> x(shape{8001}), y(x.extents());
  for (index_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i - 4000) * 0x1p-9f;
  kernel.activate(kernels::activation::gelu, x.size(), x.data(), y.data());
  CHECK(hash_of(y) == 11632242548268762976u);
  kernel.sigmoid(x.size(), x.data(), y.data());
  CHECK(hash_of(y) == 1858748642887921687u);
  kernel.softmax(x.size(), x.data());
  CHECK(hash_of(x) == 16038206509763205242u);
  for (index_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i - 4000) * 0x1p-9f;
  kernel.activate(kernels::activation::gelu_tanh, x.size(), x.data(), y.data());
  CHECK(hash_of(y) == 17431382891198653705u);
}

TEST_CASE("sigmoid") {
  const kernels::table& kernel = kernels::active();
  tensor<float> x(shape{2003});
  for (index_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i - 1001) * 0.1f;
  tensor<float> y(x.extents());
  kernel.sigmoid(x.size(), x.data(), y.data());
  for (index_t i = 0; i < x.size(); ++i)
    CHECK(std::abs(y[i] - 1 / (1 + std::exp(-double{x[i]}))) < 3e-7);
}

TEST_CASE("softmax sums to one and equals the reference") {
  const kernels::table& kernel = kernels::active();
  for (const index_t n : {1, 2, 7, 8, 9, 49, 197, 1000}) {
    tensor<float> x = random_tensor({n}, 1, 4.0f);
    std::vector<double> expected(x.begin(), x.end());
    kernels::reference::softmax(n, expected.data());
    kernel.softmax(n, x.data());
    CHECK(max_error(x, expected) < 1e-6);
  }
}

TEST_CASE("softmax down columns equals the reference, matrix by matrix") {
  const kernels::table& kernel = kernels::active();
  constexpr index_t count = 3;
  for (const index_t rows : {1, 2, 7, 20})
    for (const index_t columns : {1, 2, 8, 19}) {
      tensor<float> x = random_tensor({count, rows, columns}, 1, 6.0f);
      const tensor<float> before = x;
      kernel.softmax_columns(count, rows, columns, x.data());
      for (index_t column = 0; column < count * columns; ++column) {
        const index_t first = column / columns * rows * columns + column % columns;
        std::vector<double> expected;
        for (index_t r = 0; r < rows; ++r) expected.push_back(before[first + r * columns]);
        kernels::reference::softmax(rows, expected.data());
        for (index_t r = 0; r < rows; ++r)
          CHECK(std::abs(x[first + r * columns] - expected[static_cast<std::size_t>(r)]) < 1e-6);
      }
    }
}

TEST_CASE("add, with every remainder") {
  const kernels::table& kernel = kernels::active();
  for (const index_t n : {1, 7, 8, 9, 31, 100}) {
    const tensor<float> a = random_tensor({n}, 1), b = random_tensor({n}, 2);
    tensor<float> sum(shape{n});
    kernel.add(n, a.data(), b.data(), sum.data());
    for (index_t i = 0; i < n; ++i) CHECK(sum[i] == a[i] + b[i]);
  }
}

}  // namespace microtome::tests
