#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include <microtome/core/workspace.hpp>
#include <microtome/model_file/weights.hpp>

namespace microtome {

using kernels::activation;

/// How many blocks of `size` cover n tokens.
constexpr index_t block_count(index_t n, index_t size = token_block) {
  return (n + size - 1) / size;
}

/// Pointers to `count` <= max_rows rows of `stride` floats, the way kernels take a matrix.
inline constexpr index_t max_rows = 128;
static_assert(token_block <= max_rows);
template <class T>
struct row_pointers : std::array<T*, max_rows> {
  row_pointers(T* first, index_t stride, index_t count) {
    for (index_t i = 0; i < count; ++i) (*this)[static_cast<std::size_t>(i)] = first + i * stride;
  }
};

/// What products of activations with each other are computed in, near a layer of that precision.
constexpr precision activations_near(precision inputs) {
  return inputs == precision::bf16 ? precision::bf16 : precision::fp32;
}

/// An int8 product in floating point ("fake quantisation"), as calibration and training see it:
/// whole numbers multiplied and added in double, which is exact, and so to the bit what the kernels
/// compute. Slow; to hold the kernels to it.
class simulated_weight {
public:
  simulated_weight() = default;
  /// B (k, n), element (i, j) at b[i * row_stride + j * column_stride].
  simulated_weight(index_t k, index_t n, const float* b, index_t row_stride, index_t column_stride)
      : values_(shape{k, n}) {
    for (index_t i = 0; i < k; ++i)
      for (index_t j = 0; j < n; ++j) values_[i * n + j] = b[i * row_stride + j * column_stride];
  }

  bool empty() const { return values_.empty(); }

  /// As kernels::gemm with int8 factors.
  void multiply(const kernels::gemm_args& args) const {
    std::vector<float> x(static_cast<std::size_t>(args.k));
    std::vector<double> sums(static_cast<std::size_t>(args.n));
    for (index_t row = 0; row < args.m; ++row) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (index_t tap = 0; tap < args.taps; ++tap) {
        const index_t first = tap * args.k;
        kernels::active().quantize(1, args.k, args.a[tap * args.m + row],
                                   {args.input.inverse + first, args.input.zero_point + first},
                                   x.data());
        for (index_t i = 0; i < args.k; ++i) {
          const double factor = x[static_cast<std::size_t>(i)];
          const double* b = values_.row(tap * args.k + i) + args.column;
          for (index_t j = 0; j < args.n; ++j) sums[static_cast<std::size_t>(j)] += factor * b[j];
        }
      }
      float* out = args.c[row];
      for (index_t j = 0; j < args.n; ++j) {
        const float bias = args.bias ? args.bias[j] : 0.0f;
        const auto sum = static_cast<float>(sums[static_cast<std::size_t>(j)]);
        const float scaled = std::fma(sum, args.scale[j], bias);
        out[j] = args.residual ? scaled + args.residual[row][j] : scaled;  // may be the same memory
      }
      kernels::active().activate(args.act, args.n, out, out);
    }
  }

private:
  tensor<double> values_;
};

/// A weight matrix in the kernels' order: the B of out = act(in * B + bias + residual).
class packed_weight {
public:
  packed_weight() = default;
  /// Packs B (k, n), element (i, j) at b[i * row_stride + j * column_stride], in fp32.
  packed_weight(index_t k, index_t n, const float* b, index_t row_stride, index_t column_stride)
      : depth_(k), width_(n), packed_(shape{matrix().packed_bytes(k, n)}) {
    matrix().pack_b(k, n, b, row_stride, column_stride, nullptr, packed_.data());
  }
  /// Packs the values of a layer, rearranged to B (taps * k, n), element (i, j) at b[i * row_stride
  /// + j * column_stride]; column j belongs to output channel j mod out.
  packed_weight(const layer_weight& layer, index_t taps, index_t k, index_t n, const float* b,
                index_t row_stride, index_t column_stride)
      : inputs_(layer.inputs),
        depth_(taps * k),
        width_(n),
        sparse_(layer.sparse),
        observer_(layer.observer) {
    if (depth_ > kernels::max_gemm_depth)
      fail(layer.name, ": a layer of ", depth_, " inputs, at most ", kernels::max_gemm_depth,
           " are possible");
    if (inputs_ == precision::int8) input_ = input_levels(layer, taps);
    const kernels::sparse_matrix pruned{taps, k, n, b, row_stride, column_stride, layer.rows};
    packed_ = tensor<std::byte>(
        shape{sparse_ ? matrix().sparse_bytes(pruned) : matrix().packed_bytes(depth_, n)});
    if (sparse_)
      matrix().pack_sparse(pruned, packed_.data());
    else
      matrix().pack_b(depth_, n, b, row_stride, column_stride, input_.get().zero_point,
                      packed_.data());
    if (layer.simulated && inputs_ == precision::int8)
      simulation_ = simulated_weight(depth_, n, b, row_stride, column_stride);
    if (!layer.quantized()) return;
    scale_ = tensor<float>(shape{n});
    for (index_t j = 0; j < n; ++j) {
      scale_[j] = layer.scale[j % layer.out()];
      if (inputs_ == precision::int8) scale_[j] *= layer.input[0].scale;
    }
  }

