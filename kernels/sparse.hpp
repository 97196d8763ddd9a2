/// GEMM whose B is mostly zeros, which are neither stored nor multiplied.
///
/// Vectors run over rows of A (tokens), not over columns of B: a block of A is transposed into a
/// tile that stays in L1, and each element of B that is not zero multiplies a row of the tile, one
/// number per token, into the sums of its column. Whatever pattern the zeros have, every load is
/// then a whole vector.
///
/// Loop order, from the outside: tiles of rows, chunks of columns (their sums stay in L2), blocks
/// of k (the tile), groups of columns, elements. An element costs one broadcast, one offset and an
/// FMA with a load for each of the tile's vectors: bound by the FMA units where there are two loads
/// to two FMAs, beside what it takes to transpose A and C (kernels of 4 x 4) and to keep the sums
/// of a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#include "bf16.hpp"
#include "contract.hpp"
#include "elementwise.hpp"
#include "int8.hpp"
#include "transpose.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

/// A tile of so many vectors of tokens, as deep as L1 allows. The more vectors share an element's
/// broadcast the less it costs; the deeper the tile, the fewer are the blocks that each load and
/// store the sums.
template <ptrdiff_t Vectors>
struct tile_shape {
  static constexpr ptrdiff_t vectors = Vectors, tokens = Vectors * lanes;
  /// Rows: it takes 28 of 32 KiB of L1, and offsets in it fit 16 bits.
  static constexpr ptrdiff_t depth = 28 * 1024 / 4 / tokens / 4 * 4;
  /// Columns whose sums take at most 192 KiB.
  static constexpr ptrdiff_t chunk_columns = 192 * 1024 / 4 / tokens / column_slice * column_slice;
};

/// Registers that hold sums.
inline constexpr ptrdiff_t most_sums = tile_rows > 6 ? 26 : 14;
/// Two columns' sums at a time: 7 vectors of 16 registers, or 13 of 32 where they are of 4 floats.
using deep_tile = tile_shape<lanes == 4 && most_sums == 26 ? 13 : 7>;
/// One column's. 13 vectors of 8 floats hold two windows of 7 x 7; elsewhere the deep tile does or
/// registers are too few.
using wide_tile = tile_shape<lanes == 8 ? 13 : deep_tile::vectors>;

/// Columns that are transposed back at a time, and among which a block may order them as it likes.
inline constexpr ptrdiff_t strip_columns = column_slice;

/// Columns that are packed side by side, with as many elements each: of those with fewer some are
/// zeros.
inline constexpr ptrdiff_t group_columns = 4;

/// B's rows cut into `count` blocks of at most `depth` rows, none across taps.
struct row_blocks {
  ptrdiff_t depth, count;

  row_blocks(const sparse_matrix& b, ptrdiff_t most) {
    const ptrdiff_t pieces = (b.k + most - 1) / most;
    depth = round_up((b.k + pieces - 1) / pieces, 2);  // pairs of bf16 stay together
    count = b.taps * ((b.k + depth - 1) / depth);
  }
};

inline ptrdiff_t stored_elements(const sparse_matrix& b) {
  ptrdiff_t stored = 0;
  for (ptrdiff_t i = 0; i < b.taps * b.k; ++i)
    for (ptrdiff_t j = 0; j < b.n; ++j) stored += b.at(i, j) != 0.0f;
  return stored;
}

/// What a product takes, about, beside transposing A and C, in the time of a dense multiply-add of
/// a vector of fp32. See sparse_time.
template <class Tile>
inline float tile_time(const sparse_matrix& b, ptrdiff_t stored) {
  const auto f = [](ptrdiff_t n) { return static_cast<float>(n); };
  const ptrdiff_t vectors = (b.rows + lanes - 1) / lanes;
  const ptrdiff_t tiles = (vectors + Tile::vectors - 1) / Tile::vectors;
  const float sums = f(b.n * row_blocks(b, Tile::depth).count);
  return f(vectors) * (f(stored) + 6.5f * sums) + 2.0f * f(tiles) * f(stored);
}
inline bool wide_is_faster(const sparse_matrix& b, ptrdiff_t stored) {
  return tile_time<wide_tile>(b, stored) < tile_time<deep_tile>(b, stored);
}

