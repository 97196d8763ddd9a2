#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <string>
#include <string_view>

#include <microtome/ops/depthwise.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// Names and activations of an inverted bottleneck.
struct bottleneck_form {
  const char* expand;     ///< 1x1 convolution
  const char* depthwise;  ///< 3x3
  const char* project;    ///< 1x1
  activation hidden;      ///< after the first two
  activation sum;         ///< after the shortcut
  bool activated;         ///< whether traces show the first two after their activation
};

/// 1x1 convolution, GELU, depthwise 3x3, GELU, 1x1 convolution: the body of MBConv (Sandler et al.,
/// MobileNetV2, 2018), of EfficientViT's blocks and of TinyViT's patch merging. The hidden map (67
/// MB for 64 channels expanded to 256 at 256 x 256) is never in memory whole.
///
/// Where it has few channels it is fused by rows: a task makes a strip of output columns over a
/// band of output rows, and keeps the three hidden rows that the depthwise convolution looks at in
/// a ring in L2. Strips compute the hidden columns at their sides twice (2 of 66), bands their
/// first rows.
///
/// Where it has many, a strip in L2 would be so narrow that each row of it reads all weights from
/// further away. Then all threads make one band of whole rows together, layer by layer; the rows
/// that the next band looks at, too, are kept.
class inverted_bottleneck {
public:
  /// TinyViT's.
  static constexpr bottleneck_form tiny_vit_form{".conv1.c",       ".conv2.c",       ".conv3.c",
                                                 activation::gelu, activation::gelu, false};

  inverted_bottleneck() = default;

  /// Reads the three convolutions under `<name>` (BatchNorm folded). With `shortcut` the input is
  /// added to the output.
  inverted_bottleneck(const weights& file, const std::string& name, index_t in, index_t hidden,
                      index_t out, index_t stride, bool shortcut,
                      const bottleneck_form& form = tiny_vit_form)
      : name_(name),
        form_(form),
        expand_(linear::pointwise(file, name + form.expand, in, hidden)),
        depthwise_(file, name + form.depthwise, hidden, stride),
        project_(linear::pointwise(file, name + form.project, hidden, out)),
        shortcut_(shortcut) {
    if (shortcut && (in != out || stride != 1))
      fail(name, ": a shortcut needs equal input and output, got ", in, " and ", out,
           " channels at stride ", stride);
  }

  index_t in() const { return expand_.in(); }
  index_t out() const { return project_.out(); }
  index_t stride() const { return depthwise_.stride(); }
  const std::string& name() const { return name_; }
  /// Multiply-adds on a map of this size.
  index_t macs(map_size size) const {
    return hidden() * (size.tokens() * in() + size.strided(stride()).tokens() * (9 + out()));
  }

  /// Arena floats for a map of this size.
  index_t memory(map_size size) const {
    if (!wide()) return 0;
    const index_t rows = band_rows(size);
    return arena::rounded(input_rows(size, rows) * size.width * hidden()) +
           arena::rounded(rows * size.strided(stride()).width * hidden());
  }
  /// Scratch bytes that a thread needs for a map of this size.
  std::size_t scratch_bytes(map_size size) const {
    if (wide()) return 0;
    const index_t columns = strip_columns(size.strided(stride()).width);
    return scratch::bytes_of<float>(3 * input_columns(columns) * hidden()) +
           scratch::bytes_of<float>(columns * hidden());
  }

  /// x is (size.tokens(), in), result is (size.strided(stride).tokens(), out) and not x.
  void operator()(workspace& ws, map_size size, view<const float> x, view<float> result) const {
    if (wide())
      make_bands(ws, size, x, result);
    else
      make_tiles(ws, size, x, result);
    if (ws.trace) record_parts(ws, size, x);
  }

private:
  index_t hidden() const { return expand_.out(); }

  /// Output columns of a strip: the ring and the row after it take at most 256 KiB.
  index_t fitting_columns() const {
    return 256 * 1024 / static_cast<index_t>(sizeof(float)) / ((3 * stride() + 1) * hidden());
  }
  index_t strip_columns(index_t width) const { return std::min(width, fitting_columns()); }
  index_t input_columns(index_t columns) const { return (columns - 1) * stride() + 3; }
  bool wide() const { return fitting_columns() < 24; }

  /// Output rows of a band whose hidden rows take about 12 MB.
  index_t band_rows(map_size size) const {
    const index_t fit = (3 << 20) / (size.width * hidden()) / stride();
    return std::clamp<index_t>(fit, 1, size.strided(stride()).height);
  }
  /// Hidden rows that a band looks at.
  index_t input_rows(map_size size, index_t rows) const {
    return std::min(size.height, (rows - 1) * stride() + 3);
  }