  precision inputs() const { return inputs_; }
  index_t depth() const { return depth_; }  ///< k, over all taps
  index_t width() const { return width_; }  ///< n

  /// Serial: kernels::gemm with this B.
  void multiply(kernels::gemm_args args) const {
    args.b = packed_.data();
    if (!scale_.empty()) args.scale = scale_.data() + args.column;
    args.input = input_.get();
    if (observer_ && args.column == 0) observer_->see(args.taps, args.m, args.k, args.a);
    if (!simulation_.empty()) return simulation_.multiply(args);
    sparse_ ? matrix().sparse_gemm(args) : matrix().gemm(args);
  }

private:
  const kernels::matrix_kernels& matrix() const { return kernels::active().matrix(inputs_); }

  precision inputs_ = precision::fp32;
  index_t depth_ = 0;
  index_t width_ = 0;
  bool sparse_ = false;
  tensor<std::byte> packed_;
  tensor<float> scale_;  // (n), for int8: see kernels::gemm_args
  input_levels input_;   // for int8
  simulated_weight simulation_;
  input_observer* observer_ = nullptr;
};

/// out = act(x W^T + b + residual): a fully connected layer over tokens, and so a 1x1 convolution.
class linear {
public:
  linear() = default;

  /// Reads `<name>.weight` (out, in), and `<name>.bias` (out) unless `with_bias` is false.
  /// A 1x1 convolution's weight (out, in, 1, 1) is the same matrix: see `pointwise`.
  linear(const weights& file, const std::string& name, index_t in, index_t out,
         bool with_bias = true)
      : linear(file, name, shape{out, in}, with_bias) {}

  static linear pointwise(const weights& file, const std::string& name, index_t in, index_t out,
                          bool with_bias = true) {
    return linear(file, name, shape{out, in, 1, 1}, with_bias);
  }

  precision inputs() const { return weight_.inputs(); }
  index_t in() const { return weight_.depth(); }
  index_t out() const { return weight_.width(); }

  /// Serial, for use inside a task: `count` rows given by pointers (see kernels::gemm_args).
  void rows(index_t count, const float* const* x, float* const* result,
            activation act = activation::none, const float* const* residual = nullptr) const {
    weight_.multiply({.m = count,
                      .n = out(),
                      .k = in(),
                      .a = x,
                      .c = result,
                      .bias = bias_.data(),
                      .residual = residual,
                      .act = act});
  }

  /// x is (n, in), result is (n, out). `residual`, where given, is (n, out) and may be `result`.
  void operator()(workspace& ws, view<const float> x, view<float> result,
                  activation act = activation::none, const float* residual = nullptr) const {
    const index_t n = x.extent(0);
    // Few tokens (those of a prompt) are shared out by columns, many by rows.
    const index_t blocks = block_count(n);
    const index_t slice = blocks >= 2 * ws.threads() ? out() : kernels::column_slice;
    const index_t slices = (out() + slice - 1) / slice;
    ws.parallel(blocks * slices, [&](index_t task, scratch) {
      const index_t row = task / slices * token_block;
      const index_t column = task % slices * slice;
      const index_t count = std::min(token_block, n - row);
      const row_pointers<const float> a(x.data() + row * in(), in(), count);
      const row_pointers<float> c(result.data() + row * out() + column, out(), count);
      const row_pointers<const float> r(residual ? residual + row * out() + column : nullptr,
                                        residual ? out() : 0, count);
      weight_.multiply({.m = count,
                        .n = std::min(slice, out() - column),
                        .k = in(),
                        .a = a.data(),
                        .c = c.data(),
                        .bias = bias_.empty() ? nullptr : bias_.data() + column,
                        .residual = residual ? r.data() : nullptr,
                        .act = act,
                        .column = column});
    });
  }

private:
  linear(const weights& file, const std::string& name, shape weight_shape, bool with_bias) {
    const index_t out = weight_shape[0];
    const index_t in = weight_shape[1];
    const layer_weight weight = file.layer(name, weight_shape);
    weight_ = packed_weight(weight, 1, in, out, weight.values.data(), 1, in);
    if (with_bias) bias_ = file.read(name + ".bias", {out});
  }

  packed_weight weight_;
  tensor<float> bias_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
