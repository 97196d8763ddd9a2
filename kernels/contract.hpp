/// What a CPU target offers the runtime: plain functions over raw pointers, collected in one table.
///
/// All functions are serial and pure: they touch only what their arguments name, allocate nothing
/// and give the same bits however the caller cuts the work into calls, so that threads (which live
/// above, in include/) can never change a result.
///
/// Matrices are described by *row pointers* rather than by a stride. A row is k contiguous floats;
/// where the rows lie is the caller's business. The same GEMM is thereby a linear layer (rows at a
/// stride), a 3x3 convolution (nine lists of neighbouring pixels, a row of zeros outside the
/// image), a transposed convolution (scattered output rows), and windowed attention reads its
/// tokens where they are.
#pragma once

#include "macros_off.hpp"

#include <cstddef>

#include "strict_math.hpp"

namespace microtome::kernels {

using std::ptrdiff_t;

enum class activation {
  none,
  relu,
  gelu,      ///< x Phi(x)
  gelu_tanh  ///< its approximation x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
};

/// What the factors of products are kept as; everything else is fp32.
enum class precision {
  fp32,
  bf16,         ///< A and B rounded to 16 bits
  int8,         ///< A quantised as it is read, B whole numbers; sums are exact
  int8_weights  ///< B whole numbers times a scale per column; products in fp32
};

/// The longest sum of a GEMM, taps * k, but for fp32. (2^31 is 255 * 127 * 66311.)
inline constexpr ptrdiff_t max_gemm_depth = 16384;

/// How the floats x of a row of channels become bytes q, which stand for (q - zero_point) /
/// inverse:
///
///     q = min(max(round(x * inverse), -zero_point), 255 - zero_point) + zero_point
///
/// The product is rounded to fp32, round() is to the nearest, ties to even. So every target
/// quantises alike, and zero is exact.
struct channel_quantization {
  const float* inverse = nullptr;     ///< (channels)
  const float* zero_point = nullptr;  ///< (channels), whole numbers from 0 to 255
};

/// Products may be cut into pieces at multiples of this many columns of B. A multiple of the
/// columns that any target packs side by side.
inline constexpr ptrdiff_t column_slice = 64;

/// C = act(sum over t of A[t] * B[t] + bias + residual)
///
/// A[t] is (m, k), given by m row pointers per tap t; B is (taps * k, n), packed by `pack_b`;
/// C is (m, n). `bias` (n) and `residual` (m row pointers) may be null; a row of `residual` may be
/// the same memory as that row of C. Sums run over taps, then k, in order, in fp32, from `bias` on;
/// in bf16 they take pairs along taps * k, the second of a pair first.
///
/// With int8 factors B holds whole numbers from -127 to 127, and `scale` (n) is not null. For int8,
/// q is A, quantised as `input` (taps * k) says, whose zero points B was packed with, and
///
///     C = act(fma(float(sum of (q - zero_point) * B), scale, bias) + residual)
///
/// where the sum is exact and float() rounds it to the nearest. For int8_weights it is that of
/// A * B in fp32, in the order that fp32 has.
struct gemm_args {
  ptrdiff_t m, n, k;
  ptrdiff_t taps = 1;
  const float* const* a;    ///< [taps][m] pointers to k floats
  const void* b = nullptr;  ///< packed, 64-byte aligned
  float* const* c;          ///< [m] pointers to n floats
  const float* bias = nullptr;
  const float* const* residual = nullptr;  ///< [m] pointers to n floats
  activation act = activation::none;
  const float* scale = nullptr;
  channel_quantization input{};
  ptrdiff_t column = 0;  ///< of B, from which on n are multiplied: a multiple of column_slice
};

/// In int8, the largest sum of |B| over a column that a sparse product takes: sums of whole numbers
/// are then below 2^24, up to which fp32 holds all of them.
inline constexpr ptrdiff_t max_sparse_column_sum = (1 << 24) / 255;

/// out[i] = sum over j of softmax_j(scale * q[i].k[j] + bias[i][j]) v[j], for one head.
///
/// q is (n_q, d_k), k is (n_k, d_k), v is (n_k, d_v), out is (n_q, d_v), all given by row pointers.
/// `bias`, where not null, is (n_q, bias_stride) with bias_stride >= attention_columns(n_k), and
/// -infinity in the columns from n_k on.
struct attention_args {
  ptrdiff_t n_q, n_k, d_k, d_v;
  const float* const* q;
  const float* const* k;
  const float* const* v;
  float* const* out;
  float scale;
  const float* bias = nullptr;
  ptrdiff_t bias_stride = 0;
  float* scratch;  ///< attention_scratch(n_k, d_k, d_v) floats, 64-byte aligned
  float* lse =
      nullptr;  ///< where not null: (n_q), log(sum over j of exp(scale * q.k[j] + bias[j]))
};

/// One row of a depthwise convolution of `side` (3 or 5) over channels-last pixels:
///
///     out[x] = act(bias + sum over i, j of rows[i][x * stride + first + j - side / 2]
///                                          * weights[i][j])
///
/// for 0 <= x < n_out. A null row, or a column outside [0, n_in), counts as zeros.
///
/// With `scale` rows and weights are whole numbers: rows what `quantize` makes, weights from -127
/// to 127. Their sums are exact (up to 25 * 255 * 127, and fp32 holds all up to 2^24), and
///
///     out[x] = act(fma(sum, scale, bias))
struct depthwise_args {
  const float* rows[5];  ///< `side` of them, each n_in pixels of `channels` floats
  ptrdiff_t n_in, n_out, first, stride, channels;
  const float* weights;  ///< (side, side, channels)
  const float* bias;     ///< (channels)
  float* out;            ///< n_out pixels
  activation act = activation::none;
  const float* scale = nullptr;  ///< (channels)
  ptrdiff_t side = 3;
};

/// ReLU linear attention (Cai et al., EfficientViT, 2023) of n positions, for one head of `d`
/// channels. With q+ and k+ for what ReLU leaves of q and k,
///
///     out[i] = sum over j of v[j] (k+[j] . q+[i]) / (sum over j of k+[j] . q+[i] + epsilon)
///
/// in time linear in n: the sums over j are a matrix, taken once, over positions in order.
struct linear_attention_args {
  ptrdiff_t n, d;
  const float* const* qkv;  ///< [n] pointers to q, k and v: 3 d floats
  float* const* out;        ///< [n] pointers to d floats
  float epsilon;
  float* scratch;  ///< d * (d + 1) floats
};

/// The transforms of Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, Fast Algorithms for Convolutional
/// Neural Networks, 2016) around its 36 products: 4 x 4 outputs of a 3 x 3 convolution of stride 1
/// from 6 x 6 inputs d and weights g,
///
///     Y = A^T [ (G g G^T) * (B^T d B) ] A,
///
/// where * is element by element over the tile and a product of matrices over channels, and
///
///     B^T = 4  0 -5  0  1  0     G =  1/4     0     0     A^T = 1  1  1  1  1  0
///           0 -4 -4  1  1  0         -1/6  -1/6  -1/6           0  1 -1  2 -2  0
///           0  4 -4 -1  1  0         -1/6   1/6  -1/6           0  1  1  4  4  0
///           0 -2 -1  2  1  0         1/24  1/12   1/6           0  1 -1  8 -8  1
///           0  2 -1 -2  1  0         1/24 -1/12   1/6
///           0  4  0 -5  0  1            0     0     1
///
/// winograd_weights makes G g G^T of `n` filters of 3 x 3 weights, each for itself: in whatever
/// order they lie, so will the results.
struct winograd_weights_args {
  ptrdiff_t n;
  const float* g;      ///< 9 rows of n floats
  ptrdiff_t g_stride;  ///< floats from one to the next
  float* out;          ///< 36 rows of n floats
  ptrdiff_t out_stride;
};

/// winograd_input makes B^T d B of one tile.
struct winograd_input_args {
  ptrdiff_t channels;
  const float* const* x;  ///< [6 * 6] pointers to pixels
  float* out;             ///< 36 rows of `channels` floats
  ptrdiff_t out_stride;   ///< floats from one to the next
};

/// winograd_output makes act(A^T m A + bias + residual) of one tile.
struct winograd_output_args {
  ptrdiff_t channels;
  const float* m;      ///< 36 rows of `channels` floats
  ptrdiff_t m_stride;  ///< floats from one to the next
  float* const* out;   ///< [4 * 4] pointers to pixels; where null, the pixel is not wanted
  const float* bias;   ///< (channels), or null
  const float* const* residual = nullptr;  ///< [4 * 4] pointers to pixels, perhaps those of `out`
  activation act = activation::none;
};

/// A 3 x 3 convolution of stride 1 in int8 by Winograd's F(2 x 2, 3 x 3), as above with
///
///     B^T = 1  0 -1  0     G = 1/2 * 2  0  0     A^T = 1  1  1  0
///           0  1  1  0               1  1  1           0  1 -1 -1
///           0 -1  1  0               1 -1  1
///           0  1  0 -1               0  0  2
///
/// in whole numbers: B^T d B is at most 1020, (2 G) g (2 G)^T at most 9 * 127, and what A makes of
/// their products four times the sum of nine taps. So the result is that of gemm over nine taps to
/// the bit, for 16 products where those sums take 36. 9 * `in` is at most max_gemm_depth, and
/// so four times the sums fit 32 bits.
struct winograd_int8_args {
  ptrdiff_t rows, columns;  ///< of tiles of 2 x 2 pixels of the result
  ptrdiff_t in, out;
  const float* const* x;  ///< [2 * rows + 2][2 * columns + 2] pointers to pixels of `in` floats
  float* const* y;        ///< [2 * rows][2 * columns] pointers to pixels; null: not wanted
  const void* b;          ///< packed, 64-byte aligned
  const float* scale;     ///< (out)
  channel_quantization input;              ///< (in)
  const float* bias = nullptr;             ///< (out), or null
  const float* const* residual = nullptr;  ///< like y, perhaps the same pixels
  activation act = activation::none;
  void* scratch;  ///< scratch_bytes(rows, columns, in), 64-byte aligned
};
static_assert(std::int64_t{4} * max_gemm_depth * 255 * 127 < std::int64_t{1} << 31);

struct winograd_int8_kernels {
  ptrdiff_t (*packed_bytes)(ptrdiff_t in, ptrdiff_t out);
  /// Packs whole numbers (out, in, 3, 3).
  void (*pack)(ptrdiff_t in, ptrdiff_t out, const float* weights, void* packed);
  ptrdiff_t (*scratch_bytes)(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t in);
  void (*convolve)(const winograd_int8_args&);
};

/// out[i] = act((x[i] - mean(x[i])) / sqrt(var(x[i]) + epsilon) * gamma + beta) over each of `n`
/// rows of c floats; out may be x.
struct layer_norm_args {
  ptrdiff_t n, c;
  const float* const* x;
  float* const* out;
  const float* gamma;
  const float* beta;
  float epsilon;
  activation act = activation::none;
};

/// B (taps * k, n), element (i, j) at b[i * row_stride + j * column_stride], much of it zeros.
struct sparse_matrix {
  ptrdiff_t taps, k, n;
  const float* b;
  ptrdiff_t row_stride, column_stride;
  ptrdiff_t rows;  ///< of A in a product, about: others take longer, to the same result

