/// Rows of tokens to rows of channels and back, in blocks of 4 x 4 of which a vector holds lanes
/// / 4. Bound by the shuffles, a quarter of one per element with vectors of 8, and by stores.
#pragma once

#include <algorithm>

#include "target.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR
/// The floats at at(0) in the first block of four lanes, those at at(1) in the second, ...
template <class Tag, class Place>
HWY_INLINE hn::Vec<Tag> load_blocks(Tag tag, ptrdiff_t first, Place at) {
  if constexpr (hn::MaxLanes(Tag()) == 4) {
    return hn::LoadU(tag, at(first));
  } else {
    const hn::Half<Tag> half;
    const auto low = load_blocks(half, first, at);
    const auto blocks = static_cast<ptrdiff_t>(hn::MaxLanes(half)) / 4;
    return hn::Combine(tag, load_blocks(half, first + blocks, at), low);
  }
}

/// The first four lanes to at(0), the next four to at(1), ..., each after f.
template <class Tag, class Store>
HWY_INLINE void store_blocks(Tag, hn::Vec<Tag> v, ptrdiff_t first, Store&& store) {
  if constexpr (hn::MaxLanes(Tag()) == 4) {
    store(first, v);
  } else {
    const hn::Half<Tag> half;
    store_blocks(half, hn::LowerHalf(half, v), first, store);
    const auto blocks = static_cast<ptrdiff_t>(hn::MaxLanes(half)) / 4;
    store_blocks(half, hn::UpperHalf(half, v), first + blocks, store);
  }
}

/// Transposes the 4 x 4 matrices that the blocks of rows v[0] to v[3] are.
template <class Tag>
HWY_INLINE void transpose_blocks(Tag tag, hn::Vec<Tag> (&v)[4]) {
  const hn::RepartitionToWide<hn::RebindToUnsigned<Tag>> pairs;
  const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(tag, v[0], v[1]));
  const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(tag, v[2], v[3]));
  const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(tag, v[0], v[1]));
  const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(tag, v[2], v[3]));
  v[0] = hn::BitCast(tag, hn::InterleaveLower(pairs, low01, low23));
  v[1] = hn::BitCast(tag, hn::InterleaveUpper(pairs, low01, low23));
  v[2] = hn::BitCast(tag, hn::InterleaveLower(pairs, high01, high23));
  v[3] = hn::BitCast(tag, hn::InterleaveUpper(pairs, high01, high23));
}

/// `tokens` (lanes of Tag) rows from j on: out[i * Stride + j] = row[j][first + i] for i < d.
template <ptrdiff_t Stride, class Tag>
HWY_INLINE void transpose_tokens(Tag tag, ptrdiff_t j, ptrdiff_t d, const float* const* row,
                                 ptrdiff_t first, float* out) {
  constexpr auto tokens = static_cast<ptrdiff_t>(hn::MaxLanes(Tag()));
  const float* from[tokens];
#pragma GCC unroll 16
  for (ptrdiff_t n = 0; n < tokens; ++n) from[n] = row[j + n] + first;
  ptrdiff_t i = 0;
  for (; i + 4 <= d; i += 4) {
    hn::Vec<Tag> v[4];
#pragma GCC unroll 4
    for (ptrdiff_t n = 0; n < 4; ++n)
      v[n] = load_blocks(tag, 0, [&](ptrdiff_t block) { return from[4 * block + n] + i; });
    transpose_blocks(tag, v);
#pragma GCC unroll 4
    for (ptrdiff_t n = 0; n < 4; ++n) hn::StoreU(v[n], tag, out + (i + n) * Stride + j);
  }
  for (; i < d; ++i)
    for (ptrdiff_t n = 0; n < tokens; ++n) out[i * Stride + j + n] = from[n][i];
}

/// Back: row[j][first + i] = from[i * Stride + j] + addend[j][first + i] for the same tokens.
template <ptrdiff_t Stride, class Tag>
HWY_INLINE void transpose_tokens_back(Tag tag, ptrdiff_t j, ptrdiff_t d, const float* from,
                                      const float* const* addend, ptrdiff_t first,
                                      float* const* row) {
  constexpr auto tokens = static_cast<ptrdiff_t>(hn::MaxLanes(Tag()));
  const hn::FixedTag<float, 4> quad;
  float* out[tokens];
#pragma GCC unroll 16
  for (ptrdiff_t n = 0; n < tokens; ++n) out[n] = row[j + n] + first;
  ptrdiff_t i = 0;
  for (; i + 4 <= d; i += 4) {
    hn::Vec<Tag> v[4];
#pragma GCC unroll 4
    for (ptrdiff_t n = 0; n < 4; ++n) v[n] = hn::LoadU(tag, from + (i + n) * Stride + j);
    transpose_blocks(tag, v);
#pragma GCC unroll 4
    for (ptrdiff_t n = 0; n < 4; ++n)
      store_blocks(tag, v[n], 0, [&](ptrdiff_t block, auto four) {
        const ptrdiff_t token = 4 * block + n;
        if (addend) four = hn::Add(four, hn::LoadU(quad, addend[j + token] + first + i));
        hn::StoreU(four, quad, out[token] + i);
      });
  }
  for (; i < d; ++i)
    for (ptrdiff_t n = 0; n < tokens; ++n) {
      const float x = from[i * Stride + j + n];
      out[n][i] = addend ? x + addend[j + n][first + i] : x;
    }
}
#endif

/// The elements `first` to first + d - 1 of `rows` rows become columns: out[i * Stride + j] =
/// row[j][first + i], zeros in what is left of `width` columns.
template <ptrdiff_t Stride>
HWY_INLINE void transpose_rows(ptrdiff_t rows, ptrdiff_t width, ptrdiff_t d,
                               const float* const* row, ptrdiff_t first, float* out) {
  ptrdiff_t j = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; j + lanes <= rows; j += lanes)
    transpose_tokens<Stride>(float_tag(), j, d, row, first, out);
  for (; j + 4 <= rows; j += 4)
    transpose_tokens<Stride>(hn::FixedTag<float, 4>(), j, d, row, first, out);
#endif
  for (; j < width; ++j)
    for (ptrdiff_t i = 0; i < d; ++i) out[i * Stride + j] = j < rows ? row[j][first + i] : 0.0f;
}

/// Back: row[j][first + i] = from[i * Stride + j] for `rows` rows of d elements, and those of
/// `addend`, where not null, added (it may be `row`). Calls done(j, n) when n rows from j on are
/// written.
template <ptrdiff_t Stride, class Function>
HWY_INLINE void transpose_back(ptrdiff_t rows, ptrdiff_t d, const float* from,
                               const float* const* addend, ptrdiff_t first, float* const* row,
                               Function&& done) {
  ptrdiff_t j = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; j + lanes <= rows; j += lanes) {
    transpose_tokens_back<Stride>(float_tag(), j, d, from, addend, first, row);
    done(j, lanes);
  }
  for (; j + 4 <= rows; j += 4) {
    transpose_tokens_back<Stride>(hn::FixedTag<float, 4>(), j, d, from, addend, first, row);
    done(j, 4);
  }
#endif
  for (; j < rows; ++j) {
    for (ptrdiff_t i = 0; i < d; ++i) {
      const float x = from[i * Stride + j];
      row[j][first + i] = addend ? x + addend[j][first + i] : x;
    }
    done(j, 1);
  }
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
