#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <span>
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

/// Depthwise convolution of 3x3 or 5x5, stride 1 or 2, over token-major pixels, padded with zeros
/// so that the map keeps its size at stride 1.
///
/// In int8 it reads whole numbers: `take` makes them, once for all rows of output that look at a
/// row of input.
class depthwise_convolution {
public:
  /// Rows of input that a row of output looks at; those beyond the side are null.
  using window = std::array<const float*, 5>;

  depthwise_convolution() = default;

  /// Reads `<name>.weight` (channels, 1, side, side) and, where `with_bias` says so, `<name>.bias`
  /// (channels). There are no products in bf16, nor for 8-bit weights alone: those are multiplied
  /// in fp32.
  depthwise_convolution(const weights& file, const std::string& name, index_t channels,
                        index_t stride, index_t side = 3, bool with_bias = true)
      : side_(side),
        stride_(stride),
        weights_(shape{side * side, channels}),
        bias_(with_bias ? file.read(name + ".bias", {channels}) : tensor<float>(shape{channels})) {
    const layer_weight layer = file.depthwise(name, channels, side);
    observer_ = layer.observer;
    const tensor<float> read = layer.inputs == precision::int8 ? layer.values : layer.dequantized();
    for (index_t c = 0; c < channels; ++c)
      for (index_t tap = 0; tap < side * side; ++tap)
        weights_[tap * channels + c] = read[c * side * side + tap];
    if (layer.inputs != precision::int8) return;
    scale_ = tensor<float>(shape{channels});
    for (index_t c = 0; c < channels; ++c)
      scale_[c] = layer.scale[c] * layer.input[layer.input.size() == 1 ? 0 : std::size_t(c)].scale;
    input_ = input_levels(layer);
  }

  index_t channels() const { return bias_.size(); }
  index_t side() const { return side_; }
  index_t stride() const { return stride_; }
  bool quantized() const { return !scale_.empty(); }

  /// Makes `count` pixels what `row` reads, in `out`, which may be x.
  void take(index_t count, const float* x, float* out) const {
    if (quantized())
      kernels::active().quantize(count, channels(), x, input_.get(), out);
    else if (x != out)
      std::copy_n(x, count * channels(), out);
  }

  /// Serial: `n_out` pixels of one row from rows of `n_in` pixels (null: zeros) that `take`
  /// made. The centre of output x is input column x * stride + first.
  void row(const window& in, index_t n_in, index_t first, index_t n_out, float* result,
           activation act = activation::none) const {
    if (observer_) show(in, n_in, first, n_out);
    kernels::active().depthwise({.rows = {in[0], in[1], in[2], in[3], in[4]},
                                 .n_in = n_in,
                                 .n_out = n_out,
                                 .first = first,
                                 .stride = stride_,
                                 .channels = channels(),
                                 .weights = weights_.data(),
                                 .bias = bias_.data(),
                                 .out = result,
                                 .act = act,
                                 .scale = quantized() ? scale_.data() : nullptr,
                                 .side = side_});
  }

  /// Floats of scratch that `rows` takes for a map of this width.
  index_t ring_floats(index_t width) const { return quantized() ? side_ * width * channels() : 0; }

  /// Serial: `count` rows of the result's map, from row y on, of x (size.tokens(), channels).
  void rows(map_size size, view<const float> x, index_t y, index_t count, float* result,
            scratch memory, activation act = activation::none) const {
    const index_t width = size.strided(stride_).width;
    float* ring = memory.take<float>(ring_floats(size.width));
    index_t next = std::max<index_t>(0, y * stride_ - side_ / 2);  // first row not yet taken
    for (index_t last = y + count; y < last; ++y, result += width * channels()) {
      window in = {};
      for (index_t i = 0; i < side_; ++i) {
        const index_t source = y * stride_ + i - side_ / 2;
        if (source < 0 || source >= size.height) continue;
        const float* row = x.row(source * size.width);
        if (quantized()) {
          float* slot = ring + source % side_ * size.width * channels();
          if (source >= next) take(size.width, row, slot);
          next = std::max(next, source + 1);
          row = slot;
        }
        in[static_cast<std::size_t>(i)] = row;
      }
      row(in, size.width, 0, width, result, act);
    }
  }

  /// Serial, and allocates: for traces. x is (size.tokens(), channels), result is
  /// (size.strided(stride).tokens(), channels).
  void operator()(map_size size, view<const float> x, view<float> result) const {
    tensor<float> ring(shape{arena::rounded(ring_floats(size.width))});
    rows(size, x, 0, size.strided(stride_).height, result.data(),
         scratch(std::as_writable_bytes(
             std::span(ring.data(), static_cast<std::size_t>(ring.size())))));
  }

private:
  /// Shows the observer what `row` multiplies: side * side pixels for each of the output.
  void show(const window& in, index_t n_in, index_t first, index_t n_out) const {
    const tensor<float> outside(shape{channels()});
    const index_t taps = side_ * side_;
    std::array<const float*, 25 * max_rows> x;
    for (index_t start = 0; start < n_out; start += max_rows) {
      const index_t count = std::min(max_rows, n_out - start);
      for (index_t tap = 0; tap < taps; ++tap)
        for (index_t i = 0; i < count; ++i) {
          const float* row = in[static_cast<std::size_t>(tap / side_)];
          const index_t column = (start + i) * stride_ + first + tap % side_ - side_ / 2;
          x[static_cast<std::size_t>(tap * count + i)] =
              row && column >= 0 && column < n_in ? row + column * channels() : outside.data();
        }
      observer_->see(taps, count, channels(), x.data());
    }
  }

  index_t side_ = 3;
  index_t stride_ = 1;
  tensor<float> weights_;  // (side, side, channels)
  tensor<float> bias_;     // (channels)
  // In int8:
  tensor<float> scale_;  // (channels), of pixels times weights
  input_levels input_;   // of pixels
  input_observer* observer_ = nullptr;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
