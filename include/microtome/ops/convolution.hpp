#pragma once

#include <kernels/macros_off.hpp>

#include <string>

#include <microtome/ops/depthwise.hpp>
#include <microtome/ops/linear.hpp>
#include <microtome/ops/winograd.hpp>

namespace microtome {

namespace detail {

/// Packs the weight (out, in, h, w) of a convolution for a GEMM over h * w taps of `in` channels.
inline packed_weight pack_taps(const layer_weight& layer) {
  const tensor<float>& weight = layer.values;
  const index_t out = weight.extent(0), in = weight.extent(1);
  const index_t taps = weight.extent(2) * weight.extent(3);
  tensor<float> taps_first(shape{taps, in, out});
  for (index_t o = 0; o < out; ++o)
    for (index_t i = 0; i < in; ++i)
      for (index_t tap = 0; tap < taps; ++tap)
        taps_first[(tap * in + i) * out + o] = weight[(o * in + i) * taps + tap];
  return packed_weight(layer, taps, in, out, taps_first.data(), out, 1);
}

}  // namespace detail

/// Dense 3x3 convolution with padding 1 over token-major pixels: a GEMM whose rows are read nine
/// times, once per tap, where they lie (a row of zeros outside the map). With stride 1, where the
/// arithmetic allows, by Winograd's algorithm.
class convolution3x3 {
public:
  convolution3x3() = default;

  /// Reads `<name>.weight` (out, in, 3, 3), and `<name>.bias` (out) where `with_bias` says so.
  convolution3x3(const weights& file, const std::string& name, index_t in, index_t out,
                 index_t stride = 1, bool with_bias = false)
      : in_(in), out_(out), stride_(stride), zeros_(shape{in}) {
    const layer_weight layer = file.layer(name, {out, in, 3, 3});
    const bool winograd = stride == 1 && file.winograd();
    if (winograd && winograd3x3::suits(layer))
      winograd_ = winograd3x3(layer);
    else if (winograd && winograd3x3_int8::suits(layer))
      winograd_int8_ = winograd3x3_int8(layer);
    else
      weight_ = detail::pack_taps(layer);
    if (with_bias) bias_ = file.read(name + ".bias", {out});
  }

  index_t in() const { return in_; }
  index_t out() const { return out_; }
  index_t stride() const { return stride_; }
  /// Multiply-adds per pixel of the result.
  index_t macs() const { return 9 * in_ * out_; }

  /// Arena floats for up to `rows` rows of the result of a map of this size.
  index_t memory(map_size size, index_t rows) const {
    return winograd_.empty() ? 0 : winograd_.memory(rows, size.width);
  }
  index_t memory(map_size size) const { return memory(size, size.strided(stride_).height); }
  std::size_t scratch_bytes(map_size size, index_t rows) const {
    if (!winograd_.empty()) return winograd_.scratch_bytes();
    return winograd_int8_.empty() ? 0 : winograd_int8_.scratch_bytes(rows, size.width);
  }
  std::size_t scratch_bytes(map_size size) const {
    return scratch_bytes(size, size.strided(stride_).height);
  }

  /// x is (size.tokens(), in), result is (size.strided(stride).tokens(), out) and not x.
  /// `residual`, where given, is like the result, and may be it.
  void operator()(workspace& ws, map_size size, view<const float> x, view<float> result,
                  activation act = activation::none, const float* residual = nullptr) const {
    rows(ws, size, x, 0, size.strided(stride_).height, result.data(), act, residual);
  }

  /// `count` rows of the result's map, from row y on, to dense rows at `result`; `residual` are
  /// rows like those.
  void rows(workspace& ws, map_size size, view<const float> x, index_t y, index_t count,
            float* result, activation act = activation::none,
            const float* residual = nullptr) const {
    if (!winograd_.empty())
      return winograd_.rows(ws, size, x.data(), y, count, result, bias_.data(), act, residual);
    if (!winograd_int8_.empty())
      return winograd_int8_.rows(ws, size, x.data(), y, count, result, bias_.data(), act, residual);
    const index_t width = size.strided(stride_).width;
    const index_t tokens = count * width;
    ws.parallel(block_count(tokens), [&](index_t block, scratch) {
      const index_t start = block * token_block;
      pixels(size, x, y * width + start, std::min(token_block, tokens - start),
             result + start * out_, act, residual ? residual + start * out_ : nullptr);
    });
  }

private:
  /// Serial: `count` pixels of the result, from number `start` on.
  void pixels(map_size size, view<const float> x, index_t start, index_t count, float* result,
              activation act, const float* residual) const {
    const index_t width = size.strided(stride_).width;
    std::array<const float*, 9 * max_rows> taps;
    for (index_t tap = 0; tap < 9; ++tap)
      for (index_t i = 0; i < count; ++i) {
        const index_t y = (start + i) / width * stride_ + tap / 3 - 1;
        const index_t column = (start + i) % width * stride_ + tap % 3 - 1;
        const bool inside = y >= 0 && y < size.height && column >= 0 && column < size.width;
        taps[static_cast<std::size_t>(tap * count + i)] =
            inside ? x.row(y * size.width + column) : zeros_.data();
      }
    const row_pointers<float> c(result, out_, count);
    const row_pointers<const float> r(residual, residual ? out_ : 0, count);
    weight_.multiply({.m = count,
                      .n = out_,
                      .k = in_,
                      .taps = 9,
                      .a = taps.data(),
                      .c = c.data(),
                      .bias = bias_.data(),
                      .residual = residual ? r.data() : nullptr,
                      .act = act});
  }