  float at(ptrdiff_t i, ptrdiff_t j) const { return b[i * row_stride + j * column_stride]; }
};

/// Products of matrices, with factors of one precision.
struct matrix_kernels {
  /// Bytes that pack_b writes for B (k, n).
  ptrdiff_t (*packed_bytes)(ptrdiff_t k, ptrdiff_t n);
  /// Packs B, whole numbers for int8, given as (k, n) with element (i, j) at b[i * row_stride + j *
  /// column_stride]. `zero_point` (k) are those of the A to come for int8, null otherwise.
  void (*pack_b)(ptrdiff_t k, ptrdiff_t n, const float* b, ptrdiff_t row_stride,
                 ptrdiff_t column_stride, const float* zero_point, void* packed);
  void (*gemm)(const gemm_args&);
  ptrdiff_t (*attention_scratch)(ptrdiff_t n_k, ptrdiff_t d_k, ptrdiff_t d_v);
  void (*attention)(const attention_args&);

  /// Bytes that pack_sparse writes.
  ptrdiff_t (*sparse_bytes)(const sparse_matrix&);
  /// Packs the elements that are not zero.
  void (*pack_sparse)(const sparse_matrix&, void* packed);
  /// gemm with a B that pack_sparse packed; the same result to the bit. (bf16: where k is even or
  /// taps is 1; int8: see max_sparse_column_sum.)
  void (*sparse_gemm)(const gemm_args&);
};

/// The functions of one target. A new CPU is a new table.
struct table {
  const char* name;
  const char* description;
  /// What the CPU has to have: see any_target in target.hpp.
  const char* needs;
  /// Whether products and sums that the contract calls fma() are rounded once. Where not, results
  /// differ in their last bits from other targets'.
  bool fused;

