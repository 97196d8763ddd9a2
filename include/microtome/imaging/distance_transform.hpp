#pragma once

#include <kernels/macros_off.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <microtome/core/tensor.hpp>

namespace microtome {

namespace detail {

/// Squared distance transform of one line: out[i] = min over j of in[j] + (step * (i - j))^2, the
/// lower envelope of parabolas (Felzenszwalb and Huttenlocher, Distance Transforms of Sampled
/// Functions, 2012). Infinite where all of `in` is.
class line_distance {
public:
  explicit line_distance(index_t longest)
      : parabolas_(static_cast<std::size_t>(longest)),
        bounds_(static_cast<std::size_t>(longest) + 1),
        out_(static_cast<std::size_t>(longest)) {}

  /// n elements, `stride` apart, in place.
  void operator()(double* line, index_t n, index_t stride, double step) {
    const double infinity = std::numeric_limits<double>::infinity();
    const auto height = [&](index_t i) { return line[i * stride]; };
    const auto position = [&](index_t i) { return static_cast<double>(i) * step; };
    std::size_t count = 0;
    for (index_t i = 0; i < n; ++i) {
      if (height(i) == infinity) continue;
      double meeting = -infinity;  // where parabola i begins to be the lowest
      while (count > 0) {
        const index_t last = parabolas_[count - 1];
        meeting = (height(i) + position(i) * position(i) - height(last) -
                   position(last) * position(last)) /
                  (2 * (position(i) - position(last)));
        if (meeting > bounds_[count - 1]) break;
        --count;
      }
      if (count == 0) meeting = -infinity;
      parabolas_[count] = i;
      bounds_[count++] = meeting;
    }
    if (count == 0) return;
    bounds_[count] = infinity;
    std::size_t lowest = 0;
    for (index_t i = 0; i < n; ++i) {
      while (bounds_[lowest + 1] < position(i)) ++lowest;
      const double away = static_cast<double>(i - parabolas_[lowest]) * step;
      out_[static_cast<std::size_t>(i)] = away * away + height(parabolas_[lowest]);
    }
    for (index_t i = 0; i < n; ++i) line[i * stride] = out_[static_cast<std::size_t>(i)];
  }

private:
  std::vector<index_t> parabolas_;
  std::vector<double> bounds_;
  std::vector<double> out_;
};

}  // namespace detail

/// Distance of every point of a grid (D, H, W) to the nearest one where `sites` is not zero, exact,
/// in the units of `spacing` (along D, H, W). Infinite where there is none.
inline tensor<double> distance_transform(view<const std::uint8_t> sites,
                                         const std::array<double, 3>& spacing) {
  const index_t depth = sites.extent(0), height = sites.extent(1), width = sites.extent(2);
  tensor<double> squared(sites.extents());
  for (index_t i = 0; i < sites.size(); ++i)
    squared[i] = sites[i] ? 0.0 : std::numeric_limits<double>::infinity();
  detail::line_distance line(std::max({depth, height, width}));
  for (index_t z = 0; z < depth; ++z) {
    for (index_t y = 0; y < height; ++y)
      line(squared.data() + (z * height + y) * width, width, 1, spacing[2]);
    for (index_t x = 0; x < width; ++x)
      line(squared.data() + z * height * width + x, height, width, spacing[1]);
  }
  for (index_t i = 0; i < height * width; ++i)
    line(squared.data() + i, depth, height * width, spacing[0]);
  for (double& value : squared) value = std::sqrt(value);
  return squared;
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
