#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include <microtome/ops/depthwise.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// A dense 3x3 convolution of stride 1 with padding 1 by Winograd's F(4 x 4, 3 x 3): 36 products
/// where the sums of 4 x 4 pixels take 144. See kernels::winograd_input_args.
///
/// A band of rows of tiles goes through three steps that are each shared out over all threads:
/// tiles are transformed; a slab of output channels at a time, weights are transformed and
/// multiplied (one matrix product for each of the 36 places in a tile); tiles are transformed back.
/// Transformed weights of all channels would take four times the memory, and making them takes some
/// 130 operations of each weight's filter, where the products take 72 for each tile.
class winograd3x3 {
public:
  winograd3x3() = default;

  /// Packs the weights of `layer`, (out, in, 3, 3).
  explicit winograd3x3(const layer_weight& layer)
      : in_(layer.values.extent(1)), out_(layer.values.extent(0)), zeros_(shape{in_}) {
    tensor<float> tap(shape{in_, slab_channels()});
    for (index_t first = 0; first < out_; first += slab_channels()) {
      const index_t n = std::min(slab_channels(), out_ - first), floats = packed_floats(n);
      tensor<float>& slab = slabs_.emplace_back(shape{taps, floats});
      for (index_t t = 0; t < taps; ++t) {
        for (index_t c = 0; c < in_; ++c)
          for (index_t o = 0; o < n; ++o)
            tap[c * n + o] = layer.values[((first + o) * in_ + c) * taps + t];
        matrix().pack_b(in_, n, tap.data(), n, 1, nullptr, slab.row(t));
      }
    }
  }

  /// Whether it is used for a layer: where its error is small against what the layer's factors are
  /// rounded to, and where products are most of the work.
  static bool suits(const layer_weight& layer) {
    return !layer.quantized() && !layer.sparse && !layer.observer &&
           layer.inputs == precision::fp32 && layer.values.extent(0) >= least_channels &&
           layer.values.extent(1) >= least_channels;
  }

  bool empty() const { return slabs_.empty(); }
  index_t out() const { return out_; }

  /// Arena floats for up to `rows` rows of a map of this width.
  index_t memory(index_t rows, index_t width) const {
    const index_t n = tiles_down(std::min(rows, band_rows(width))) * tiles_down(width);
    return arena::rounded(places * n * in_) + arena::rounded(places * n * out_);
  }
  /// Bytes of scratch: the transformed weights of a slab.
  std::size_t scratch_bytes() const {
    return scratch::bytes_of<float>(places * packed_floats(std::min(slab_channels(), out_)));
  }

  /// Rows y0 to y0 + count - 1 of the result, of x (size.tokens(), in), to dense rows at `result`.
  /// `bias` (out) may be null; `residual`, where given, are rows like the result's, and may be
  /// them.
  void rows(workspace& ws, map_size size, const float* x, index_t y0, index_t count, float* result,
            const float* bias, activation act, const float* residual) const {
    const index_t bands = block_count(count, band_rows(size.width));
    const index_t band = tiles_down(block_count(count, bands)) * step;
    for (index_t start = 0; start < count; start += band) {
      const index_t skip = start * size.width * out_;
      one_band(ws, size, x, y0 + start, std::min(band, count - start), result + skip, bias, act,
               residual ? residual + skip : nullptr);
    }
  }

private:
  static constexpr index_t tile = 6, step = 4, places = tile * tile, taps = 9;
  static constexpr index_t least_channels = 16;
  /// Output channels of a slab: whole panels of any target, whose transformed weights take about
  /// 1 MB for each thread.
  index_t slab_channels() const { return in_ <= 128 ? 64 : 32; }

  static index_t tiles_down(index_t n) { return block_count(n, step); }

  static const kernels::matrix_kernels& matrix() {
    return kernels::active().matrix(precision::fp32);
  }
  /// Floats of a packed matrix (in, n).
  index_t packed_floats(index_t n) const {
    return matrix().packed_bytes(in_, n) / static_cast<index_t>(sizeof(float));
  }

  /// Rows of pixels whose tiles take about 9 MB, transformed and multiplied.
  index_t band_rows(index_t width) const {
    const index_t row = places * tiles_down(width) * (in_ + out_);
    return std::max<index_t>(1, (9 << 18) / row) * step;
  }

