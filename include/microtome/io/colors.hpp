#pragma once

#include <kernels/macros_off.hpp>

#include <array>
#include <cmath>
#include <cstdint>

namespace microtome::io {

struct rgb {
  std::uint8_t r = 0, g = 0, b = 0;
};

/// Colour of a label, 1 and up: hues a golden angle apart, so that neighbours in number are far
/// apart in colour, lighter and darker by turns.
inline rgb label_color(int label) {
  constexpr double golden_turn = 0.61803398875;
  const double turn = 0.02 + (label - 1) * golden_turn;
  const double hue = 6 * (turn - std::floor(turn));
  const double value = (label - 1) / 7 % 2 ? 0.75 : 1.0;
  const double saturation = (label - 1) / 14 % 2 ? 0.55 : 0.85;
  // From hue, saturation and value to red, green and blue (Smith, 1978).
  const auto channel = [&](double offset) {
    const double k = std::fmod(offset + hue, 6.0);
    const double dip = std::fmax(0.0, std::fmin(std::fmin(k, 4 - k), 1.0));
    return static_cast<std::uint8_t>(std::lround(255 * value * (1 - saturation * dip)));
  };
  return {channel(5), channel(3), channel(1)};
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
