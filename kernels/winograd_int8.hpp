/// 3 x 3 convolutions in int8 by Winograd's F(2 x 2, 3 x 3), in whole numbers of 16 bits: see
/// contract.hpp. A patch of pixels is quantised once, and its tiles transformed; then, for one
/// panel of output channels after the other, tiles are multiplied at each of the 16 places and
/// transformed back while the sums are in L1 or L2. The transformed tiles stay in L2, weights come
/// from L2 or L3 once for each patch. Bound by the units that multiply, for 64 channels and more;
/// the transforms take 32 and 24 additions for a tile, of 16 channels and of one vector of channels
/// at a time.
#pragma once

#include <algorithm>

#include "gemm.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// The kernels of targets that multiply so.
template <int8_dot>
inline constexpr const winograd_int8_kernels* winograd_int8 = nullptr;

#if HWY_TARGET != HWY_SCALAR

/// Pairs of 16-bit numbers, both as they are multiplied.
struct int16_pairs : int8_products<int8_dot::vpmaddwd> {
  using b_element = std::uint32_t;
  static HWY_INLINE factors load_column(const b_element* b) {
    return hn::Load(factor_tag(), reinterpret_cast<const std::int16_t*>(b));
  }
};
using int16_inputs = whole_inputs<int16_pairs>;

inline constexpr ptrdiff_t int8_places = 16;

/// Channels of a quantised pixel: whole vectors, the last ones zeros.
inline ptrdiff_t padded_channels(ptrdiff_t n) {
  return round_up(n, 2 * lanes);
}

/// Packed for a panel of output channels: [place][pair of input channels][panel_width].
inline ptrdiff_t winograd_int8_panel(ptrdiff_t in) {
  return int8_places * steps<int16_inputs>(in) * panel_width;
}

inline ptrdiff_t winograd_int8_packed_bytes(ptrdiff_t in, ptrdiff_t out) {
  return winograd_int8_panel(in) * (round_up(out, panel_width) / panel_width) *
         static_cast<ptrdiff_t>(sizeof(int16_inputs::b_element));
}

/// out[i * step] = 2 G g for g[i * step].
inline void winograd_int8_g(const int* g, ptrdiff_t step, int* out, ptrdiff_t out_step) {
  const int g0 = g[0], g1 = g[step], g2 = g[2 * step];
  out[0] = 2 * g0;
  out[out_step] = g0 + g1 + g2;
  out[2 * out_step] = g0 - g1 + g2;
  out[3 * out_step] = 2 * g2;
}

inline void pack_winograd_int8(ptrdiff_t in, ptrdiff_t out, const float* weights, void* packed) {
  const ptrdiff_t pairs = steps<int16_inputs>(in);
  auto* to = static_cast<std::int16_t*>(packed);
  std::fill_n(to, winograd_int8_packed_bytes(in, out) / 2, std::int16_t{0});
  for (ptrdiff_t o = 0; o < out; ++o) {
    std::int16_t* column = to + (o / panel_width * winograd_int8_panel(in) + o % panel_width) * 2;
    for (ptrdiff_t c = 0; c < in; ++c) {
      int taps[9], half[12], filter[int8_places];
      for (ptrdiff_t tap = 0; tap < 9; ++tap) taps[tap] = static_cast<int>(*weights++);
      for (ptrdiff_t x = 0; x < 3; ++x) winograd_int8_g(taps + x, 3, half + x, 3);
      for (ptrdiff_t y = 0; y < 4; ++y) winograd_int8_g(half + y * 3, 1, filter + y * 4, 1);
      for (ptrdiff_t place = 0; place < int8_places; ++place)
        column[(place * pairs + c / 2) * panel_width * 2 + c % 2] =
            static_cast<std::int16_t>(filter[place]);
    }
  }
}

/// Where things are in a scratch.
struct winograd_int8_scratch {
  ptrdiff_t pixels, tiles, channels;
  winograd_int8_scratch(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t in)
      : pixels((2 * rows + 2) * (2 * columns + 2)),
        tiles(rows * columns),
        channels(padded_channels(in)) {}
  /// Numbers of 16 bits in a quantised patch, and in its tiles after their transform.
  ptrdiff_t patch() const { return round_up(pixels * channels, 32); }
  ptrdiff_t inputs() const { return int8_places * tiles * channels; }
  ptrdiff_t bytes() const {
    return (patch() + inputs()) * 2 + int8_places * tiles * panel_width * 4 +
           tiles * static_cast<ptrdiff_t>(sizeof(void*));
  }
};

