/// Depthwise convolution of 3x3 or 5x5, vectorised over channels, one output row at a time.
///
/// The inner kernel makes pixels_at_once neighbouring outputs of one vector of channels, so that
/// each input column is loaded once per row and each weight once per pixels_at_once outputs; sums
/// stay in registers. Bound by the load ports while the input rows are in L2.
#pragma once

#include <algorithm>

#include "contract.hpp"
#include "elementwise.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

inline constexpr ptrdiff_t pixels_at_once = 4;

/// What the sums over taps start from, and where they go.
template <class Tag>
HWY_INLINE hn::Vec<Tag> first_sum(const depthwise_args& args, Tag tag, ptrdiff_t c) {
  return args.scale ? hn::Zero(tag) : hn::LoadU(tag, args.bias + c);
}
template <class Tag>
HWY_INLINE void store_sum(const depthwise_args& args, Tag tag, ptrdiff_t c, hn::Vec<Tag> sum,
                          float* out) {
  if (args.scale) sum = mul_add(sum, hn::LoadU(tag, args.scale + c), hn::LoadU(tag, args.bias + c));
  hn::StoreU(sum, tag, out);
}

/// Outputs x .. x + Pixels - 1 of the channels c .. c + lanes(Tag) - 1, whose input columns all
/// exist.
template <ptrdiff_t Side, ptrdiff_t Pixels, ptrdiff_t Stride, class Tag>
HWY_INLINE void depthwise_inside(const depthwise_args& args, Tag tag, ptrdiff_t x, ptrdiff_t c) {
  using vec = hn::Vec<Tag>;
  constexpr ptrdiff_t columns = (Pixels - 1) * Stride + Side;
  vec sums[Pixels];
#pragma GCC unroll 8
  for (ptrdiff_t p = 0; p < Pixels; ++p) sums[p] = first_sum(args, tag, c);
  for (ptrdiff_t i = 0; i < Side; ++i) {
    if (!args.rows[i]) continue;
    const float* in = args.rows[i] + (x * Stride + args.first - Side / 2) * args.channels + c;
    const float* w = args.weights + i * Side * args.channels + c;
    vec column[columns];
#pragma GCC unroll 16
    for (ptrdiff_t j = 0; j < columns; ++j) column[j] = hn::LoadU(tag, in + j * args.channels);
#pragma GCC unroll 5
    for (ptrdiff_t j = 0; j < Side; ++j) {
      const vec weight = hn::LoadU(tag, w + j * args.channels);
#pragma GCC unroll 8
      for (ptrdiff_t p = 0; p < Pixels; ++p)
        sums[p] = mul_add(column[p * Stride + j], weight, sums[p]);
    }
  }
#pragma GCC unroll 8
  for (ptrdiff_t p = 0; p < Pixels; ++p)
    store_sum(args, tag, c, sums[p], args.out + (x + p) * args.channels + c);
}

/// One output at the left or right border, some of whose columns do not exist.
template <ptrdiff_t Side, class Tag>
inline void depthwise_border(const depthwise_args& args, Tag tag, ptrdiff_t x, ptrdiff_t c) {
  auto sum = first_sum(args, tag, c);
  for (ptrdiff_t i = 0; i < Side; ++i) {
    if (!args.rows[i]) continue;
    for (ptrdiff_t j = 0; j < Side; ++j) {
      const ptrdiff_t column = x * args.stride + args.first + j - Side / 2;
      if (column < 0 || column >= args.n_in) continue;
      sum = mul_add(hn::LoadU(tag, args.rows[i] + column * args.channels + c),
                    hn::LoadU(tag, args.weights + (i * Side + j) * args.channels + c), sum);
    }
  }
  store_sum(args, tag, c, sum, args.out + x * args.channels + c);
}

template <ptrdiff_t Side, ptrdiff_t Stride>
inline void depthwise_row(const depthwise_args& args) {
  // Outputs [inside0, inside1) read columns that all exist.
  const ptrdiff_t inside0 =
      std::clamp<ptrdiff_t>((Side / 2 + Stride - 1 - args.first) / Stride, 0, args.n_out);
  const ptrdiff_t last_start = args.n_in - args.first - (Side / 2 + 1);
  const ptrdiff_t inside1 =
      last_start < 0 ? inside0 : std::clamp(last_start / Stride + 1, inside0, args.n_out);

  const auto pixels = [&](auto tag, ptrdiff_t step, ptrdiff_t x, ptrdiff_t count, ptrdiff_t c,
                          ptrdiff_t end) {
    for (; c + step <= end; c += step) {
      if (count == pixels_at_once)
        depthwise_inside<Side, pixels_at_once, Stride>(args, tag, x, c);
      else if (count == 1)
        depthwise_inside<Side, 1, Stride>(args, tag, x, c);
      else
        depthwise_border<Side>(args, tag, x, c);
    }
    return c;
  };
  const auto all_channels = [&](ptrdiff_t x, ptrdiff_t count) {
    const ptrdiff_t c = pixels(float_tag{}, lanes, x, count, 0, args.channels);
    pixels(hn::CappedTag<float, 1>{}, 1, x, count, c, args.channels);
    if (count == 0) count = 1;
    float* out = args.out + x * args.channels;
    activate(args.act, count * args.channels, out, out);
  };

  constexpr ptrdiff_t border = 0;
  ptrdiff_t x = 0;
  for (; x < inside0; ++x) all_channels(x, border);
  for (; x + pixels_at_once <= inside1; x += pixels_at_once) all_channels(x, pixels_at_once);
  for (; x < inside1; ++x) all_channels(x, 1);
  for (; x < args.n_out; ++x) all_channels(x, border);
}

inline void depthwise(const depthwise_args& args) {
  if (args.side == 3)
    args.stride == 1 ? depthwise_row<3, 1>(args) : depthwise_row<3, 2>(args);
  else
    args.stride == 1 ? depthwise_row<5, 1>(args) : depthwise_row<5, 2>(args);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
