/// The transforms of Winograd's F(4 x 4, 3 x 3): see contract.hpp. Vectorised over channels; a tile
/// of one vector of channels stays in L1 between its two passes. About 7 operations for each of 36
/// loads and 36 stores: bound by the ports that load and store. Weights take about 4
/// for each of 36 stores, where the products take 72 for each tile: little for hundreds of tiles.
#pragma once

#include <algorithm>

#include "contract.hpp"
#include "elementwise.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// out[i * step] = B^T d for d[i * step], i from 0 to 5.
HWY_INLINE void winograd_bt(const batch* d, ptrdiff_t step, batch* out) {
  const batch d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step],
              d5 = d[5 * step];
  const batch four(4.0f), minus_four(-4.0f), minus_five(-5.0f);
  const batch a = fused(minus_four, d2, d4), b = fused(minus_four, d1, d3);
  const batch c = d4 - d2, e = d3 - d1;
  out[0] = fused(four, d0, fused(minus_five, d2, d4));
  out[step] = a + b;
  out[2 * step] = a - b;
  out[3 * step] = fused(batch(2.0f), e, c);
  out[4 * step] = fused(batch(-2.0f), e, c);
  out[5 * step] = fused(four, d1, fused(minus_five, d3, d5));
}

/// out[i * step] = A^T m for m[i * step]; i from 0 to 3 of the result, from 0 to 5 of m.
HWY_INLINE void winograd_at(const batch* m, ptrdiff_t step, batch* out) {
  const batch sum12 = m[step] + m[2 * step], difference12 = m[step] - m[2 * step];
  const batch sum34 = m[3 * step] + m[4 * step], difference34 = m[3 * step] - m[4 * step];
  const batch m0 = m[0], m5 = m[5 * step];
  out[0] = m0 + sum12 + sum34;
  out[step] = fused(batch(2.0f), difference34, difference12);
  out[2 * step] = fused(batch(4.0f), sum34, sum12);
  out[3 * step] = fused(batch(8.0f), difference34, difference12) + m5;
}

/// out[i * out_step] = G g for g[i * step]; i from 0 to 5 of the result, from 0 to 2 of g.
HWY_INLINE void winograd_g(const batch* g, ptrdiff_t step, batch* out, ptrdiff_t out_step) {
  const batch g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const batch sixth(1.0f / 6), twelfth(1.0f / 12), part(1.0f / 24);
  const batch outer = (g0 + g2) * sixth, inner = g1 * sixth;
  const batch even = fused(g0, part, g2 * sixth), odd = g1 * twelfth;
  out[0] = g0 * batch(0.25f);
  out[out_step] = batch(0.0f) - (outer + inner);
  out[2 * out_step] = inner - outer;
  out[3 * out_step] = even + odd;
  out[4 * out_step] = even - odd;
  out[5 * out_step] = g2;
}

/// Calls f(c, load, store) for vectors of channels from c on; the last may be shorter.
template <class Function>
HWY_INLINE void for_channels(ptrdiff_t channels, Function&& f) {
  ptrdiff_t c = 0;
  for (; c + batch_lanes <= channels; c += batch_lanes)
    f(
        c, [](const float* x) { return batch::load_unaligned(x); },
        [](batch v, float* out) { v.store_unaligned(out); });
  if (const ptrdiff_t rest = channels - c; rest > 0)
    f(
        c, [rest](const float* x) { return load_first(rest, x); },
        [rest](batch v, float* out) { store_first(rest, v, out); });
}

inline void winograd_weights(const winograd_weights_args& args) {
  for_channels(args.n, [&](ptrdiff_t i, auto load, auto store) {
    batch taps[9], half[18], filter[36];
#pragma GCC unroll 9
    for (ptrdiff_t tap = 0; tap < 9; ++tap) taps[tap] = load(args.g + tap * args.g_stride + i);
#pragma GCC unroll 3
    for (ptrdiff_t column = 0; column < 3; ++column) winograd_g(taps + column, 3, half + column, 3);
#pragma GCC unroll 6
    for (ptrdiff_t row = 0; row < 6; ++row) winograd_g(half + row * 3, 1, filter + row * 6, 1);
#pragma GCC unroll 36
    for (ptrdiff_t place = 0; place < 36; ++place)
      store(filter[place], args.out + place * args.out_stride + i);
  });
}

inline void winograd_input(const winograd_input_args& args) {
  for_channels(args.channels, [&](ptrdiff_t c, auto load, auto store) {
    batch tile[36];
#pragma GCC unroll 36
    for (ptrdiff_t i = 0; i < 36; ++i) tile[i] = load(args.x[i] + c);
#pragma GCC unroll 6
    for (ptrdiff_t column = 0; column < 6; ++column) winograd_bt(tile + column, 6, tile + column);
#pragma GCC unroll 6
    for (ptrdiff_t row = 0; row < 6; ++row) winograd_bt(tile + row * 6, 1, tile + row * 6);
#pragma GCC unroll 36
    for (ptrdiff_t i = 0; i < 36; ++i) store(tile[i], args.out + i * args.out_stride + c);
  });
}

inline void winograd_output(const winograd_output_args& args) {
  with_activation(args.act, [&]<activation Act>() {
    for_channels(args.channels, [&](ptrdiff_t c, auto load, auto store) {
      const batch bias = args.bias ? load(args.bias + c) : batch(0.0f);
      batch tile[36], half[24];
#pragma GCC unroll 36
      for (ptrdiff_t i = 0; i < 36; ++i) tile[i] = load(args.m + i * args.m_stride + c);
#pragma GCC unroll 6
      for (ptrdiff_t column = 0; column < 6; ++column) winograd_at(tile + column, 6, half + column);
      for (ptrdiff_t row = 0; row < 4; ++row) {
        batch y[4];
        winograd_at(half + row * 6, 1, y);
        for (ptrdiff_t x = 0; x < 4; ++x)
          if (float* out = args.out[row * 4 + x]) {
            batch sum = y[x] + bias;
            if (args.residual) sum = sum + load(args.residual[row * 4 + x] + c);
            store(apply_batch<Act>(sum), out + c);
          }
      }
    });
  });
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
