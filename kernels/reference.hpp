/// The kernels once more as plain scalar loops, in double precision: what the fast ones are tested
/// against, and what a new target starts from. Arguments and meaning as in contract.hpp, except
/// that B is not packed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "contract.hpp"

namespace microtome::kernels::reference {

inline double activate(activation act, double x) {
  switch (act) {
    case activation::none:
      return x;
    case activation::relu:
      return std::max(x, 0.0);
    case activation::gelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case activation::gelu_tanh:
      return 0.5 * x *
             (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
  }
  return x;
}

/// args.b is (taps * k, n) floats, row-major.
inline void gemm(const gemm_args& args) {
  const auto* b = static_cast<const float*>(args.b);
  for (ptrdiff_t i = 0; i < args.m; ++i)
    for (ptrdiff_t j = 0; j < args.n; ++j) {
      double sum = args.bias ? args.bias[j] : 0.0;
      for (ptrdiff_t t = 0; t < args.taps; ++t)
        for (ptrdiff_t k = 0; k < args.k; ++k)
          sum += double{args.a[t * args.m + i][k]} * b[(t * args.k + k) * args.n + j];
      if (args.residual) sum += args.residual[i][j];
      args.c[i][j] = static_cast<float>(activate(args.act, sum));
    }
}

/// The nearest bf16 number, ties to even; numbers below 2^-126 are zero.
inline float round_to_bf16(float x) {
  if (std::isnan(x) || std::isinf(x)) return x;
  if (std::abs(x) < std::numeric_limits<float>::min()) return std::copysign(0.0f, x);
  int exponent = 0;
  const float fraction = std::frexp(x, &exponent);  // 0.5 <= |fraction| < 1, 8 bits are kept
  return std::ldexp(std::nearbyint(fraction * 256) / 256, exponent);
}

/// What the product of matrices is in bf16, bit for bit where there are fused multiply-adds;
/// without activation and residual. args.b is (taps * k, n) floats, row-major.
inline void gemm_bf16(const gemm_args& args) {
  const auto* b = static_cast<const float*>(args.b);
  const ptrdiff_t depth = args.taps * args.k;
  for (ptrdiff_t i = 0; i < args.m; ++i)
    for (ptrdiff_t j = 0; j < args.n; ++j) {
      const auto add = [&](float sum, ptrdiff_t at) {
        if (at >= depth) return sum;
        const float x = args.a[at / args.k * args.m + i][at % args.k];
        return std::fma(round_to_bf16(x), round_to_bf16(b[at * args.n + j]), sum);
      };
      float sum = args.bias ? args.bias[j] : 0.0f;
      for (ptrdiff_t at = 0; at < depth; at += 2) sum = add(add(sum, at + 1), at);
      args.c[i][j] = sum;
    }
}

/// q - zero_point.
inline std::int32_t quantize(float x, float inverse, float zero_point) {
  const float scaled = std::nearbyint(x * inverse);
  return static_cast<std::int32_t>(std::clamp(scaled, -zero_point, 255.0f - zero_point));
}

/// What the product is in int8, bit for bit where there are fused multiply-adds; without
/// activation. args.b is (taps * k, n) whole floats, row-major.
inline void gemm_int8(const gemm_args& args) {
  const auto* b = static_cast<const float*>(args.b);
  for (ptrdiff_t i = 0; i < args.m; ++i)
    for (ptrdiff_t j = 0; j < args.n; ++j) {
      std::int64_t sum = 0;
      for (ptrdiff_t at = 0; at < args.taps * args.k; ++at) {
        const float x = args.a[at / args.k * args.m + i][at % args.k];
        sum += quantize(x, args.input.inverse[at], args.input.zero_point[at]) *
               static_cast<std::int64_t>(b[at * args.n + j]);
      }
      const float bias = args.bias ? args.bias[j] : 0.0f;
      args.c[i][j] = std::fma(static_cast<float>(sum), args.scale[j], bias);
      if (args.residual) args.c[i][j] += args.residual[i][j];
    }
}

/// What the product is with int8 weights alone, as exactly; without activation.
inline void gemm_int8_weights(const gemm_args& args) {
  const auto* b = static_cast<const float*>(args.b);
  for (ptrdiff_t i = 0; i < args.m; ++i)
    for (ptrdiff_t j = 0; j < args.n; ++j) {
      float sum = 0;
      for (ptrdiff_t at = 0; at < args.taps * args.k; ++at)
        sum = std::fma(args.a[at / args.k * args.m + i][at % args.k], b[at * args.n + j], sum);
      args.c[i][j] = std::fma(sum, args.scale[j], args.bias ? args.bias[j] : 0.0f);
      if (args.residual) args.c[i][j] += args.residual[i][j];
    }
}

/// Returns the logarithm of the sum of exponentials.
inline double softmax(ptrdiff_t n, double* x) {
  const double largest = *std::max_element(x, x + n);
  double sum = 0;
  for (ptrdiff_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - largest);
  for (ptrdiff_t i = 0; i < n; ++i) x[i] /= sum;
  return largest + std::log(sum);
}

inline void attention(const attention_args& args) {
  std::vector<double> weights(static_cast<std::size_t>(args.n_k));
  for (ptrdiff_t i = 0; i < args.n_q; ++i) {
    for (ptrdiff_t j = 0; j < args.n_k; ++j) {
      double dot = 0;
      for (ptrdiff_t d = 0; d < args.d_k; ++d) dot += double{args.q[i][d]} * args.k[j][d];
      weights[static_cast<std::size_t>(j)] =
          args.scale * dot + (args.bias ? args.bias[i * args.bias_stride + j] : 0.0f);
    }
    const double lse = softmax(args.n_k, weights.data());
    if (args.lse) args.lse[i] = static_cast<float>(lse);
    for (ptrdiff_t d = 0; d < args.d_v; ++d) {
      double sum = 0;
      for (ptrdiff_t j = 0; j < args.n_k; ++j)
        sum += weights[static_cast<std::size_t>(j)] * args.v[j][d];
      args.out[i][d] = static_cast<float>(sum);
    }
  }
}

inline void depthwise(const depthwise_args& args) {
  for (ptrdiff_t x = 0; x < args.n_out; ++x)
    for (ptrdiff_t c = 0; c < args.channels; ++c) {
      double sum = args.bias[c];
      for (ptrdiff_t i = 0; i < args.side; ++i)
        for (ptrdiff_t j = 0; j < args.side; ++j) {
          const ptrdiff_t column = x * args.stride + args.first + j - args.side / 2;
          if (args.rows[i] && column >= 0 && column < args.n_in)
            sum += double{args.rows[i][column * args.channels + c]} *
                   args.weights[(i * args.side + j) * args.channels + c];
        }
      args.out[x * args.channels + c] = static_cast<float>(activate(args.act, sum));
    }
}

inline void depthwise_int8(const depthwise_args& args) {
  for (ptrdiff_t x = 0; x < args.n_out; ++x)
    for (ptrdiff_t c = 0; c < args.channels; ++c) {
      std::int32_t sum = 0;
      for (ptrdiff_t tap = 0; tap < args.side * args.side; ++tap) {
        const ptrdiff_t column = x * args.stride + args.first + tap % args.side - args.side / 2;
        const float* row = args.rows[tap / args.side];
        if (row && column >= 0 && column < args.n_in)
          sum += static_cast<std::int32_t>(row[column * args.channels + c]) *
                 static_cast<std::int32_t>(args.weights[tap * args.channels + c]);
      }
      args.out[x * args.channels + c] =
          std::fma(static_cast<float>(sum), args.scale[c], args.bias[c]);
    }
}

inline void linear_attention(const linear_attention_args& args) {
  const ptrdiff_t d = args.d;
  std::vector<double> out(static_cast<std::size_t>(args.n * d));
  for (ptrdiff_t i = 0; i < args.n; ++i) {
    double normaliser = args.epsilon;
    double* sums = out.data() + i * d;
    for (ptrdiff_t j = 0; j < args.n; ++j) {
      double product = 0;
      for (ptrdiff_t c = 0; c < d; ++c)
        product +=
            std::max(0.0, double{args.qkv[i][c]}) * std::max(0.0, double{args.qkv[j][d + c]});
      normaliser += product;
      for (ptrdiff_t c = 0; c < d; ++c) sums[c] += product * args.qkv[j][2 * d + c];
    }
    for (ptrdiff_t c = 0; c < d; ++c) sums[c] /= normaliser;
  }
  for (ptrdiff_t i = 0; i < args.n * d; ++i)
    args.out[i / d][i % d] = static_cast<float>(out[static_cast<std::size_t>(i)]);
}

inline constexpr double winograd_bt[6][6] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0},
                                             {0, 4, -4, -1, 1, 0}, {0, -2, -1, 2, 1, 0},
                                             {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
inline constexpr double winograd_at[4][6] = {
    {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};

inline constexpr double winograd_g[6][3] = {{1 / 4., 0, 0},
                                            {-1 / 6., -1 / 6., -1 / 6.},
                                            {-1 / 6., 1 / 6., -1 / 6.},
                                            {1 / 24., 1 / 12., 1 / 6.},
                                            {1 / 24., -1 / 12., 1 / 6.},
                                            {0, 0, 1}};

inline void winograd_weights(const winograd_weights_args& args) {
  for (ptrdiff_t i = 0; i < args.n; ++i)
    for (ptrdiff_t place = 0; place < 36; ++place) {
      double sum = 0;
      for (ptrdiff_t tap = 0; tap < 9; ++tap)
        sum += winograd_g[place / 6][tap / 3] * winograd_g[place % 6][tap % 3] *
               args.g[tap * args.g_stride + i];
      args.out[place * args.out_stride + i] = static_cast<float>(sum);
    }
}

inline void winograd_input(const winograd_input_args& args) {
  for (ptrdiff_t c = 0; c < args.channels; ++c)
    for (ptrdiff_t i = 0; i < 36; ++i) {
      double sum = 0;
      for (ptrdiff_t k = 0; k < 36; ++k)
        sum += winograd_bt[i / 6][k / 6] * winograd_bt[i % 6][k % 6] * args.x[k][c];
      args.out[i * args.out_stride + c] = static_cast<float>(sum);
    }
}

inline void winograd_output(const winograd_output_args& args) {
  for (ptrdiff_t c = 0; c < args.channels; ++c)
    for (ptrdiff_t i = 0; i < 16; ++i) {
      if (!args.out[i]) continue;
      double sum = args.bias ? args.bias[c] : 0.0;
      for (ptrdiff_t k = 0; k < 36; ++k)
        sum +=
            winograd_at[i / 4][k / 6] * winograd_at[i % 4][k % 6] * args.m[k * args.m_stride + c];
      if (args.residual) sum += args.residual[i][c];
      args.out[i][c] = static_cast<float>(activate(args.act, sum));
    }
}

inline void layer_norm(const layer_norm_args& args) {
  const auto channels = static_cast<double>(args.c);
  for (ptrdiff_t i = 0; i < args.n; ++i) {
    double mean = 0, variance = 0;
    for (ptrdiff_t c = 0; c < args.c; ++c) mean += args.x[i][c] / channels;
    for (ptrdiff_t c = 0; c < args.c; ++c)
      variance += (args.x[i][c] - mean) * (args.x[i][c] - mean) / channels;
    for (ptrdiff_t c = 0; c < args.c; ++c) {
      const double normal = (args.x[i][c] - mean) / std::sqrt(variance + double{args.epsilon});
      args.out[i][c] =
          static_cast<float>(activate(args.act, normal * args.gamma[c] + args.beta[c]));
    }
  }
}

}  // namespace microtome::kernels::reference
