#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "fma.hpp"
#include "levels.hpp"

namespace microtome::tests {

namespace {

using kernels::precision;

/// What the last rounding may differ by where the target has no fused multiply-add.
double tolerance() {
  return has_fma() ? 0.0 : 5e-5;
}

/// Whole numbers from -127 to 127.
tensor<float> random_weights(shape extents, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> whole(-127, 127);
  tensor<float> values(extents);
  for (float& value : values) value = static_cast<float>(whole(generator));
  return values;
}

tensor<float> random_scale(index_t n, unsigned seed) {
  tensor<float> scale = random_tensor({n}, seed, 1e-4f);
  for (float& s : scale) s = std::abs(s) + 1e-6f;
  return scale;
}

struct int8_case {
  index_t m, n, k, taps = 1;
  int zero_point = 117;
  bool same = true;  ///< levels for all channels
  bool bias = true, residual = false;
};

/// A GEMM with everything it may have, rows apart and shuffled.
class int8_gemm {
public:
  explicit int8_gemm(const int8_case& g)
      : g_(g),
        depth_(g.taps * g.k),
        a_(random_tensor({g.taps * g.m, g.k + 3}, 1, 2.0f)),
        b_(random_weights({depth_, g.n}, 2)),
        bias_(random_tensor({g.n}, 3)),
        residual_(random_tensor({g.m, g.n + 5}, 4)),
        scale_(random_scale(g.n, 5)),
        input_(depth_, 0.02f, g.zero_point, g.same),
        a_rows_(row_pointers_of(std::as_const(a_).data(), g.taps * g.m, g.k + 3)),
        residual_rows_(row_pointers_of(std::as_const(residual_).data(), g.m, g.n + 5)) {
    std::shuffle(a_rows_.begin(), a_rows_.end(), std::mt19937(5));
  }

  template <class Function>
  tensor<float> run(Function&& function, const void* b, kernels::activation act = {}) const {
    tensor<float> c(shape{g_.m, g_.n + 5});
    const auto c_rows = row_pointers_of(c.data(), g_.m, g_.n + 5);
    function(kernels::gemm_args{.m = g_.m,
                                .n = g_.n,
                                .k = g_.k,
                                .taps = g_.taps,
                                .a = a_rows_.data(),
                                .b = b,
                                .c = c_rows.data(),
                                .bias = g_.bias ? bias_.data() : nullptr,
                                .residual = g_.residual ? residual_rows_.data() : nullptr,
                                .act = act,
                                .scale = scale_.data(),
                                .input = input_.get()});
    return c;
  }

  tensor<float> run_packed(precision inputs, const tensor<float>& b,
                           kernels::activation act = {}) const {
    const kernels::matrix_kernels& matrix = kernels::active().matrix(inputs);
    tensor<std::byte> packed(shape{matrix.packed_bytes(depth_, g_.n)});
    matrix.pack_b(depth_, g_.n, b.data(), g_.n, 1, input_.get().zero_point, packed.data());
    return run(matrix.gemm, packed.data(), act);
  }