  void one_band(workspace& ws, map_size size, const float* x, index_t y0, index_t count,
                float* result, const float* bias, activation act, const float* residual) const {
    const index_t across = tiles_down(size.width), tiles = across * tiles_down(count);
    frame memory(ws.memory());
    const view<float> inputs = memory.take({places, tiles * in_});
    const view<float> products = memory.take({places, tiles * out_});
    const kernels::table& kernel = kernels::active();

    constexpr index_t at_once = 8;
    const index_t groups = (tiles + at_once - 1) / at_once;
    ws.parallel(groups, [&](index_t group, scratch) {
      for (index_t t = group * at_once; t < std::min(tiles, (group + 1) * at_once); ++t) {
        const index_t y = y0 + t / across * step - 1, column = t % across * step - 1;
        std::array<const float*, places> pixels;
        for (index_t i = 0; i < places; ++i) {
          const index_t py = y + i / tile, px = column + i % tile;
          const bool inside = py >= 0 && py < size.height && px >= 0 && px < size.width;
          pixels[static_cast<std::size_t>(i)] =
              inside ? x + (py * size.width + px) * in_ : zeros_.data();
        }
        kernel.winograd_input({.channels = in_,
                               .x = pixels.data(),
                               .out = inputs.data() + t * in_,
                               .out_stride = tiles * in_});
      }
    });
    const index_t parts = block_count(tiles);
    ws.parallel(std::ssize(slabs_) * parts, [&](index_t task, scratch own) {
      const index_t part = task % parts;
      const index_t start = tiles * part / parts, end = tiles * (part + 1) / parts;
      multiply(own, task / parts, start, end - start, inputs, products);
    });
    ws.parallel(groups, [&](index_t group, scratch) {
      for (index_t t = group * at_once; t < std::min(tiles, (group + 1) * at_once); ++t) {
        const index_t y = t / across * step, column = t % across * step;
        std::array<float*, step * step> pixels;
        std::array<const float*, step * step> add;
        for (index_t i = 0; i < step * step; ++i) {
          const index_t py = y + i / step, px = column + i % step;
          const index_t at = (py * size.width + px) * out_;
          const bool wanted = py < count && px < size.width;
          pixels[static_cast<std::size_t>(i)] = wanted ? result + at : nullptr;
          add[static_cast<std::size_t>(i)] = wanted && residual ? residual + at : nullptr;
        }
        kernel.winograd_output({.channels = out_,
                                .m = products.data() + t * out_,
                                .m_stride = tiles * out_,
                                .out = pixels.data(),
                                .bias = bias,
                                .residual = residual ? add.data() : nullptr,
                                .act = act});
      }
    });
  }

  /// Serial: of the products (places, tiles * out) those of one slab of output channels and of
  /// `count` tiles from number `start` on.
  void multiply(scratch& memory, index_t slab, index_t start, index_t count,
                view<const float> inputs, view<float> products) const {
    const tensor<float>& g = slabs_[static_cast<std::size_t>(slab)];
    const index_t floats = g.extent(1), first = slab * slab_channels();
    float* const weights = memory.take<float>(places * floats);
    kernels::active().winograd_weights(
        {.n = floats, .g = g.data(), .g_stride = floats, .out = weights, .out_stride = floats});
    for (index_t place = 0; place < places; ++place) {
      const row_pointers<const float> a(inputs.row(place) + start * in_, in_, count);
      const row_pointers<float> c(products.row(place) + start * out_ + first, out_, count);
      matrix().gemm({.m = count,
                     .n = std::min(slab_channels(), out_ - first),
                     .k = in_,
                     .a = a.data(),
                     .b = weights + place * floats,
                     .c = c.data()});
    }
  }

  index_t in_ = 0, out_ = 0;
  tensor<float> zeros_;
  std::vector<tensor<float>> slabs_;  // (taps, packed weights) of some output channels each
};

/// A dense 3x3 convolution of stride 1 with padding 1 in int8 by Winograd's F(2 x 2, 3 x 3), in
/// whole numbers: the plain sums to the bit. See kernels::winograd_int8_args. Its weights take 32
/// bytes for each filter of nine.
class winograd3x3_int8 {
public:
  winograd3x3_int8() = default;

