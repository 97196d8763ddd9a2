#pragma once

#include <string>

#include <microtome/ops/linear.hpp>

namespace microtome {

/// A map of token-major pixels: (height * width, channels).
struct map_size {
  index_t height = 0;
  index_t width = 0;
  constexpr index_t tokens() const { return height * width; }
  /// Size after a 3x3 convolution with padding 1 at the given stride.
  constexpr map_size strided(index_t stride) const {
    return {(height - 1) / stride + 1, (width - 1) / stride + 1};
  }
  friend constexpr bool operator==(map_size, map_size) = default;
};

/// Depthwise 3x3 convolution with padding 1, stride 1 or 2, over token-major pixels.
class depthwise3x3 {
public:
  depthwise3x3() = default;

  /// Reads `<name>.weight` (channels, 1, 3, 3) and `<name>.bias` (channels).
  depthwise3x3(const weights& file, const std::string& name, index_t channels, index_t stride)
      : stride_(stride),
        weights_(shape{9, channels}),
        bias_(file.read(name + ".bias", {channels})) {
    const tensor<float> read = file.read(name + ".weight", {channels, 1, 3, 3});
    for (index_t c = 0; c < channels; ++c)
      for (index_t tap = 0; tap < 9; ++tap) weights_[tap * channels + c] = read[c * 9 + tap];
  }

  index_t channels() const { return bias_.size(); }
  index_t stride() const { return stride_; }

  /// Serial: `n_out` pixels of one row from three rows of `n_in` pixels (null: zeros). The centre
  /// of output x is input column x * stride + first.
  void row(const float* const (&in)[3], index_t n_in, index_t first, index_t n_out, float* result,
           activation act = activation::none) const {
    kernels::active().depthwise3x3({.rows = {in[0], in[1], in[2]},
                                    .n_in = n_in,
                                    .n_out = n_out,
                                    .first = first,
                                    .stride = stride_,
                                    .channels = channels(),
                                    .weights = weights_.data(),
                                    .bias = bias_.data(),
                                    .out = result,
                                    .act = act});
  }

  /// Serial: `count` rows of the result's map, from row y on, of x (size.tokens(), channels).
  void rows(map_size size, view<const float> x, index_t y, index_t count, float* result,
            activation act = activation::none) const {
    const index_t width = size.strided(stride_).width;
    for (index_t last = y + count; y < last; ++y, result += width * channels()) {
      const float* in[3];
      for (index_t i = 0; i < 3; ++i) {
        const index_t source = y * stride_ + i - 1;
        in[i] = source < 0 || source >= size.height ? nullptr : x.row(source * size.width);
      }
      row(in, size.width, 0, width, result, act);
    }
  }

  /// x is (size.tokens(), channels), result is (size.strided(stride).tokens(), channels).
  void operator()(workspace& ws, map_size size, view<const float> x, view<float> result,
                  activation act = activation::none) const {
    const map_size out = size.strided(stride_);
    ws.parallel(out.height,
                [&](index_t y, scratch) { rows(size, x, y, 1, result.row(y * out.width), act); });
  }

private:
  index_t stride_ = 1;
  tensor<float> weights_;  // (3, 3, channels)
  tensor<float> bias_;     // (channels)
};

}  // namespace microtome
