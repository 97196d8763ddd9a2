#include <microtome/ops/convolution.hpp>
#include <microtome/ops/inverted_bottleneck.hpp>

#include <kernels/reference.hpp>

#include "../file_builder.hpp"

namespace microtome::tests {

namespace {

/// A convolution over token-major pixels, as its definition says, in double precision. weight is
/// (out, in / groups, side, side).
tensor<float> convolve(map_size size, const tensor<float>& x, const tensor<float>& weight,
                       const float* bias, index_t stride, index_t pad, bool depthwise) {
  const index_t out = weight.extent(0), in = x.extent(1), side = weight.extent(2);
  const map_size out_size{(size.height + 2 * pad - side) / stride + 1,
                          (size.width + 2 * pad - side) / stride + 1};
  tensor<float> result(shape{out_size.tokens(), out});
  for (index_t y = 0; y < out_size.height; ++y)
    for (index_t column = 0; column < out_size.width; ++column)
      for (index_t o = 0; o < out; ++o) {
        double sum = bias ? bias[o] : 0.0;
        for (index_t i = 0; i < side; ++i)
          for (index_t j = 0; j < side; ++j) {
            const index_t sy = y * stride + i - pad, sx = column * stride + j - pad;
            if (sy < 0 || sx < 0 || sy >= size.height || sx >= size.width) continue;
            const float* pixel = x.row(sy * size.width + sx);
            if (depthwise)
              sum += double{pixel[o]} * weight[(o * side + i) * side + j];
            else
              for (index_t c = 0; c < in; ++c)
                sum += double{pixel[c]} * weight[((o * in + c) * side + i) * side + j];
          }
        result[(y * out_size.width + column) * out + o] = static_cast<float>(sum);
      }
  return result;
}

void apply(kernels::activation act, tensor<float>& x) {
  for (float& value : x)
    value = static_cast<float>(kernels::reference::activate(act, double{value}));
}

}  // namespace

TEST_CASE("3x3 convolution on odd maps") {
  for (const map_size size : {map_size{1, 1}, {2, 3}, {7, 5}, {13, 29}}) {
    const auto bytes = file_builder().add("conv.weight", {19, 11, 3, 3}, 1, 0.3f).bytes();
    const safetensors file(bytes);
    const convolution3x3 conv(file, "conv", 11, 19);
    const tensor<float> x = random_tensor({size.tokens(), 11}, 2);
    tensor<float> got(shape{size.tokens(), 19});
    workspace ws(2, 0, 0);
    conv(ws, size, x, got);
    const tensor<float> weight = file.read("conv.weight", {19, 11, 3, 3});
    CHECK(max_error(got, convolve(size, x, weight, nullptr, 1, 1, false)) < 2e-5);
  }
}

TEST_CASE("2x2 convolution of stride 2") {
  const map_size size{6, 22};
  const auto bytes = file_builder()
                         .add("conv.weight", {13, 5, 2, 2}, 1, 0.5f)
                         .add("conv.bias", {13}, 2, 1.0f)
                         .bytes();
  const safetensors file(bytes);
  const convolution2x2 conv(file, "conv", 5, 13);
  const tensor<float> x = random_tensor({size.tokens(), 5}, 3);
  tensor<float> got(shape{size.tokens() / 4, 13});
  workspace ws(2, 0, 0);
  conv(ws, size, x, got);
  const tensor<float> weight = file.read("conv.weight", {13, 5, 2, 2});
  const tensor<float> bias = file.read("conv.bias", {13});
  CHECK(max_error(got, convolve(size, x, weight, bias.data(), 2, 0, false)) < 1e-5);
}

TEST_CASE("transposed 2x2 convolution of stride 2") {
  const index_t count = 150, in = 9, out = 7;
  const auto bytes = file_builder()
                         .add("up.weight", {in, out, 2, 2}, 1, 0.5f)
                         .add("up.bias", {out}, 2, 1.0f)
                         .bytes();
  const safetensors file(bytes);
  const transposed_convolution2x2 up(file, "up", in, out);
  const tensor<float> x = random_tensor({count, in}, 3);
  tensor<float> upper(shape{2 * count, out}), lower(upper.extents());
  up.row(count, x.data(), upper.data(), lower.data());
  const tensor<float> weight = file.read("up.weight", {in, out, 2, 2});
  const tensor<float> bias = file.read("up.bias", {out});
  double worst = 0;
  for (index_t p = 0; p < count; ++p)
    for (index_t o = 0; o < out; ++o)
      for (index_t dy = 0; dy < 2; ++dy)
        for (index_t dx = 0; dx < 2; ++dx) {
          double sum = bias[o];
          for (index_t i = 0; i < in; ++i)
            sum += double{x[p * in + i]} * weight[((i * out + o) * 2 + dy) * 2 + dx];
          const float got = (dy ? lower : upper)[(2 * p + dx) * out + o];
          worst = std::max(worst, std::abs(got - sum));
        }
  CHECK(worst < 1e-5);
}

TEST_CASE("the fused inverted bottleneck equals its three convolutions") {
  struct shape_case {
    map_size size;
    index_t in, hidden, out, stride;
    bool shortcut;
  };
  for (const shape_case& c : {shape_case{{1, 1}, 3, 5, 4, 1, false},
                              {{5, 7}, 6, 13, 6, 1, true},
                              {{6, 9}, 6, 17, 10, 2, false},
                              {{41, 37}, 8, 24, 8, 1, true},
                              {{33, 71}, 9, 260, 21, 2, false},
                              {{19, 150}, 5, 256, 5, 1, true},
                              {{70, 20}, 12, 500, 7, 2, false}}) {
    CAPTURE(c.size.height);
    CAPTURE(c.size.width);
    CAPTURE(c.stride);
    const auto bytes = file_builder()
                           .add("m.conv1.c.weight", {c.hidden, c.in, 1, 1}, 1, 0.4f)
                           .add("m.conv1.c.bias", {c.hidden}, 2, 0.5f)
                           .add("m.conv2.c.weight", {c.hidden, 1, 3, 3}, 3, 0.4f)
                           .add("m.conv2.c.bias", {c.hidden}, 4, 0.5f)
                           .add("m.conv3.c.weight", {c.out, c.hidden, 1, 1}, 5, 0.1f)
                           .add("m.conv3.c.bias", {c.out}, 6, 0.5f)
                           .bytes();
    const safetensors file(bytes);
    const inverted_bottleneck m(file, "m", c.in, c.hidden, c.out, c.stride, c.shortcut);
    const tensor<float> x = random_tensor({c.size.tokens(), c.in}, 7);
    const map_size half = c.size.strided(c.stride);

    tensor<float> y = convolve(c.size, x, file.read("m.conv1.c.weight", {c.hidden, c.in, 1, 1}),
                               file.read("m.conv1.c.bias", {c.hidden}).data(), 1, 0, false);
    apply(kernels::activation::gelu, y);
    y = convolve(c.size, y, file.read("m.conv2.c.weight", {c.hidden, 1, 3, 3}),
                 file.read("m.conv2.c.bias", {c.hidden}).data(), c.stride, 1, true);
    apply(kernels::activation::gelu, y);
    y = convolve(half, y, file.read("m.conv3.c.weight", {c.out, c.hidden, 1, 1}),
                 file.read("m.conv3.c.bias", {c.out}).data(), 1, 0, false);
    if (c.shortcut) {
      for (index_t i = 0; i < y.size(); ++i) y[i] += x[i];
      apply(kernels::activation::gelu, y);
    }

    tensor<float> first(y.extents());
    for (const int threads : {1, 2, 3, 7}) {
      workspace ws(threads, 0, m.scratch_bytes(c.size));
      tensor<float> got(y.extents());
      m(ws, c.size, x, got);
      CHECK(max_error(got, y) < 5e-5);
      if (threads == 1) first = got;
      CHECK(std::equal(got.begin(), got.end(), first.begin()));
    }
  }
}

}  // namespace microtome::tests