  /// Packs the weights of `layer`, (out, in, 3, 3).
  explicit winograd3x3_int8(const layer_weight& layer)
      : in_(layer.values.extent(1)),
        out_(layer.values.extent(0)),
        zeros_(shape{in_}),
        packed_(shape{kernel().packed_bytes(in_, out_)}),
        scale_(shape{out_}),
        input_(layer) {
    kernel().pack(in_, out_, layer.values.data(), packed_.data());
    for (index_t o = 0; o < out_; ++o) scale_[o] = layer.scale[o] * layer.input[0].scale;
  }

  /// Whether it is used for a layer: where the CPU gains by it.
  static bool suits(const layer_weight& layer) {
    return layer.inputs == precision::int8 && !layer.sparse && !layer.simulated &&
           !layer.observer && kernels::active().winograd_int8 &&
           layer.values.extent(0) >= least_channels && layer.values.extent(1) >= least_channels &&
           9 * layer.values.extent(1) <= kernels::max_gemm_depth;
  }

  bool empty() const { return in_ == 0; }

  /// Bytes of scratch for up to `rows` rows of a map of this width.
  std::size_t scratch_bytes(index_t rows, index_t width) const {
    const patch_size patch = patch_of(rows, width);
    return static_cast<std::size_t>(kernel().scratch_bytes(patch.rows, patch.columns, in_));
  }

  /// As winograd3x3::rows.
  void rows(workspace& ws, map_size size, const float* x, index_t y0, index_t count, float* result,
            const float* bias, activation act, const float* residual) const {
    const patch_size patch = patch_of(count, size.width);
    const index_t across = block_count(size.width, step * patch.columns);
    ws.parallel(across * block_count(count, step * patch.rows), [&](index_t task, scratch memory) {
      const index_t y = task / across * step * patch.rows;
      const index_t column = task % across * step * patch.columns;
      const index_t tall = std::min(patch.rows, block_count(count - y, step));
      const index_t wide = std::min(patch.columns, block_count(size.width - column, step));
      std::array<const float*, most_pixels> pixels;
      std::size_t n = 0;
      for (index_t py = y0 + y - 1; py < y0 + y + step * tall + 1; ++py)
        for (index_t px = column - 1; px < column + step * wide + 1; ++px) {
          const bool inside = py >= 0 && py < size.height && px >= 0 && px < size.width;
          pixels[n++] = inside ? x + (py * size.width + px) * in_ : zeros_.data();
        }
      std::array<float*, step * step * most_tiles> to;
      std::array<const float*, step * step * most_tiles> add;
      n = 0;
      for (index_t py = y; py < y + step * tall; ++py)
        for (index_t px = column; px < column + step * wide; ++px, ++n) {
          const index_t at = (py * size.width + px) * out_;
          const bool wanted = py < count && px < size.width;
          to[n] = wanted ? result + at : nullptr;
          add[n] = wanted && residual ? residual + at : nullptr;
        }
      kernel().convolve(
          {.rows = tall,
           .columns = wide,
           .in = in_,
           .out = out_,
           .x = pixels.data(),
           .y = to.data(),
           .b = packed_.data(),
           .scale = scale_.data(),
           .input = input_.get(),
           .bias = bias,
           .residual = residual ? add.data() : nullptr,
           .act = act,
           .scratch = memory.take<std::byte>(kernel().scratch_bytes(tall, wide, in_))});
    });
  }

private:
  static constexpr index_t step = 2, least_channels = 16, most_tiles = 128;
  /// Of a patch of one row of tiles, which has the most pixels for its tiles.
  static constexpr index_t most_pixels = (step + 2) * (step * most_tiles + 2);

  struct patch_size {
    index_t rows, columns;  ///< of tiles
  };

  static const kernels::winograd_int8_kernels& kernel() { return *kernels::active().winograd_int8; }

  /// What a task takes: tiles that take about 256 KB, transformed.
  patch_size patch_of(index_t rows, index_t width) const {
    const index_t tiles = std::clamp<index_t>((1 << 13) / in_, 8, most_tiles);
    const index_t across = block_count(width, step);
    const index_t columns = block_count(across, block_count(across, tiles));
    return {std::min(std::max<index_t>(1, tiles / columns), block_count(rows, step)), columns};
  }

  index_t in_ = 0, out_ = 0;
  tensor<float> zeros_;
  tensor<std::byte> packed_;
  tensor<float> scale_;
  input_levels input_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
