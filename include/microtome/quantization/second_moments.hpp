#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <vector>

#include <kernels/active.hpp>
#include <microtome/core/tensor.hpp>

namespace microtome {

/// Sums of x x^T over the rows x that a layer multiplies, element i of x being what element i of a
/// row of its weight (channels, height, width) multiplies; for a depthwise layer, of x of each
/// channel. With them the squared error that other weights make of the layer's output is known
/// without its inputs.
class second_moments {
public:
  second_moments() = default;
  second_moments(index_t channels, index_t taps, bool depthwise)
      : channels_(channels), taps_(taps), depthwise_(depthwise) {
    if (depthwise) {
      sum_ = tensor<float>(shape{taps * taps, channels});
      return;
    }
    const index_t n = channels * taps;
    sum_ = tensor<float>(shape{n, n});
    rows_ = tensor<float>(shape{chunk, n});
    columns_ = tensor<float>(shape{n, chunk});
  }

  bool empty() const { return sum_.empty(); }

  /// x is [taps][rows], pointers to `channels` floats. Sums are in fp32, in the order of calls.
  void add(index_t rows, const float* const* x) {
    count_ += rows;
    if (depthwise_) return add_channels(rows, x);
    for (index_t row = 0; row < rows; ++row) {
      float* to = rows_.row(filled_);
      for (index_t tap = 0; tap < taps_; ++tap)
        for (index_t c = 0; c < channels_; ++c) to[c * taps_ + tap] = x[tap * rows + row][c];
      if (++filled_ == chunk) flush();
    }
  }

  /// The mean of x x^T: (channels * taps, channels * taps), or (channels, taps, taps) of a
  /// depthwise layer.
  tensor<float> mean() {
    flush();
    const auto count = static_cast<float>(std::max<index_t>(count_, 1));
    tensor<float> out(depthwise_ ? shape{channels_, taps_, taps_} : sum_.extents());
    for (index_t i = 0; i < out.size(); ++i)
      out[i] = (depthwise_ ? sum_.row(i % (taps_ * taps_))[i / (taps_ * taps_)] : sum_[i]) / count;
    return out;
  }

private:
  static constexpr index_t chunk = 256;

  void add_channels(index_t rows, const float* const* x) {
    for (index_t a = 0; a < taps_; ++a)
      for (index_t b = 0; b < taps_; ++b)
        for (index_t row = 0; row < rows; ++row) {
          const float *p = x[a * rows + row], *q = x[b * rows + row];
          float* to = sum_.row(a * taps_ + b);
          for (index_t c = 0; c < channels_; ++c) to[c] += p[c] * q[c];
        }
  }

  /// sum_ += rows_^T rows_
  void flush() {
    if (filled_ == 0) return;
    const index_t n = channels_ * taps_;
    for (index_t row = 0; row < filled_; ++row)
      for (index_t i = 0; i < n; ++i) columns_[i * chunk + row] = rows_.row(row)[i];
    const kernels::matrix_kernels& matrix = kernels::active().matrix(kernels::precision::fp32);
    tensor<std::byte> packed(shape{matrix.packed_bytes(filled_, n)});
    matrix.pack_b(filled_, n, rows_.data(), n, 1, nullptr, packed.data());
    std::vector<const float*> a;
    std::vector<float*> c;
    for (index_t i = 0; i < n; ++i) {
      a.push_back(columns_.row(i));
      c.push_back(sum_.row(i));
    }
    matrix.gemm({.m = n,
                 .n = n,
                 .k = filled_,
                 .a = a.data(),
                 .b = packed.data(),
                 .c = c.data(),
                 .residual = c.data()});
    filled_ = 0;
  }

  index_t channels_ = 0, taps_ = 0, filled_ = 0, count_ = 0;
  bool depthwise_ = false;
  tensor<float> sum_, rows_, columns_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