/// What lies at the start of a packed B, and where the rest follows, in bytes from there.
///
/// B's rows are cut into `blocks` of at most `depth` rows. In each block, and within strips of
/// strip_columns, columns are sorted by how many elements they have, and each group_columns of them
/// make a group: they have nearly as many, and the CPU guesses when a loop over them ends. The c-th
/// column of the q-th group of all blocks, which is i * groups + g, is places[q * group_columns +
/// c] (columns after the last one are empty); its elements, `count` as in the whole group, lie from
/// starts[q] + c * count on.
struct sparse_header {
  ptrdiff_t wide;  ///< the tile: 1 a wide_tile, 0 a deep_tile
  ptrdiff_t blocks, depth, groups;
  ptrdiff_t places;   ///< std::uint16_t
  ptrdiff_t values;   ///< float: the elements
  ptrdiff_t offsets;  ///< std::uint16_t: where in the tile an element's row starts, in bytes

  explicit sparse_header(const sparse_matrix& b)
      : wide(wide_is_faster(b, stored_elements(b))),
        groups(round_up(b.n, group_columns) / group_columns) {
    const row_blocks rows(b, wide ? wide_tile::depth : deep_tile::depth);
    blocks = rows.count;
    depth = rows.depth;
    places = static_cast<ptrdiff_t>(sizeof(*this)) + (blocks * groups + 1) * 4;
    values = round_up(places + blocks * groups * group_columns * 2, 64);
  }

  /// What is at `offset` bytes of a packed B.
  template <class T>
  static const T* at(const void* packed, ptrdiff_t offset) {
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(packed) + offset);
  }
  const std::int32_t* starts() const { return reinterpret_cast<const std::int32_t*>(this + 1); }
};

/// How A and the elements of B become factors. Elements come in the order in which `gemm` adds
/// them.
template <class Inputs>
class sparse_factors {
public:
  explicit sparse_factors(const gemm_args&) {}
  static float element(float x) { return x; }
  /// The i-th row of B in that order, of `count`.
  static ptrdiff_t order(ptrdiff_t i, ptrdiff_t) { return i; }
  static constexpr bool converts = false;
  /// A vector of A's factors from the floats at x, which are of channel `i`, counted over all taps.
  vector factor(const float* x, ptrdiff_t) const { return hn::Load(float_tag(), x); }
};

template <>
class sparse_factors<bf16_inputs> {
public:
  explicit sparse_factors(const gemm_args&) {}
  static float element(float x) {
    const hn::CappedTag<float, 1> one;
    return hn::GetLane(hn::BitCast(one, round_to_bf16(one, hn::Set(one, x))));
  }
  static ptrdiff_t order(ptrdiff_t i, ptrdiff_t count) {
    return (i ^ 1) < count ? i ^ 1 : i;  // the second of a pair first
  }
  static constexpr bool converts = true;
  vector factor(const float* x, ptrdiff_t) const {
    const float_tag tag;
    return hn::BitCast(tag, round_to_bf16(tag, hn::Load(tag, x)));
  }
};

/// Whole numbers in floats: exact as long as a column's sum of |element| is at most
/// max_sparse_column_sum.
template <>
class sparse_factors<int8_inputs> {
public:
  explicit sparse_factors(const gemm_args& args) : input_(args.input) {}
  static float element(float x) { return x; }
  static ptrdiff_t order(ptrdiff_t i, ptrdiff_t) { return i; }
  static constexpr bool converts = true;
  vector factor(const float* x, ptrdiff_t i) const {
    const float_tag tag;
    return hn::ConvertTo(tag, quantized(tag, hn::Load(tag, x), hn::Set(tag, input_.inverse[i]),
                                        hn::Set(tag, input_.zero_point[i])));
  }

private:
  channel_quantization input_;
};

/// Calls f(group of all blocks, first row of the block in B, its rows, columns of the group,
/// elements of each) in the order in which they are packed.
template <class Function>
inline void for_groups(const sparse_matrix& b, const sparse_header& h, Function&& f) {
  ptrdiff_t group = 0;
  for (ptrdiff_t tap = 0; tap < b.taps; ++tap)
    for (ptrdiff_t k0 = 0; k0 < b.k; k0 += h.depth) {
      const ptrdiff_t first = tap * b.k + k0, rows = std::min(h.depth, b.k - k0);
      for (ptrdiff_t strip = 0; strip < b.n; strip += strip_columns) {
        const ptrdiff_t width = std::min(strip_columns, b.n - strip);
        ptrdiff_t counts[strip_columns] = {}, order[strip_columns];
        for (ptrdiff_t j = 0; j < strip_columns; ++j) order[j] = j;
        for (ptrdiff_t j = 0; j < width; ++j)
          for (ptrdiff_t i = 0; i < rows; ++i) counts[j] += b.at(first + i, strip + j) != 0.0f;
        for (ptrdiff_t p = 1; p < width; ++p)  // by insertion
          for (ptrdiff_t q = p; q > 0 && counts[order[q - 1]] < counts[order[q]]; --q)
            std::swap(order[q - 1], order[q]);
        for (ptrdiff_t p = 0; p < width; p += group_columns) {
          ptrdiff_t columns[group_columns];
          for (ptrdiff_t c = 0; c < group_columns; ++c) columns[c] = strip + order[p + c];
          f(group++, first, rows, columns, counts[order[p]]);
        }
      }
    }
}

