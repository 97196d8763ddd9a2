#include <microtome/ops/bicubic.hpp>
#include <microtome/ops/convolution.hpp>
#include <microtome/ops/fused_bottleneck.hpp>
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

TEST_CASE("3x3 convolution on odd maps, also by Winograd's algorithm") {
  struct shape_case {
    map_size size;
    index_t in, out, stride;
    bool bias, residual;
  };
  for (const shape_case& c : {shape_case{{1, 1}, 11, 19, 1, false, false},
                              {{2, 3}, 11, 19, 1, true, true},
                              {{7, 5}, 3, 19, 2, true, false},
                              {{13, 29}, 16, 16, 1, false, true},
                              {{13, 30}, 17, 19, 1, true, true},
                              {{4, 4}, 37, 24, 1, true, false},
                              {{9, 6}, 131, 75, 1, true, true},
                              {{14, 9}, 21, 40, 2, false, true}})
    for (const bool winograd : {false, true}) {
      CAPTURE(c.size.height);
      CAPTURE(c.size.width);
      CAPTURE(winograd);
      const map_size out = c.size.strided(c.stride);
      const auto bytes = file_builder()
                             .add("conv.weight", {c.out, c.in, 3, 3}, 1, c.in > 100 ? 0.1f : 0.3f)
                             .add("conv.bias", {c.out}, 2, 0.5f)
                             .bytes();
      const safetensors file(bytes);
      const weights read(file, precision::fp32, nullptr, sparsity::automatic, winograd);
      const convolution3x3 conv(read, "conv", c.in, c.out, c.stride, c.bias);
      const tensor<float> x = random_tensor({c.size.tokens(), c.in}, 3);
      const tensor<float> residual = random_tensor({out.tokens(), c.out}, 4);
      const tensor<float> bias = file.read("conv.bias", {c.out});
      tensor<float> expected = convolve(c.size, x, file.read("conv.weight", {c.out, c.in, 3, 3}),
                                        c.bias ? bias.data() : nullptr, c.stride, 1, false);
      if (c.residual)
        for (index_t i = 0; i < expected.size(); ++i) expected[i] += residual[i];
      apply(kernels::activation::gelu_tanh, expected);
      tensor<float> first(expected.extents());
      for (const int threads : {1, 2, 5}) {
        workspace ws(threads, conv.memory(c.size), conv.scratch_bytes(c.size));
        tensor<float> got = c.residual ? residual : tensor<float>(expected.extents());
        // The result may lie where the residual does.
        conv(ws, c.size, x, got, kernels::activation::gelu_tanh, c.residual ? got.data() : nullptr);
        CHECK(max_error(got, expected) < 1e-4);
        if (threads == 1) first = got;
        CHECK(std::equal(got.begin(), got.end(), first.begin()));
      }
    }
}

TEST_CASE("Winograd's algorithm in bands, and rows from the middle, make the plain sums") {
  const map_size size{93, 61};
  const index_t in = 16, out = 344;
  const auto bytes = file_builder().add("conv.weight", {out, in, 3, 3}, 1, 0.05f).bytes();
  const safetensors file(bytes);
  const auto conv = [&](bool winograd) {
    return convolution3x3(weights(file, precision::fp32, nullptr, sparsity::automatic, winograd),
                          "conv", in, out);
  };
  const convolution3x3 fast = conv(true), plain = conv(false);
  const tensor<float> x = random_tensor({size.tokens(), in}, 2);
  tensor<float> a(shape{size.tokens(), out}), b(a.extents());
  workspace ws(2, fast.memory(size), fast.scratch_bytes(size));
  CHECK(fast.memory(size) < 36 * 24 * 16 * (in + out));  // it takes more than one band
  fast(ws, size, x, a);
  plain(ws, size, x, b);
  const double most = 1e-4 * deviation(b);
  CHECK(max_error(a, b) < most);
  for (const index_t y : {0, 4, 5, 19}) {
    tensor<float> part(shape{7 * size.width, out});
    fast.rows(ws, size, x, y, 7, part.data());
    double worst = 0;
    for (index_t i = 0; i < part.size(); ++i)
      worst = std::max(worst, std::abs(double{part[i]} - double{b[y * size.width * out + i]}));
    CHECK(worst < most);
  }
}

namespace {

/// Makes int8 layers of all: weights from -127 to 127, the largest among them.
class whole_numbers : public layer_hook {
public:
  explicit whole_numbers(int zero_point) : zero_point_(zero_point) {}

