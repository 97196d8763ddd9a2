#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <string>

#include <microtome/ops/depthwise.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// 1x1 convolution, GELU, depthwise 3x3, GELU, 1x1 convolution: the body of MBConv (Sandler et al.,
/// MobileNetV2, 2018) and of TinyViT's patch merging, fused by rows.
///
/// A task makes a strip of output columns over a band of output rows. It keeps the three hidden
/// rows that the depthwise convolution looks at in a ring in L2, so the hidden tensor (67 MB for 64
/// channels expanded to 256 at 256 x 256) is never written to memory. Strips compute the hidden
/// columns at their sides twice (2 of 66), bands their first rows.
class inverted_bottleneck {
public:
  inverted_bottleneck() = default;

  /// Reads `<name>.conv1.c`, `<name>.conv2.c` and `<name>.conv3.c` (BatchNorm folded). With
  /// `shortcut` the input is added to the output, and the sum goes through GELU.
  inverted_bottleneck(const weights& file, const std::string& name, index_t in, index_t hidden,
                      index_t out, index_t stride, bool shortcut)
      : name_(name),
        expand_(linear::pointwise(file, name + ".conv1.c", in, hidden)),
        depthwise_(file, name + ".conv2.c", hidden, stride),
        project_(linear::pointwise(file, name + ".conv3.c", hidden, out)),
        shortcut_(shortcut) {
    if (shortcut && (in != out || stride != 1))
      fail(name, ": a shortcut needs equal input and output, got ", in, " and ", out,
           " channels at stride ", stride);
  }

  index_t in() const { return expand_.in(); }
  index_t out() const { return project_.out(); }
  index_t stride() const { return depthwise_.stride(); }
  const std::string& name() const { return name_; }

  /// Scratch bytes that a thread needs for a map of this size.
  std::size_t scratch_bytes(map_size size) const {
    const index_t columns = strip_columns(size.strided(stride()).width);
    return scratch::bytes_of<float>(3 * input_columns(columns) * hidden()) +
           scratch::bytes_of<float>(columns * hidden());
  }

  /// x is (size.tokens(), in), result is (size.strided(stride).tokens(), out) and not x.
  void operator()(workspace& ws, map_size size, view<const float> x, view<float> result) const {
    const map_size out_size = size.strided(stride());
    const index_t strip = strip_columns(out_size.width);
    const index_t strips = (out_size.width + strip - 1) / strip;
    const index_t band = std::clamp<index_t>(out_size.height * strips / (4 * ws.threads()), 16, 64);
    const index_t bands = (out_size.height + band - 1) / band;
    ws.parallel(strips * bands, [&](index_t task, scratch memory) {
      const index_t x0 = task % strips * strip;
      const index_t y0 = task / strips * band;
      make_tile(size, x, result, x0, std::min(strip, out_size.width - x0), y0,
                std::min(band, out_size.height - y0), memory);
    });
    if (ws.trace) record_parts(ws, size, x);
  }

private:
  index_t hidden() const { return expand_.out(); }

  /// Output columns of a strip: the ring and the row after it take at most 256 KiB.
  index_t strip_columns(index_t width) const {
    const index_t fit =
        256 * 1024 / static_cast<index_t>(sizeof(float)) / ((3 * stride() + 1) * hidden());
    return std::min(width, std::max<index_t>(fit, 8));
  }
  index_t input_columns(index_t columns) const { return (columns - 1) * stride() + 3; }

  void make_tile(map_size size, view<const float> x, view<float> result, index_t x0,
                 index_t columns, index_t y0, index_t rows, scratch memory) const {
    const map_size out_size = size.strided(stride());
    const index_t in0 = std::max<index_t>(0, x0 * stride() - 1);
    const index_t in1 = std::min(size.width, (x0 + columns - 1) * stride() + 2);
    const index_t ring_row = input_columns(columns) * hidden();
    float* ring = memory.take<float>(3 * ring_row);
    float* filtered = memory.take<float>(columns * hidden());

    index_t next = std::max<index_t>(0, y0 * stride() - 1);  // first hidden row not yet made
    for (index_t y = y0; y < y0 + rows; ++y) {
      const float* window[3];
      for (index_t i = 0; i < 3; ++i) {
        const index_t source = y * stride() + i - 1;
        const bool exists = source >= 0 && source < size.height;
        float* slot = ring + (source + 3) % 3 * ring_row;
        if (exists && source >= next) {
          expand_row(x.row(source * size.width + in0), in1 - in0, slot);
          next = source + 1;
        }
        window[i] = exists ? slot : nullptr;
      }
      depthwise_.row(window, in1 - in0, x0 * stride() - in0, columns, filtered, activation::gelu);
      const index_t token = y * out_size.width + x0;
      project_row(filtered, columns, shortcut_ ? x.row(token) : nullptr, result.row(token));
    }
  }

  /// `count` pixels of x become hidden ones, as the depthwise convolution reads them.
  void expand_row(const float* x, index_t count, float* result) const {
    for (index_t i = 0; i < count; i += token_block) {
      const index_t n = std::min(token_block, count - i);
      float* out = result + i * hidden();
      const row_pointers<const float> from(x + i * in(), in(), n);
      const row_pointers<float> to(out, hidden(), n);
      expand_.rows(n, from.data(), to.data(), activation::gelu);
      depthwise_.take(n, out, out);
    }
  }

  void project_row(const float* hidden_row, index_t count, const float* residual,
                   float* result) const {
    for (index_t i = 0; i < count; i += token_block) {
      const index_t n = std::min(token_block, count - i);
      const row_pointers<const float> from(hidden_row + i * hidden(), hidden(), n);
      const row_pointers<float> to(result + i * out(), out(), n);
      const row_pointers<const float> add(residual ? residual + i * out() : nullptr,
                                          residual ? out() : 0, n);
      project_.rows(n, from.data(), to.data(), residual ? activation::gelu : activation::none,
                    residual ? add.data() : nullptr);
    }
  }

  /// The parts one by one, unfused: for traces only.
  void record_parts(workspace& ws, map_size size, view<const float> x) const {
    if (!ws.tracing(name_ + ".conv1") && !ws.tracing(name_ + ".conv2") &&
        !ws.tracing(name_ + ".conv3"))
      return;
    const map_size out_size = size.strided(stride());
    tensor<float> expanded(shape{size.tokens(), hidden()});
    expand_(ws, x, expanded);
    ws.record(name_ + ".conv1", expanded, layout::pixels, size.width);
    kernels::active().activate(activation::gelu, expanded.size(), expanded.data(), expanded.data());
    tensor<float> filtered(shape{out_size.tokens(), hidden()});
    depthwise_(size, expanded, filtered);
    ws.record(name_ + ".conv2", filtered, layout::pixels, out_size.width);
    kernels::active().activate(activation::gelu, filtered.size(), filtered.data(), filtered.data());
    tensor<float> projected(shape{out_size.tokens(), out()});
    project_(ws, filtered, projected);
    ws.record(name_ + ".conv3", projected, layout::pixels, out_size.width);
  }

  std::string name_;
  linear expand_;
  depthwise3x3 depthwise_;
  linear project_;
  bool shortcut_ = false;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