inline ptrdiff_t sparse_bytes(const sparse_matrix& b) {
  const sparse_header header(b);
  ptrdiff_t elements = 0;
  for_groups(b, header, [&](ptrdiff_t, ptrdiff_t, ptrdiff_t, const ptrdiff_t*, ptrdiff_t count) {
    elements += group_columns * count;
  });
  return header.values + round_up(elements * 4, 64) + round_up(elements * 2, 64);
}

template <class Inputs>
inline void pack_sparse(const sparse_matrix& b, void* packed) {
  using factors = sparse_factors<Inputs>;
  auto* header = new (packed) sparse_header(b);
  const ptrdiff_t tokens = header->wide ? wide_tile::tokens : deep_tile::tokens;
  auto* bytes = static_cast<std::byte*>(packed);
  auto* starts = reinterpret_cast<std::int32_t*>(header + 1);
  auto* places = reinterpret_cast<std::uint16_t*>(bytes + header->places);
  auto* values = reinterpret_cast<float*>(bytes + header->values);
  std::int32_t total = 0;
  for_groups(b, *header,
             [&](ptrdiff_t group, ptrdiff_t, ptrdiff_t, const ptrdiff_t* columns, ptrdiff_t count) {
               starts[group] = total;
               total += static_cast<std::int32_t>(group_columns * count);
               starts[group + 1] = total;
               for (ptrdiff_t c = 0; c < group_columns; ++c)
                 places[group * group_columns + c] = static_cast<std::uint16_t>(columns[c]);
             });
  header->offsets = header->values + round_up(total * 4, 64);
  auto* offsets = reinterpret_cast<std::uint16_t*>(bytes + header->offsets);
  std::fill_n(values, total, 0.0f);
  std::fill_n(offsets, total, std::uint16_t{0});
  for_groups(b, *header,
             [&](ptrdiff_t group, ptrdiff_t first, ptrdiff_t rows, const ptrdiff_t* columns,
                 ptrdiff_t count) {
               for (ptrdiff_t c = 0; c < group_columns && columns[c] < b.n; ++c) {
                 ptrdiff_t at = starts[group] + c * count;
                 for (ptrdiff_t i = 0; i < rows; ++i) {
                   const ptrdiff_t row = factors::order(i, rows);
                   const float x = b.at(first + row, columns[c]);
                   if (x == 0.0f) continue;
                   values[at] = factors::element(x);
                   offsets[at++] = static_cast<std::uint16_t>(row * tokens * 4);
                 }
               }
             });
}

/// One block of k for Vectors * lanes tokens of a Tile. `Scaled` as Inputs::scaled.
template <bool Scaled, class Tile, ptrdiff_t Vectors>
class sparse_block {
public:
  sparse_block(const gemm_args& args, const sparse_header& header, ptrdiff_t block,
               const float* tile)
      : args_(args),
        starts_(header.starts() + block * header.groups),
        places_(sparse_header::at<std::uint16_t>(&header, header.places) +
                block * header.groups * group_columns),
        values_(sparse_header::at<float>(&header, header.values)),
        offsets_(sparse_header::at<std::uint16_t>(&header, header.offsets)),
        tile_(tile),
        first_(block == 0),
        last_(block + 1 == header.blocks) {}

  /// Adds the block to the sums of B's columns `from` to `to`, Tile::tokens floats each.
  void add(ptrdiff_t from, ptrdiff_t to, float* sums) const {
    for (ptrdiff_t g = from / group_columns; g * group_columns < to; ++g) {
      const ptrdiff_t start = starts_[g], count = (starts_[g + 1] - start) / group_columns;
#pragma GCC unroll 4
      for (ptrdiff_t c = 0; c < group_columns; c += at_once)
        add_columns(places_ + g * group_columns + c, start + c * count, count, from, sums);
    }
  }

private:
  /// Columns whose sums are in registers: enough of them for two FMAs in each of their cycles of
  /// latency.
  static constexpr ptrdiff_t at_once = 4 * Vectors <= most_sums   ? 4
                                       : 2 * Vectors <= most_sums ? 2
                                                                  : 1;

