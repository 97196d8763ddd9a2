#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "../support.hpp"

namespace microtome::tests {

TEST_CASE("Winograd's transforms equal the scalar reference") {
  const kernels::table& kernel = kernels::active();
  for (const index_t channels : {1, 3, 8, 13, 16, 37}) {
    CAPTURE(channels);
    const tensor<float> x = random_tensor({36, channels}, 1);
    const auto pixels = row_pointers_of<const float>(x.data(), 36, channels);
    const index_t stride = channels + 5;
    tensor<float> fast(shape{36, stride}), slow(shape{36, stride});
    kernels::winograd_input_args args{
        .channels = channels, .x = pixels.data(), .out = fast.data(), .out_stride = stride};
    kernel.winograd_input(args);
    args.out = slow.data();
    kernels::reference::winograd_input(args);
    CHECK(max_error(fast, slow) < 2e-5);

    const tensor<float> taps = random_tensor({9, stride}, 4);
    kernels::winograd_weights_args weights{.n = channels,
                                           .g = taps.data(),
                                           .g_stride = stride,
                                           .out = fast.data(),
                                           .out_stride = stride};
    kernel.winograd_weights(weights);
    tensor<float> exact(shape{36, stride});
    weights.out = exact.data();
    kernels::reference::winograd_weights(weights);
    for (index_t i = 0; i < 36; ++i)
      for (index_t c = 0; c < channels; ++c)
        CHECK(std::abs(fast[i * stride + c] - exact[i * stride + c]) < 3e-7);

    const tensor<float> bias = random_tensor({channels}, 2);
    const tensor<float> added = random_tensor({16, channels}, 3, 100.0f);
    const auto residual = row_pointers_of<const float>(added.data(), 16, channels);
    for (const auto act : {kernels::activation::none, kernels::activation::gelu_tanh}) {
      tensor<float> a(shape{16, channels}), b(shape{16, channels});
      auto to = row_pointers_of(a.data(), 16, channels);
      to[3] = to[14] = nullptr;
      const kernels::winograd_output_args out{
          .channels = channels,
          .m = slow.data(),
          .m_stride = stride,
          .out = to.data(),
          .bias = bias.data(),
          .residual = act == kernels::activation::none ? residual.data() : nullptr,
          .act = act};
      kernel.winograd_output(out);
      const auto reference_to = row_pointers_of(b.data(), 16, channels);
      kernels::winograd_output_args reference = out;
      reference.out = reference_to.data();
      kernels::reference::winograd_output(reference);
      for (const index_t absent : {3, 14})
        for (index_t c = 0; c < channels; ++c) {
          CHECK(a[absent * channels + c] == 0);
          b[absent * channels + c] = 0;
        }
      const float largest = *std::max_element(b.begin(), b.end());
      CHECK(max_error(a, b) < 2e-6 * double{largest});
    }
  }
}

TEST_CASE("Winograd's transforms make a 3x3 convolution") {
  // By the scalar reference: whether the matrices are right.
  const tensor<float> x = random_tensor({36}, 1), g = random_tensor({9}, 2);
  const auto pixels = row_pointers_of<const float>(x.data(), 36, 1);
  tensor<float> tile(shape{36}), y(shape{16});
  kernels::reference::winograd_input(
      {.channels = 1, .x = pixels.data(), .out = tile.data(), .out_stride = 1});
  tensor<float> weights(shape{36});
  kernels::reference::winograd_weights(
      {.n = 1, .g = g.data(), .g_stride = 1, .out = weights.data(), .out_stride = 1});
  for (index_t i = 0; i < 36; ++i) tile[i] *= weights[i];
  const auto to = row_pointers_of(y.data(), 16, 1);
  kernels::reference::winograd_output(
      {.channels = 1, .m = tile.data(), .m_stride = 1, .out = to.data(), .bias = nullptr});
  for (index_t i = 0; i < 16; ++i) {
    double sum = 0;
    for (index_t k = 0; k < 9; ++k) sum += double{x[(i / 4 + k / 3) * 6 + i % 4 + k % 3]} * g[k];
    CHECK(std::abs(y[i] - sum) < 1e-5);
  }
}

}  // namespace microtome::tests
