/// The products that LiteMedSAM's layers are, and how benchmarks of them are registered.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include "support.hpp"

namespace microtome::bench {

using kernels::activation;

struct gemm_shape {
  const char* layer;
  index_t m, n, k;
  index_t taps = 1;
  activation act = activation::none;
};

/// The linear layers of encoder and decoder, by the rows that a task takes.
inline constexpr gemm_shape gemm_shapes[] = {
    {"patch_embed.0", 96, 32, 3, 1, activation::gelu},
    {"patch_embed.2", 96, 64, 32},
    {"layers.0.conv1", 66, 256, 64, 1, activation::gelu},
    {"layers.0.conv3", 64, 64, 256},
    {"layers.0.merge1", 66, 128, 64, 1, activation::gelu},
    {"layers.0.merge3", 32, 128, 128},
    {"layers.1.qkv", 98, 384, 128},
    {"layers.1.proj", 98, 128, 128},
    {"layers.1.fc1", 96, 512, 128, 1, activation::gelu},
    {"layers.1.fc2", 96, 128, 512},
    {"layers.1.merge1", 51, 160, 128, 1, activation::gelu},
    {"layers.1.merge3", 25, 160, 160},
    {"layers.2.qkv", 196, 480, 160},
    {"layers.2.proj", 196, 160, 160},
    {"layers.2.fc1", 96, 640, 160, 1, activation::gelu},
    {"layers.2.fc2", 96, 160, 640},
    {"layers.2.merge1", 53, 320, 160, 1, activation::gelu},
    {"layers.2.merge3", 51, 320, 320},
    {"layers.3.qkv", 98, 960, 320},
    {"layers.3.proj", 98, 320, 320},
    {"layers.3.fc1", 48, 1280, 320, 1, activation::gelu},
    {"layers.3.fc2", 48, 320, 1280},
    {"neck.0", 96, 256, 320},
    {"neck.2", 96, 256, 256, 9},
    {"decoder.k_proj", 96, 128, 256},
    {"decoder.scores", 96, 56, 256},
    {"decoder.attended", 96, 256, 56},
    {"decoder.upscale1", 64, 128, 256},
    {"decoder.upscale2", 96, 64, 64, 1, activation::gelu},
    {"decoder.mask", 96, 1, 32},
};

/// What such a product multiplies. B (taps * k, n) becomes whole numbers, as int8 has them, and of
/// what is not zero nothing becomes zero.
class operands {
public:
  operands(const gemm_shape& s, tensor<float> weights)
      : shape_(s),
        a_(values({s.m, s.k})),
        b_(std::move(weights)),
        bias_(values({s.n})),
        scale_(values({s.n})),
        inverse_(shape{depth()}),
        zero_point_(shape{depth()}),
        c_(shape{s.m, s.n}),
        c_rows_(rows_of(c_.data(), s.m, s.n)) {
    std::fill(inverse_.begin(), inverse_.end(), 50.0f);
    std::fill(zero_point_.begin(), zero_point_.end(), 128.0f);
    for (float& v : b_)
      if (v != 0) v = std::copysign(std::max(1.0f, std::round(16 * std::abs(v))), v);
    for (index_t t = 0; t < s.taps; ++t)
      for (index_t i = 0; i < s.m; ++i) a_rows_.push_back(a_.row((i + t) % s.m));
  }

  /// B without its zeros.
  tensor<std::byte> packed_sparse(const kernels::matrix_kernels& matrix) const {
    const kernels::sparse_matrix b{shape_.taps, shape_.k, shape_.n, b_.data(),
                                   shape_.n,    1,        shape_.m};
    tensor<std::byte> packed(shape{matrix.sparse_bytes(b)});
    matrix.pack_sparse(b, packed.data());
    return packed;
  }
  tensor<std::byte> packed(const kernels::matrix_kernels& matrix) const {
    tensor<std::byte> packed(shape{matrix.packed_bytes(depth(), shape_.n)});
    matrix.pack_b(depth(), shape_.n, b_.data(), shape_.n, 1, zero_point_.data(), packed.data());
    return packed;
  }

  kernels::gemm_args with(const tensor<std::byte>& packed) const {
    return {.m = shape_.m,
            .n = shape_.n,
            .k = shape_.k,
            .taps = shape_.taps,
            .a = a_rows_.data(),
            .b = packed.data(),
            .c = c_rows_.data(),
            .bias = bias_.data(),
            .act = shape_.act,
            .scale = scale_.data(),
            .input = {inverse_.data(), zero_point_.data()}};
  }

  /// Counted as of a dense product.
  work todo(const tensor<std::byte>& packed, kernels::precision inputs) const {
    return {2.0 * static_cast<double>(shape_.m * shape_.n * depth()),
            floats(a_.size() + c_.size() + shape_.n) + static_cast<double>(packed.size()), inputs};
  }

private:
  index_t depth() const { return shape_.taps * shape_.k; }

  gemm_shape shape_;
  tensor<float> a_, b_, bias_, scale_, inverse_, zero_point_, c_;
  std::vector<const float*> a_rows_;
  std::vector<float*> c_rows_;
};

inline std::string size_name(const gemm_shape& s) {
  return std::to_string(s.m) + "x" + std::to_string(s.n) + "x" + std::to_string(s.taps * s.k);
}

template <class... Arguments>
void add(const std::string& name, Arguments... arguments) {
  benchmark::RegisterBenchmark(name.c_str(), arguments...)->UseRealTime();
  const int threads = static_cast<int>(std::thread::hardware_concurrency());
  if (threads > 1)
    benchmark::RegisterBenchmark(name.c_str(), arguments...)->Threads(threads)->UseRealTime();
}

/// Benchmarks of products with pruned weights: see sparse.cpp.
void register_sparse();

}  // namespace microtome::bench