  void make_bands(workspace& ws, map_size size, view<const float> x, view<float> result) const {
    const map_size out_size = size.strided(stride());
    const index_t band = band_rows(size), row = size.width * hidden();
    frame memory(ws.memory());
    const view<float> rows = memory.take({input_rows(size, band), row});
    const view<float> filtered = memory.take({band * out_size.width, hidden()});
    index_t first = 0, made = 0;  // hidden rows first to made - 1 are there
    for (index_t y0 = 0; y0 < out_size.height; y0 += band) {
      const index_t count = std::min(band, out_size.height - y0);
      const index_t top = std::max<index_t>(0, y0 * stride() - 1);
      const index_t end = std::min(size.height, (y0 + count - 1) * stride() + 2);
      if (made > top)
        std::copy(rows.row(top - first), rows.row(0) + (made - first) * row, rows.row(0));
      first = top;
      made = std::max(made, top);
      const index_t tokens = (end - made) * size.width;
      float* to = rows.row(made - first);
      expand_(ws, {x.row(made * size.width), {tokens, in()}}, {to, {tokens, hidden()}},
              form_.hidden);
      if (depthwise_.quantized())
        ws.parallel(block_count(tokens), [&](index_t block, scratch) {
          const index_t start = block * token_block;
          float* pixels = to + start * hidden();
          depthwise_.take(std::min(token_block, tokens - start), pixels, pixels);
        });
      made = end;
      ws.parallel(count, [&](index_t i, scratch) {
        depthwise_convolution::window window = {};
        for (index_t j = 0; j < 3; ++j)
          if (const index_t source = (y0 + i) * stride() + j - 1; source >= 0 && source < end)
            window[static_cast<std::size_t>(j)] = rows.row(source - first);
        depthwise_.row(window, size.width, 0, out_size.width, filtered.row(i * out_size.width),
                       form_.hidden);
      });
      const view<float> out(result.row(y0 * out_size.width), {count * out_size.width, this->out()});
      const float* residual = shortcut_ ? x.row(y0 * size.width) : nullptr;
      project_(ws, {filtered.data(), {out.extent(0), hidden()}}, out,
               shortcut_ ? form_.sum : activation::none, residual);
    }
  }

  void make_tiles(workspace& ws, map_size size, view<const float> x, view<float> result) const {
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
  }

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
      depthwise_convolution::window window = {};
      for (index_t i = 0; i < 3; ++i) {
        const index_t source = y * stride() + i - 1;
        if (source < 0 || source >= size.height) continue;
        float* slot = ring + source % 3 * ring_row;
        if (source >= next) {
          expand_row(x.row(source * size.width + in0), in1 - in0, slot);
          next = source + 1;
        }
        window[static_cast<std::size_t>(i)] = slot;
      }
      depthwise_.row(window, in1 - in0, x0 * stride() - in0, columns, filtered, form_.hidden);
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
      expand_.rows(n, from.data(), to.data(), form_.hidden);
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
      project_.rows(n, from.data(), to.data(), residual ? form_.sum : activation::none,
                    residual ? add.data() : nullptr);
    }
  }

  /// The parts one by one, unfused: for traces only.
  void record_parts(workspace& ws, map_size size, view<const float> x) const {
    if (!ws.tracing(module(form_.expand)) && !ws.tracing(module(form_.depthwise)) &&
        !ws.tracing(module(form_.project)))
      return;
    const map_size out_size = size.strided(stride());
    const auto activate = [&](tensor<float>& map) {
      kernels::active().activate(form_.hidden, map.size(), map.data(), map.data());
    };
    tensor<float> expanded(shape{size.tokens(), hidden()});
    expand_(ws, x, expanded);
    if (form_.activated) activate(expanded);
    ws.record(module(form_.expand), expanded, layout::pixels, size.width);
    if (!form_.activated) activate(expanded);
    tensor<float> filtered(shape{out_size.tokens(), hidden()});
    depthwise_(size, expanded, filtered);
    if (form_.activated) activate(filtered);
    ws.record(module(form_.depthwise), filtered, layout::pixels, out_size.width);
    if (!form_.activated) activate(filtered);
    tensor<float> projected(shape{out_size.tokens(), out()});
    project_(ws, filtered, projected);
    ws.record(module(form_.project), projected, layout::pixels, out_size.width);
  }
  /// The module that holds a convolution and what is folded into it: all but the last name.
  std::string module(std::string_view convolution) const {
    return name_ + std::string(convolution.substr(0, convolution.rfind('.')));
  }

  std::string name_;
  bottleneck_form form_{tiny_vit_form};
  linear expand_;
  depthwise_convolution depthwise_;
  linear project_;
  bool shortcut_ = false;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