  const tensor<float>& b() const { return b_; }

private:
  int8_case g_;
  index_t depth_;
  tensor<float> a_, b_, bias_, residual_, scale_;
  levels input_;
  std::vector<const float*> a_rows_, residual_rows_;
};

void check_int8(const int8_case& g) {
  CAPTURE(g.m);
  CAPTURE(g.n);
  CAPTURE(g.k);
  CAPTURE(g.taps);
  CAPTURE(g.zero_point);
  CAPTURE(g.same);
  const int8_gemm product(g);
  const tensor<float> slow = product.run(kernels::reference::gemm_int8, product.b().data());
  CHECK(max_error(product.run_packed(precision::int8, product.b()), slow) <= tolerance());
  const tensor<float> weights =
      product.run(kernels::reference::gemm_int8_weights, product.b().data());
  CHECK(max_error(product.run_packed(precision::int8_weights, product.b()), weights) <=
        tolerance());
}

}  // namespace

TEST_CASE("int8 gemm equals the exact reference bit for bit at every remainder") {
  for (const index_t m : {1, 5, 6, 7, 13, 15})
    for (const index_t n : {1, 7, 8, 15, 16, 17, 33})
      for (const index_t k : {1, 2, 3, 4, 5, 19})
        for (const int zero_point : {0, 117, 255})
          for (const bool same : {true, false})
            check_int8({.m = m, .n = n, .k = k, .zero_point = zero_point, .same = same});
}

TEST_CASE("int8 gemm equals the exact reference beyond its cache blocks, with taps and residual") {
  check_int8({.m = 3, .n = 37, .k = 2050});
  check_int8({.m = 401, .n = 70, .k = 131});
  check_int8({.m = 401, .n = 70, .k = 131, .same = false});
  check_int8({.m = 23, .n = 35, .k = 17, .taps = 9, .same = false});
  check_int8({.m = 29, .n = 19, .k = 1700, .bias = false});
  check_int8({.m = 23, .n = 35, .k = 17, .taps = 9});
  check_int8({.m = 31, .n = 16, .k = 256, .taps = 9, .residual = true});
  check_int8({.m = 97, .n = 21, .k = 33, .bias = false, .residual = true});
}

TEST_CASE("int8 gemm sums exactly where 16 bits, and fp32, would not") {
  // Every product is 255 * 127: the largest sum there can be.
  const index_t k = kernels::max_gemm_depth;
  const kernels::matrix_kernels& matrix = kernels::active().matrix(precision::int8);
  for (const float sign : {1.0f, -1.0f}) {
    const tensor<float> a = [&] {
      tensor<float> t(shape{k});
      std::fill(t.begin(), t.end(), 1e9f);
      return t;
    }();
    tensor<float> b(shape{k});
    std::fill(b.begin(), b.end(), 127.0f * sign);
    b[k - 1] = 126.0f * sign;
    tensor<std::byte> packed(shape{matrix.packed_bytes(k, 1)});
    const levels input(k, 0.5f, 0);
    matrix.pack_b(k, 1, b.data(), 1, 1, input.get().zero_point, packed.data());
    const float scale = 1.0f, *row = a.data();
    float result = 0, *out = &result;
    matrix.gemm({.m = 1,
                 .n = 1,
                 .k = k,
                 .a = &row,
                 .b = packed.data(),
                 .c = &out,
                 .scale = &scale,
                 .input = input.get()});
    CHECK(result == static_cast<float>(255LL * (127 * k - 1)) * sign);
  }
}

TEST_CASE("int8 gemm applies activations as the element-wise kernel does") {
  const int8_gemm product({.m = 17, .n = 21, .k = 33, .residual = true});
  for (const auto act : {kernels::activation::relu, kernels::activation::gelu}) {
    tensor<float> plain = product.run_packed(precision::int8, product.b());
    kernels::active().activate(act, plain.size(), plain.data(), plain.data());
    const tensor<float> fused = product.run_packed(precision::int8, product.b(), act);
    for (index_t row = 0; row < 17; ++row)
      CHECK(std::equal(fused.row(row), fused.row(row) + 21, plain.row(row)));
  }
}

TEST_CASE("quantising rounds to even, clamps, and keeps zero exact") {
  const std::vector<float> x = {0.0f,   -0.0f,   0.25f, 0.75f,  1.25f, -0.25f, -0.75f,
                                63.4f,  63.8f,   1e30f, -1e30f, 64.0f, -31.9f, -32.1f,
                                -64.0f, 0.2499f, 10.3f, 11.1f,  -7.7f};
  for (const int zero_point : {0, 64, 255}) {
    const auto count = static_cast<index_t>(x.size());
    const levels to(count, 0.5f, zero_point);
    std::vector<float> out(x.size() + 1, 77.0f);
    kernels::active().quantize(1, count, x.data(), to.get(), out.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
      CAPTURE(x[i]);
      CHECK(out[i] == static_cast<float>(to.of(x[i], static_cast<index_t>(i))));
    }
    CHECK(out[0] == 0);
    CHECK(out.back() == 77.0f);
  }
}

TEST_CASE("quantising channels, each with its own scale") {
  for (const index_t channels : {1, 3, 8, 16, 37}) {
    const index_t rows = 5;
    const tensor<float> x = random_tensor({rows, channels}, 1, 3.0f);
    const levels to(channels, 0.003f, 41, false);
    tensor<float> out(shape{rows, channels});
    kernels::active().quantize(rows, channels, x.data(), to.get(), out.data());
    for (index_t i = 0; i < x.size(); ++i) {
      CAPTURE(i);
      CHECK(out[i] == static_cast<float>(to.of(x[i], i % channels)));
    }
  }
}

TEST_CASE("int8 depthwise 3x3 equals the exact reference bit for bit") {
  for (const index_t channels : {1, 3, 8, 16, 37})
    for (const index_t stride : {1, 2})
      for (const index_t n_out : {1, 2, 5, 17})
        for (const int missing : {0, 1, 4, 5}) {  // bit i: row i is outside the map
          CAPTURE(channels);
          CAPTURE(stride);
          CAPTURE(n_out);
          const index_t n_in = (n_out - 1) * stride + 2;
          tensor<float> x = random_tensor({3, n_in * channels}, 1, 2.0f);
          const levels input(channels, 0.01f, 113, false);
          kernels::active().quantize(3 * n_in, channels, x.data(), input.get(), x.data());
          const tensor<float> weights = random_weights({9, channels}, 2);
          const tensor<float> bias = random_tensor({channels}, 3);
          const tensor<float> scale = random_scale(channels, 4);
          tensor<float> fast(shape{n_out, channels}), slow(shape{n_out, channels});
          kernels::depthwise_args args{.rows = {x.row(0), x.row(1), x.row(2)},
                                       .n_in = n_in,
                                       .n_out = n_out,
                                       .first = 1,
                                       .stride = stride,
                                       .channels = channels,
                                       .weights = weights.data(),
                                       .bias = bias.data(),
                                       .out = fast.data(),
                                       .scale = scale.data()};
          for (int i = 0; i < 3; ++i)
            if (missing >> i & 1) args.rows[i] = nullptr;
          kernels::active().depthwise(args);
          args.out = slow.data();
          kernels::reference::depthwise_int8(args);
          CHECK(max_error(fast, slow) <= tolerance());
        }
}

}  // namespace microtome::tests