  HWY_INLINE void add_columns(const std::uint16_t* places, ptrdiff_t start, ptrdiff_t count,
                              ptrdiff_t from, float* out) const {
    const float_tag tag;
    vector sums[at_once][Vectors];
    float* at[at_once];
#pragma GCC unroll 4
    for (ptrdiff_t c = 0; c < at_once; ++c) {
      at[c] = out + (places[c] - from) * Tile::tokens;
      const vector first = hn::Set(tag, Scaled ? 0.0f : of_column(args_.bias, places[c]));
#pragma GCC unroll 16
      for (ptrdiff_t v = 0; v < Vectors; ++v)
        sums[c][v] = first_ ? first : hn::Load(tag, at[c] + v * lanes);
    }
    for (ptrdiff_t i = start; i < start + count; ++i)
#pragma GCC unroll 4
      for (ptrdiff_t c = 0; c < at_once; ++c) {
        const vector x = hn::Set(tag, values_[i + c * count]);
        const auto* row = sparse_header::at<float>(tile_, offsets_[i + c * count]);
#pragma GCC unroll 16
        for (ptrdiff_t v = 0; v < Vectors; ++v)
          sums[c][v] = mul_add(x, hn::Load(tag, row + v * lanes), sums[c][v]);
      }
#pragma GCC unroll 4
    for (ptrdiff_t c = 0; c < at_once; ++c) {
      if (Scaled && last_) {
        const vector scale = hn::Set(tag, of_column(args_.scale, places[c]));
        const vector bias = hn::Set(tag, of_column(args_.bias, places[c]));
#pragma GCC unroll 16
        for (ptrdiff_t v = 0; v < Vectors; ++v) sums[c][v] = mul_add(sums[c][v], scale, bias);
      }
#pragma GCC unroll 16
      for (ptrdiff_t v = 0; v < Vectors; ++v) hn::Store(sums[c][v], tag, at[c] + v * lanes);
    }
  }

  /// values[column of C], 0 where there is none.
  float of_column(const float* values, ptrdiff_t column_of_b) const {
    const ptrdiff_t column = column_of_b - args_.column;
    return values && column < args_.n ? values[column] : 0.0f;
  }

  const gemm_args& args_;
  const std::int32_t* starts_;
  const std::uint16_t* places_;
  const float* values_;
  const std::uint16_t* offsets_;
  const float* tile_;
  bool first_, last_;
};

/// Calls f.template operator()<Vectors>() with `vectors` (1 to Vectors) at compile time.
template <ptrdiff_t Vectors, class Function>
HWY_INLINE void with_vectors(ptrdiff_t vectors, Function&& f) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) return with_vectors<Vectors - 1>(vectors, static_cast<Function&&>(f));
  }
  f.template operator()<Vectors>();
}

/// Adds a block to the sums of the columns `from` to `to` over the first `vectors` of a Tile.
template <bool Scaled, class Tile>
HWY_NOINLINE void add_block(const gemm_args& args, ptrdiff_t block, const float* tile,
                            ptrdiff_t vectors, ptrdiff_t from, ptrdiff_t to, float* sums) {
  const auto& header = *static_cast<const sparse_header*>(args.b);
  with_vectors<Tile::vectors>(vectors, [&]<ptrdiff_t Vectors>() {
    sparse_block<Scaled, Tile, Vectors>(args, header, block, tile).add(from, to, sums);
  });
}

/// Sums (columns, Tile::tokens) become rows of C: residual, store, activation.
template <class Tile>
HWY_NOINLINE void finish_sparse(const gemm_args& args, ptrdiff_t row, ptrdiff_t rows,
                                ptrdiff_t column, ptrdiff_t columns, const float* sums) {
  float* const* c = args.c + row;
  const float* const* residual = args.residual ? args.residual + row : nullptr;
  with_activation(args.act, [&]<activation Act>() {
    for (ptrdiff_t strip = 0; strip < columns; strip += strip_columns) {
      const ptrdiff_t width = std::min(strip_columns, columns - strip), first = column + strip;
      transpose_back<Tile::tokens>(rows, width, sums + strip * Tile::tokens, residual, first, c,
                                   [&](ptrdiff_t j, ptrdiff_t n) {
                                     if constexpr (Act != activation::none)
                                       for (ptrdiff_t i = j; i < j + n; ++i)
                                         map(width, c[i] + first, c[i] + first, apply_batch<Act>);
                                   });
    }
  });
}