inline ptrdiff_t winograd_int8_scratch_bytes(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t in) {
  return winograd_int8_scratch(rows, columns, in).bytes();
}

/// B^T d for four vectors of d, in place.
template <class V>
HWY_INLINE void winograd_int8_bt(V& d0, V& d1, V& d2, V& d3) {
  d0 = hn::Sub(d0, d2);
  d3 = hn::Sub(d1, d3);
  const V difference = hn::Sub(d2, d1);
  d1 = hn::Add(d1, d2);
  d2 = difference;
}

/// All tiles of a patch of quantised pixels, to [place][tile][channels].
inline void winograd_int8_transform(const winograd_int8_args& args,
                                    const winograd_int8_scratch& size, const std::int16_t* patch,
                                    std::int16_t* out) {
  const int16_inputs::factor_tag tag;
  const ptrdiff_t width = 2 * args.columns + 2, channels = size.channels;
  for (ptrdiff_t y = 0; y < args.rows; ++y)
    for (ptrdiff_t x = 0; x < args.columns; ++x, out += channels) {
      const std::int16_t* tile = patch + (2 * y * width + 2 * x) * channels;
      for (ptrdiff_t c = 0; c < channels; c += 2 * lanes) {
        int16_inputs::factors d[int8_places];
#pragma GCC unroll 4
        for (ptrdiff_t i = 0; i < 4; ++i)
#pragma GCC unroll 4
          for (ptrdiff_t j = 0; j < 4; ++j)
            d[i * 4 + j] = hn::Load(tag, tile + (i * width + j) * channels + c);
#pragma GCC unroll 4
        for (ptrdiff_t j = 0; j < 4; ++j) winograd_int8_bt(d[j], d[4 + j], d[8 + j], d[12 + j]);
#pragma GCC unroll 4
        for (ptrdiff_t i = 0; i < 16; i += 4) winograd_int8_bt(d[i], d[i + 1], d[i + 2], d[i + 3]);
#pragma GCC unroll 16
        for (ptrdiff_t place = 0; place < int8_places; ++place)
          hn::Store(d[place], tag, out + place * size.tiles * channels + c);
      }
    }
}

/// Four pixels of one tile, a panel wide: what A makes of `products`, [place][..][panel_width] with
/// so many sums between places, scaled, and with `add` where that is not null.
HWY_INLINE void winograd_int8_output(const std::int32_t* products, ptrdiff_t stride,
                                     const float* scale, const float* bias,
                                     const float* const (&add)[4], float* const (&out)[4]) {
  const bits_tag bits;
  const float_tag floats;
  using sums = hn::Vec<bits_tag>;
#pragma GCC unroll 2
  for (ptrdiff_t j = 0; j < panel_width; j += lanes) {
    sums half[8];
#pragma GCC unroll 4
    for (ptrdiff_t i = 0; i < 4; ++i) {
      const std::int32_t* m = products + i * stride + j;
      const sums m0 = hn::Load(bits, m), m1 = hn::Load(bits, m + 4 * stride);
      const sums m2 = hn::Load(bits, m + 8 * stride), m3 = hn::Load(bits, m + 12 * stride);
      half[i] = hn::Add(m0, hn::Add(m1, m2));
      half[4 + i] = hn::Sub(hn::Sub(m1, m2), m3);
    }
    const vector factor = hn::Load(floats, scale + j), addend = hn::Load(floats, bias + j);
    const auto finish = [&](ptrdiff_t pixel, sums four_times) {
      vector y = mul_add(hn::ConvertTo(floats, hn::ShiftRight<2>(four_times)), factor, addend);
      if (add[pixel]) y = hn::Add(y, hn::LoadU(floats, add[pixel] + j));
      hn::StoreU(y, floats, out[pixel] + j);
    };
#pragma GCC unroll 2
    for (ptrdiff_t y = 0; y < 2; ++y) {
      const sums* h = half + y * 4;
      finish(2 * y, hn::Add(h[0], hn::Add(h[1], h[2])));
      finish(2 * y + 1, hn::Sub(hn::Sub(h[1], h[2]), h[3]));
    }
  }
}