  void load(layer_weight& layer) override {
    float most = 0;
    for (const float w : layer.values) most = std::max(most, std::abs(w));
    for (float& w : layer.values) w = std::nearbyint(w * 127 / most);
    layer.inputs = precision::int8;
    layer.scale = random_tensor({layer.out()}, 7, 1e-3f);
    layer.input = {{0.008f, zero_point_}};
  }

private:
  int zero_point_;
};

}  // namespace

TEST_CASE("3x3 convolution in int8 by Winograd's algorithm has the bits of the plain sums") {
  struct shape_case {
    map_size size;
    index_t in, out;
    int zero_point;
    bool bias, residual;
  };
  for (const shape_case& c : {shape_case{{1, 1}, 16, 16, 0, false, false},
                              {{2, 3}, 17, 19, 255, true, true},
                              {{13, 29}, 33, 16, 117, false, true},
                              {{14, 31}, 50, 45, 128, true, true},
                              {{5, 130}, 64, 37, 3, true, false},
                              {{31, 7}, 256, 40, 200, true, false},
                              {{3, 4}, 1820, 16, 255, true, false}}) {
    CAPTURE(c.size.height);
    CAPTURE(c.size.width);
    const auto bytes = file_builder()
                           .add("conv.weight", {c.out, c.in, 3, 3}, 1, 0.3f)
                           .add("conv.bias", {c.out}, 2, 0.5f)
                           .bytes();
    const safetensors file(bytes);
    whole_numbers hook(c.zero_point);
    const auto conv = [&](bool winograd) {
      const weights read(file, precision::fp32, &hook, sparsity::automatic, winograd);
      return convolution3x3(read, "conv", c.in, c.out, 1, c.bias);
    };
    const convolution3x3 fast = conv(true), plain = conv(false);
    CHECK(plain.scratch_bytes(c.size) == 0);
    CHECK((fast.scratch_bytes(c.size) > 0) == (kernels::active().winograd_int8 != nullptr));
    const tensor<float> x =
        random_tensor({c.size.tokens(), c.in}, 3, 3.0f);  // some beyond the levels
    const tensor<float> residual = random_tensor({c.size.tokens(), c.out}, 4);
    for (const auto act : {kernels::activation::none, kernels::activation::gelu_tanh})
      for (const int threads : {1, 3}) {
        workspace ws(threads, 0, fast.scratch_bytes(c.size));
        tensor<float> a = residual, b = residual;
        fast(ws, c.size, x, a, act, c.residual ? a.data() : nullptr);
        plain(ws, c.size, x, b, act, c.residual ? b.data() : nullptr);
        CHECK(std::equal(a.begin(), a.end(), b.begin()));
        const index_t rows = std::min<index_t>(c.size.height, 3), y = c.size.height - rows;
        fast.rows(ws, c.size, x, y, rows, a.data(), act);
        plain.rows(ws, c.size, x, y, rows, b.data(), act);
        CHECK(std::equal(a.begin(), a.begin() + rows * c.size.width * c.out, b.begin()));
      }
  }
}

TEST_CASE("the largest sums of an int8 convolution by Winograd's algorithm are exact") {
  // All weights and inputs as large as can be, of either sign.
  const index_t in = kernels::max_gemm_depth / 9, out = 16;
  const map_size size{3, 3};
  for (const float sign : {-1.0f, 1.0f}) {
    tensor<float> largest(shape{out, in, 3, 3});
    std::fill(largest.begin(), largest.end(), sign);
    const auto bytes = file_builder().add("conv.weight", largest).bytes();
    const safetensors file(bytes);
    whole_numbers hook(0);
    const convolution3x3 conv(weights(file, precision::fp32, &hook), "conv", in, out);
    tensor<float> x(shape{9, in}), y(shape{9, out});
    std::fill(x.begin(), x.end(), 100.0f);
    workspace ws(1, 0, conv.scratch_bytes(size));
    conv(ws, size, x, y);
    const tensor<float> scale = random_tensor({out}, 7, 1e-3f);
    for (index_t o = 0; o < out; ++o)
      CHECK(y[4 * out + o] == static_cast<float>(sign * 127 * 255 * 9 * static_cast<float>(in)) *
                                  (scale[o] * 0.008f));
  }
}

