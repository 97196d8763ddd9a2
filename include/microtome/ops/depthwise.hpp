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

/// Depthwise 3x3 convolution with padding 1, stride 1 or 2, over token-major pixels.
///
/// In int8 it reads whole numbers: `take` makes them, once for the three rows of output that look
/// at a row of input.
class depthwise3x3 {
public:
  depthwise3x3() = default;

  /// Reads `<name>.weight` (channels, 1, 3, 3) and `<name>.bias` (channels). There are no products
  /// in bf16, nor for 8-bit weights alone: those are multiplied in fp32.
  depthwise3x3(const weights& file, const std::string& name, index_t channels, index_t stride)
      : stride_(stride),
        weights_(shape{9, channels}),
        bias_(file.read(name + ".bias", {channels})) {
    const layer_weight layer = file.depthwise(name, channels);
    observer_ = layer.observer;
    const tensor<float> read = layer.inputs == precision::int8 ? layer.values : layer.dequantized();
    for (index_t c = 0; c < channels; ++c)
      for (index_t tap = 0; tap < 9; ++tap) weights_[tap * channels + c] = read[c * 9 + tap];
    if (layer.inputs != precision::int8) return;
    scale_ = tensor<float>(shape{channels});
    for (index_t c = 0; c < channels; ++c)
      scale_[c] = layer.scale[c] * layer.input[layer.input.size() == 1 ? 0 : std::size_t(c)].scale;
    input_ = input_levels(layer);
  }

  index_t channels() const { return bias_.size(); }
  index_t stride() const { return stride_; }
  bool quantized() const { return !scale_.empty(); }

  /// Makes `count` pixels what `row` reads, in `out`, which may be x.
  void take(index_t count, const float* x, float* out) const {
    if (quantized())
      kernels::active().quantize(count, channels(), x, input_.get(), out);
    else if (x != out)
      std::copy_n(x, count * channels(), out);
  }

  /// Serial: `n_out` pixels of one row from three rows of `n_in` pixels (null: zeros) that `take`
  /// made. The centre of output x is input column x * stride + first.
  void row(const float* const (&in)[3], index_t n_in, index_t first, index_t n_out, float* result,
           activation act = activation::none) const {
    if (observer_) show(in, n_in, first, n_out);
    kernels::active().depthwise3x3({.rows = {in[0], in[1], in[2]},
                                    .n_in = n_in,
                                    .n_out = n_out,
                                    .first = first,
                                    .stride = stride_,
                                    .channels = channels(),
                                    .weights = weights_.data(),
                                    .bias = bias_.data(),
                                    .out = result,
                                    .act = act,
                                    .scale = quantized() ? scale_.data() : nullptr});
  }

  /// Floats of scratch that `rows` takes for a map of this width.
  index_t ring_floats(index_t width) const { return quantized() ? 3 * width * channels() : 0; }

  /// Serial: `count` rows of the result's map, from row y on, of x (size.tokens(), channels).
  void rows(map_size size, view<const float> x, index_t y, index_t count, float* result,
            scratch memory, activation act = activation::none) const {
    const index_t width = size.strided(stride_).width;
    float* ring = memory.take<float>(ring_floats(size.width));
    index_t next = std::max<index_t>(0, y * stride_ - 1);  // first row not yet taken
    for (index_t last = y + count; y < last; ++y, result += width * channels()) {
      const float* in[3] = {};
      for (index_t i = 0; i < 3; ++i) {
        const index_t source = y * stride_ + i - 1;
        if (source < 0 || source >= size.height) continue;
        in[i] = x.row(source * size.width);
        if (ring_floats(size.width) == 0) continue;
        float* slot = ring + source % 3 * size.width * channels();
        if (source >= next) take(size.width, in[i], slot);
        next = std::max(next, source + 1);
        in[i] = slot;
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
  /// Shows the observer what `row` multiplies: nine pixels for each of the output.
  void show(const float* const (&in)[3], index_t n_in, index_t first, index_t n_out) const {
    const tensor<float> outside(shape{channels()});
    std::array<const float*, 9 * max_rows> x;
    for (index_t start = 0; start < n_out; start += max_rows) {
      const index_t count = std::min(max_rows, n_out - start);
      for (index_t tap = 0; tap < 9; ++tap)
        for (index_t i = 0; i < count; ++i) {
          const float* row = in[tap / 3];
          const index_t column = (start + i) * stride_ + first + tap % 3 - 1;
          x[static_cast<std::size_t>(tap * count + i)] =
              row && column >= 0 && column < n_in ? row + column * channels() : outside.data();
        }
      observer_->see(9, count, channels(), x.data());
    }
  }

  index_t stride_ = 1;
  tensor<float> weights_;  // (3, 3, channels)
  tensor<float> bias_;     // (channels)
  // In int8:
  tensor<float> scale_;  // (channels), of pixels times weights
  input_levels input_;   // of pixels
  input_observer* observer_ = nullptr;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