/// `rows` rows of A, at most Tile::tokens.
template <class Inputs, class Tile>
inline void sparse_rows(const gemm_args& args, ptrdiff_t row, ptrdiff_t rows) {
  alignas(64) float tile[Tile::depth * Tile::tokens];
  alignas(64) float sums[Tile::chunk_columns * Tile::tokens];
  const auto& header = *static_cast<const sparse_header*>(args.b);
  const sparse_factors<Inputs> factors(args);
  const ptrdiff_t vectors = (rows + lanes - 1) / lanes;
  for (ptrdiff_t column = 0; column < args.n; column += Tile::chunk_columns) {
    const ptrdiff_t columns = std::min(Tile::chunk_columns, args.n - column);
    const ptrdiff_t from = args.column + column;
    ptrdiff_t block = 0;
    for (ptrdiff_t tap = 0; tap < args.taps; ++tap)
      for (ptrdiff_t k0 = 0; k0 < args.k; k0 += header.depth, ++block) {
        const ptrdiff_t depth = std::min(header.depth, args.k - k0);
        transpose_rows<Tile::tokens>(rows, vectors * lanes, depth, args.a + tap * args.m + row, k0,
                                     tile);
        for (ptrdiff_t i = 0; factors.converts && i < depth; ++i)
          for (ptrdiff_t v = 0; v < vectors; ++v) {
            float* at = tile + i * Tile::tokens + v * lanes;
            hn::Store(factors.factor(at, tap * args.k + k0 + i), float_tag(), at);
          }
        add_block<Inputs::scaled, Tile>(args, block, tile, vectors, from, from + columns, sums);
      }
    finish_sparse<Tile>(args, row, rows, column, columns, sums);
  }
}

/// Rows are cut into as few tiles as there can be, of nearly equal numbers of vectors.
template <class Inputs, class Tile>
inline void sparse_tiles(const gemm_args& args) {
  const ptrdiff_t vectors = (args.m + lanes - 1) / lanes;
  const ptrdiff_t tiles = (vectors + Tile::vectors - 1) / Tile::vectors;
  for (ptrdiff_t i = 0, row = 0; i < tiles; ++i) {
    const ptrdiff_t end = std::min(vectors * (i + 1) / tiles * lanes, args.m);
    sparse_rows<Inputs, Tile>(args, row, end - row);
    row = end;
  }
}

template <class Inputs>
inline void sparse_gemm(const gemm_args& args) {
  const bool wide = static_cast<const sparse_header*>(args.b)->wide;
  wide ? sparse_tiles<Inputs, wide_tile>(args) : sparse_tiles<Inputs, deep_tile>(args);
}

/// What a sparse product takes over a dense one, about. In the time of a dense multiply-add of a
/// vector of fp32 a tile of v vectors costs
///
///     v + 2 per element + 6.5 v per column and block + edge v per row and column of B
///
/// and the dense kernels `dense` per vector and multiply-add. Least squares over the encoder's
/// shapes at 0 to 95 % zeros (Zen 3, one thread; bench/sparse_products.py): 4 % off in the mean.
/// Where there are dot products of bf16 or of four bytes, `dense` is what their throughput
/// promises.
inline float sparse_time(precision factors, const sparse_matrix& b, ptrdiff_t stored) {
  const bool converts = factors == precision::bf16 || factors == precision::int8;
  const float edge = converts ? 5.5f : 2.5f;
  const float dense = factors == precision::bf16
                          ? (target::bf16 == bf16_dot::vdpbf16ps ? 0.55f : 1.38f)
                      : factors == precision::int8 ? (int8_inputs::step == 4   ? 0.3f
                                                      : int8_inputs::step == 2 ? 0.68f
                                                                               : 1.1f)
                                                   : 1.0f;
  const auto f = [](ptrdiff_t n) { return static_cast<float>(n); };
  const float vectors = f(b.rows) / f(lanes), depth = f(b.taps * b.k), n = f(b.n);
  const float products = std::min(tile_time<deep_tile>(b, stored), tile_time<wide_tile>(b, stored));
  return (products + edge * vectors * (depth + n)) / (dense * vectors * depth * n);
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
