#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cmath>

#include <microtome/core/workspace.hpp>
#include <microtome/ops/depthwise.hpp>

namespace microtome {

/// Four source positions of one destination position, and their weights.
struct bicubic_taps {
  std::array<index_t, 4> at;
  std::array<float, 4> weight;

  /// Of position i of `to` among `from`: pixel centres aligned, positions beyond the border are
  /// those at it, Keys' kernel (1981) with a = -0.75 (PyTorch's `interpolate` with mode="bicubic",
  /// align_corners=False).
  static bicubic_taps of(index_t i, index_t from, index_t to) {
    constexpr double a = -0.75;
    const double position =
        (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
    const double whole = std::floor(position), t = position - whole;
    const auto near = [](double x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };
    const auto far = [](double x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };
    const double weight[4] = {far(t + 1), near(t), near(1 - t), far(2 - t)};
    bicubic_taps taps;
    for (std::size_t j = 0; j < 4; ++j) {
      taps.at[j] = std::clamp<index_t>(static_cast<index_t>(whole) - 1 + static_cast<index_t>(j), 0,
                                       from - 1);
      taps.weight[j] = static_cast<float>(weight[j]);
    }
    return taps;
  }
};

/// Adds x (size.tokens(), channels), interpolated to the size of the result, to `result`
/// (out.tokens(), channels): along columns first, then along rows.
inline void add_bicubic(workspace& ws, map_size size, view<const float> x, map_size out,
                        view<float> result) {
  const index_t channels = x.extent(1), row = size.width * channels;
  const kernels::table& kernel = kernels::active();
  ws.parallel(out.height, [&](index_t y, scratch memory) {
    float* mixed = memory.take<float>(row);
    std::fill_n(mixed, row, 0.0f);
    const bicubic_taps vertical = bicubic_taps::of(y, size.height, out.height);
    for (std::size_t j = 0; j < 4; ++j)
      kernel.add_scaled(row, vertical.weight[j], x.row(vertical.at[j] * size.width), mixed);
    for (index_t column = 0; column < out.width; ++column) {
      const bicubic_taps taps = bicubic_taps::of(column, size.width, out.width);
      for (std::size_t j = 0; j < 4; ++j)
        kernel.add_scaled(channels, taps.weight[j], mixed + taps.at[j] * channels,
                          result.row(y * out.width + column));
    }
  });
}

/// Scratch bytes that add_bicubic takes for x of this size.
inline std::size_t bicubic_scratch_bytes(map_size size, index_t channels) {
  return scratch::bytes_of<float>(size.width * channels);
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