/// Writes so many columns of a tile's four pixels where they are wanted, from `products` on.
inline void finish_winograd_int8(const winograd_int8_args& args, ptrdiff_t t, ptrdiff_t n0,
                                 ptrdiff_t columns, const std::int32_t* products, ptrdiff_t stride,
                                 const float* scale, const float* bias) {
  alignas(64) float edge[4 * panel_width], added[4 * panel_width];
  const ptrdiff_t first = t / args.columns * 4 * args.columns + t % args.columns * 2;
  float* out[4];
  const float* add[4];
  for (ptrdiff_t i = 0; i < 4; ++i) {
    const ptrdiff_t pixel = first + i / 2 * 2 * args.columns + i % 2;
    const bool whole = args.y[pixel] && columns == panel_width;
    out[i] = whole ? args.y[pixel] + n0 : edge + i * panel_width;
    add[i] = args.y[pixel] && args.residual ? args.residual[pixel] + n0 : nullptr;
    if (add[i] && !whole) {
      float* const row = added + i * panel_width;
      std::fill(std::copy_n(add[i], columns, row), row + panel_width, 0.0f);
      add[i] = row;
    }
  }
  winograd_int8_output(products, stride, scale, bias, add, out);
  activate_tile<4>(args.act, out, 0);
  for (ptrdiff_t i = 0; i < 4; ++i)
    if (float* y = args.y[first + i / 2 * 2 * args.columns + i % 2]; y && columns < panel_width)
      std::copy_n(out[i], columns, y + n0);
}

inline void convolve_winograd_int8(const winograd_int8_args& args) {
  const winograd_int8_scratch size(args.rows, args.columns, args.in);
  auto* const patch = static_cast<std::int16_t*>(args.scratch);
  std::int16_t* const inputs = patch + size.patch();
  auto* const products = reinterpret_cast<std::int32_t*>(inputs + size.inputs());
  auto* const a =
      reinterpret_cast<const std::uint32_t**>(products + int8_places * size.tiles * panel_width);
  const int16_inputs::converter convert(args.input);
  for (ptrdiff_t i = 0; i < size.pixels; ++i) {
    std::int16_t* pixel = patch + i * size.channels;
    convert(args.in, args.x[i], reinterpret_cast<int16_inputs::a_element*>(pixel));
    std::fill(pixel + round_up(args.in, 2), pixel + size.channels, std::int16_t{0});
  }
  winograd_int8_transform(args, size, patch, inputs);

  const ptrdiff_t pairs = steps<int16_inputs>(args.in);
  const auto* panel = static_cast<const std::uint32_t*>(args.b);
  const ptrdiff_t stride = size.tiles * panel_width;
  for (ptrdiff_t n0 = 0; n0 < args.out; n0 += panel_width, panel += winograd_int8_panel(args.in)) {
    const ptrdiff_t columns = std::min(panel_width, args.out - n0);
    alignas(64) float bias[panel_width] = {}, scale[panel_width] = {};
    if (args.bias) std::copy_n(args.bias + n0, columns, bias);
    std::copy_n(args.scale + n0, columns, scale);
    for (ptrdiff_t place = 0; place < int8_places; ++place) {
      for (ptrdiff_t t = 0; t < size.tiles; ++t)
        a[t] = reinterpret_cast<const std::uint32_t*>(inputs +
                                                      (place * size.tiles + t) * size.channels);
      for_tiles(size.tiles, [&]<ptrdiff_t Rows>(ptrdiff_t row) {
        register_tile<Rows, tile_vectors, std::int32_t> tile;
        tile.clear();
        tile.template accumulate<int16_inputs>(pairs, a + row, 0,
                                               panel + place * pairs * panel_width);
        tile.store(products + place * stride + row * panel_width, panel_width);
      });
    }
    for (ptrdiff_t t = 0; t < size.tiles; ++t)
      finish_winograd_int8(args, t, n0, columns, products + t * panel_width, stride, scale, bias);
  }
}

inline constexpr winograd_int8_kernels winograd_int8_of_pairs{
    .packed_bytes = winograd_int8_packed_bytes,
    .pack = pack_winograd_int8,
    .scratch_bytes = winograd_int8_scratch_bytes,
    .convolve = convolve_winograd_int8};

template <>
inline constexpr const winograd_int8_kernels* winograd_int8<int8_dot::vpmaddwd> =
    &winograd_int8_of_pairs;

#endif

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