  /// By precision. Those of int8 do attention in fp32.
  matrix_kernels matrices[4];
  const matrix_kernels& matrix(precision p) const { return matrices[static_cast<int>(p)]; }
  /// Whether bf16 runs on instructions of its own; elsewhere it gives the same bits, at the speed
  /// of fp32 at best.
  bool native_bf16;
  /// About what sparse_gemm takes of the time of gemm, where B has `stored` elements (its values
  /// are not looked at).
  float (*sparse_time)(precision, const sparse_matrix& b, ptrdiff_t stored);
  /// n_k rounded up to the vector width that attention works in.
  ptrdiff_t (*attention_columns)(ptrdiff_t n_k);

  void (*depthwise)(const depthwise_args&);
  void (*linear_attention)(const linear_attention_args&);
  void (*winograd_weights)(const winograd_weights_args&);
  void (*winograd_input)(const winograd_input_args&);
  void (*winograd_output)(const winograd_output_args&);
  /// Null on targets that do not multiply pairs of 16-bit numbers in int8; with products of bytes
  /// gemm over nine taps is about as fast.
  const winograd_int8_kernels* winograd_int8;
  /// q - zero_point of (rows, channels) floats, as floats; out may be x.
  void (*quantize)(ptrdiff_t rows, ptrdiff_t channels, const float* x, channel_quantization to,
                   float* out);
  void (*layer_norm)(const layer_norm_args&);

  void (*activate)(activation, ptrdiff_t n, const float* x, float* out);
  void (*sigmoid)(ptrdiff_t n, const float* x, float* out);
  /// out = a + b
  void (*add)(ptrdiff_t n, const float* a, const float* b, float* out);
  /// out = fma(factor, x, out)
  void (*add_scaled)(ptrdiff_t n, float factor, const float* x, float* out);
  /// x = softmax(x) over n floats
  void (*softmax)(ptrdiff_t n, float* x);
  /// Softmax down each column of `count` dense matrices (rows, columns) that follow each other.
  void (*softmax_columns)(ptrdiff_t count, ptrdiff_t rows, ptrdiff_t columns, float* x);

  /// Chains of independent fused multiply-adds, or of int8 products, that saturate the units;
  /// return the FLOPs done. They measure the peaks that `bench` divides by.
  double (*fma_peak)(ptrdiff_t iterations);
  double (*int8_peak)(ptrdiff_t iterations);
};

}  // namespace microtome::kernels

#include "macros_on.hpp"