  index_t in_ = 0, out_ = 0, stride_ = 1;
  tensor<float> zeros_;
  packed_weight weight_;
  winograd3x3 winograd_;
  winograd3x3_int8 winograd_int8_;
  tensor<float> bias_;
};

/// 2x2 convolution of stride 2 over token-major pixels, with bias: four taps, no overlap.
class convolution2x2 {
public:
  convolution2x2() = default;

  /// Reads `<name>.weight` (out, in, 2, 2) and `<name>.bias` (out).
  convolution2x2(const weights& file, const std::string& name, index_t in, index_t out)
      : in_(in), bias_(file.read(name + ".bias", {out})) {
    weight_ = detail::pack_taps(file.layer(name, {out, in, 2, 2}));
  }

  index_t out() const { return weight_.width(); }

  /// x is (size.tokens(), in) with even height and width, result is (size.tokens() / 4, out).
  void operator()(workspace& ws, map_size size, view<const float> x, view<float> result) const {
    const map_size half{size.height / 2, size.width / 2};
    ws.parallel(block_count(half.tokens()), [&](index_t block, scratch) {
      const index_t start = block * token_block;
      const index_t count = std::min(token_block, half.tokens() - start);
      std::array<const float*, 4 * token_block> taps;
      for (index_t tap = 0; tap < 4; ++tap)
        for (index_t i = 0; i < count; ++i) {
          const index_t y = (start + i) / half.width * 2 + tap / 2;
          const index_t column = (start + i) % half.width * 2 + tap % 2;
          taps[static_cast<std::size_t>(tap * count + i)] = x.row(y * size.width + column);
        }
      const row_pointers<float> c(result.row(start), out(), count);
      weight_.multiply({.m = count,
                        .n = out(),
                        .k = in_,
                        .taps = 4,
                        .a = taps.data(),
                        .c = c.data(),
                        .bias = bias_.data()});
    });
  }

private:
  index_t in_ = 0;
  packed_weight weight_;
  tensor<float> bias_;
};

/// Transposed 2x2 convolution of stride 2: every pixel becomes a 2x2 block of pixels.
///
/// One GEMM per output row: pixel x of input row y gives the neighbours (2y + dy, 2x) and
/// (2y + dy, 2x + 1), which lie side by side in token-major order.
class transposed_convolution2x2 {
public:
  transposed_convolution2x2() = default;

  /// Reads `<name>.weight` (in, out, 2, 2) and `<name>.bias` (out).
  transposed_convolution2x2(const weights& file, const std::string& name, index_t in, index_t out)
      : out_(out), bias_(shape{2 * out}) {
    const layer_weight layer = file.layer(name, {in, out, 2, 2}, 1);
    const tensor<float> bias = file.read(name + ".bias", {out});
    tensor<float> pair(shape{in, 2 * out});  // for dy: columns of dx = 0, then of dx = 1
    for (index_t dy = 0; dy < 2; ++dy) {
      for (index_t i = 0; i < in; ++i)
        for (index_t dx = 0; dx < 2; ++dx)
          for (index_t o = 0; o < out; ++o)
            pair[i * 2 * out + dx * out + o] = layer.values[((i * out + o) * 2 + dy) * 2 + dx];
      weight_[static_cast<std::size_t>(dy)] =
          packed_weight(layer, 1, in, 2 * out, pair.data(), 2 * out, 1);
    }
    for (index_t o = 0; o < out; ++o) bias_[o] = bias_[out + o] = bias[o];
  }

  index_t in() const { return weight_[0].depth(); }
  index_t out() const { return out_; }

  /// Serial: `count` dense pixels of one row become two dense rows of 2 * count pixels.
  void row(index_t count, const float* x, float* upper, float* lower,
           activation act = activation::none) const {
    for (index_t start = 0; start < count; start += token_block) {
      const index_t n = std::min(token_block, count - start);
      const row_pointers<const float> a(x + start * in(), in(), n);
      for (std::size_t dy = 0; dy < 2; ++dy) {
        const row_pointers<float> c((dy ? lower : upper) + start * 2 * out_, 2 * out_, n);
        weight_[dy].multiply({.m = n,
                              .n = 2 * out_,
                              .k = in(),
                              .a = a.data(),
                              .c = c.data(),
                              .bias = bias_.data(),
                              .act = act});
      }
    }
  }

private:
  index_t out_ = 0;
  std::array<packed_weight, 2> weight_;
  tensor<float> bias_;  // twice, for the two pixels of a GEMM row
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