TEST_CASE("the fused bottleneck equals its two convolutions") {
  struct shape_case {
    map_size size;
    index_t in, hidden, out, stride;
    bool shortcut;
  };
  for (const shape_case& c : {shape_case{{1, 1}, 3, 5, 4, 1, false},
                              {{5, 7}, 6, 13, 6, 1, true},
                              {{6, 9}, 16, 33, 10, 2, false},
                              {{9, 13}, 17, 40, 17, 1, true}}) {
    CAPTURE(c.size.height);
    const map_size out = c.size.strided(c.stride);
    const auto bytes = file_builder()
                           .add("m.spatial_conv.conv.weight", {c.hidden, c.in, 3, 3}, 1, 0.3f)
                           .add("m.spatial_conv.conv.bias", {c.hidden}, 2, 0.5f)
                           .add("m.point_conv.conv.weight", {c.out, c.hidden, 1, 1}, 3, 0.2f)
                           .add("m.point_conv.conv.bias", {c.out}, 4, 0.5f)
                           .bytes();
    const safetensors file(bytes);
    const fused_bottleneck m(file, "m", c.in, c.hidden, c.out, c.stride, c.shortcut);
    const tensor<float> x = random_tensor({c.size.tokens(), c.in}, 5);
    tensor<float> y =
        convolve(c.size, x, file.read("m.spatial_conv.conv.weight", {c.hidden, c.in, 3, 3}),
                 file.read("m.spatial_conv.conv.bias", {c.hidden}).data(), c.stride, 1, false);
    apply(kernels::activation::gelu_tanh, y);
    y = convolve(out, y, file.read("m.point_conv.conv.weight", {c.out, c.hidden, 1, 1}),
                 file.read("m.point_conv.conv.bias", {c.out}).data(), 1, 0, false);
    if (c.shortcut)
      for (index_t i = 0; i < y.size(); ++i) y[i] += x[i];
    for (const int threads : {1, 3}) {
      workspace ws(threads, m.memory(c.size), m.scratch_bytes(c.size));
      tensor<float> got(y.extents());
      m(ws, c.size, x, got);
      CHECK(max_error(got, y) < 1e-4 * deviation(y));
    }
  }
}

TEST_CASE("bicubic interpolation is a sum over 4 x 4 pixels of Keys' kernel") {
  const auto kernel = [](double x) {
    x = std::abs(x);
    const double a = -0.75;
    if (x <= 1) return (a + 2) * x * x * x - (a + 3) * x * x + 1;
    return x < 2 ? a * (x * x * x - 5 * x * x + 8 * x - 4) : 0.0;
  };
  const map_size from{7, 5}, to{28, 17};
  const tensor<float> x = random_tensor({from.tokens(), 3}, 1);
  tensor<float> y = random_tensor({to.tokens(), 3}, 2), expected = y;  // it adds
  for (index_t i = 0; i < to.height; ++i)
    for (index_t j = 0; j < to.width; ++j)
      for (index_t c = 0; c < 3; ++c) {
        const double v = (static_cast<double>(i) + 0.5) * 7 / 28 - 0.5;
        const double u = (static_cast<double>(j) + 0.5) * 5 / 17 - 0.5;
        double sum = 0;
        for (index_t p = -3; p < 10; ++p)
          for (index_t q = -3; q < 8; ++q)
            sum +=
                kernel(v - static_cast<double>(p)) * kernel(u - static_cast<double>(q)) *
                double{
                    x[(std::clamp<index_t>(p, 0, 6) * 5 + std::clamp<index_t>(q, 0, 4)) * 3 + c]};
        expected[(i * to.width + j) * 3 + c] += static_cast<float>(sum);
      }
  workspace ws(2, 0, bicubic_scratch_bytes(from, 3));
  add_bicubic(ws, from, x, to, y);
  CHECK(max_error(y, expected) < 2e-6);
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
                              {{70, 20}, 12, 500, 7, 2, false},
                              {{28, 83}, 3, 2050, 3, 1, true},  // wide ones, in bands
                              {{37, 83}, 3, 3001, 2, 2, false}}) {
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
      workspace ws(threads, m.memory(c.size), m.scratch_bytes(c.size));
      tensor<float> got(y.extents());
      m(ws, c.size, x, got);
      CHECK(max_error(got, y) < 5e-5);
      if (threads == 1) first = got;
      CHECK(std::equal(got.begin(), got.end(), first.begin()));
    }
  }
}

}  // namespace microtome::tests
