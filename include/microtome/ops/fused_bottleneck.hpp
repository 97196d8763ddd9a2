#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <string>

#include <microtome/ops/convolution.hpp>

namespace microtome {

/// Fused MBConv (Gupta and Tan, EfficientNet-EdgeTPU, 2019), as EfficientViT has it: a 3x3
/// convolution to hidden channels, GELU by tanh, and a 1x1 convolution. The hidden map (67 MB for
/// 256 channels at 256 x 256) is made and used in bands of rows.
class fused_bottleneck {
public:
  fused_bottleneck() = default;

  /// Reads `<name>.spatial_conv.conv` and `<name>.point_conv.conv` (BatchNorm folded). With
  /// `shortcut` the input is added to the output.
  fused_bottleneck(const weights& file, const std::string& name, index_t in, index_t hidden,
                   index_t out, index_t stride, bool shortcut)
      : name_(name),
        spatial(file, name + ".spatial_conv.conv", in, hidden, stride, true),
        point(linear::pointwise(file, name + ".point_conv.conv", hidden, out)),
        shortcut_(shortcut) {}

  index_t out() const { return point.out(); }
  index_t stride() const { return spatial.stride(); }

  /// x is (size.tokens(), in), result is (size.strided(stride).tokens(), out) and not x.
  void operator()(workspace& ws, map_size size, view<const float> x, view<float> result) const {
    const map_size out_size = size.strided(stride());
    const index_t band = band_rows(out_size);
    frame memory(ws.memory());
    const view<float> hidden = memory.take({band * out_size.width, spatial.out()});
    for (index_t y = 0; y < out_size.height; y += band) {
      const index_t rows = std::min(band, out_size.height - y);
      const index_t token = y * out_size.width, tokens = rows * out_size.width;
      spatial.rows(ws, size, x, y, rows, hidden.data(), activation::gelu_tanh);
      point(ws, {hidden.data(), {tokens, spatial.out()}}, {result.row(token), {tokens, out()}},
            activation::none, shortcut_ ? x.row(token) : nullptr);
    }
    if (ws.trace) record_parts(ws, size, x);
  }

  index_t memory(map_size size) const {
    const map_size out_size = size.strided(stride());
    const index_t band = band_rows(out_size);
    return arena::rounded(band * out_size.width * spatial.out()) + spatial.memory(size, band);
  }
  std::size_t scratch_bytes(map_size size) const {
    return spatial.scratch_bytes(size, band_rows(size.strided(stride())));
  }
  /// Multiply-adds on a map of this size.
  index_t macs(map_size size) const {
    return size.strided(stride()).tokens() * (spatial.macs() + point.in() * out());
  }

private:
  /// Rows of which the hidden ones take about 3 MB; whole tiles of Winograd's.
  index_t band_rows(map_size out_size) const {
    const index_t fit = (3 << 18) / (out_size.width * spatial.out()) / 4 * 4;
    return std::clamp<index_t>(fit, std::min<index_t>(4, out_size.height), out_size.height);
  }

  /// The parts one by one: for traces only.
  void record_parts(workspace& ws, map_size size, view<const float> x) const {
    const std::string first = name_ + ".spatial_conv", second = name_ + ".point_conv";
    if (!ws.tracing(first) && !ws.tracing(second)) return;
    const map_size out_size = size.strided(stride());
    tensor<float> hidden(shape{out_size.tokens(), spatial.out()});
    spatial(ws, size, x, hidden, activation::gelu_tanh);
    ws.record(first, hidden, layout::pixels, out_size.width);
    tensor<float> projected(shape{out_size.tokens(), out()});
    point(ws, hidden, projected);
    ws.record(second, projected, layout::pixels, out_size.width);
  }

  std::string name_;

public:
  convolution3x3 spatial;
  linear point;

private:
  bool shortcut_ = false;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
