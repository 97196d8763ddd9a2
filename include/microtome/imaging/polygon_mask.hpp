/// Polygons as masks, pixel for pixel as COCO's annotations mean them.
#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include <microtome/imaging/run_lengths.hpp>

namespace microtome {

/// Coordinates of polygons may reach so far outside of the image, in pixels.
inline constexpr double max_polygon_coordinate = 1e6;
/// How often a polygon may cross the columns of the image.
inline constexpr std::size_t max_polygon_crossings = std::size_t{1} << 22;

namespace detail {

/// Part of a grid with five points per pixel and axis; pixel (x, y) has its centre at point
/// (5 x + 2, 5 y + 2).
struct grid_point {
  int x = 0, y = 0;
};

inline constexpr int grid_points = 5;  ///< per pixel

/// A coordinate in pixels to the next grid point; like everything on this grid, COCO's rounding
/// adds a half and cuts the fraction off, towards zero.
inline int to_grid(double coordinate) {
  return static_cast<int>(grid_points * coordinate + 0.5);
}

/// Calls visit(column, y) for every column of pixels whose centre the edge from `a` to `b` crosses,
/// y in grid points. An edge is a row of grid points, one for each step along its longer axis, the
/// other coordinate rounded; it crosses the centre of a column where one point is at the centre and
/// the next or the last one right of it; y is the lesser of the two.
template <class Visit>
void for_each_crossing(grid_point a, grid_point b, index_t width, Visit&& visit) {
  const int dx = std::abs(b.x - a.x), dy = std::abs(b.y - a.y);
  if (dx == 0) return;
  const bool flat = dx >= dy;
  if (flat ? a.x > b.x : a.y > b.y) std::swap(a, b);
  const double slope =
      flat ? static_cast<double>(b.y - a.y) / dx : static_cast<double>(b.x - a.x) / dy;
  const auto other = [&](int step) {
    return static_cast<int>((flat ? a.y : a.x) + slope * step + 0.5);
  };
  const int low = std::max(std::min(a.x, b.x), 0), high = std::max(a.x, b.x);
  // The first column with its centre at `low` or right of it, and those up to the last one whose
  // next point is within the edge.
  for (index_t column = (low + 2) / grid_points; column < width; ++column) {
    const auto centre = static_cast<int>(column) * grid_points + 2;
    if (centre >= high) break;
    if (flat) {
      visit(column, std::min(other(centre - a.x), other(centre + 1 - a.x)));
      continue;
    }
    // The first step that is beyond the middle between the two points.
    const auto beyond = [&](int step) {
      return slope > 0 ? other(step) > centre : other(step) <= centre;
    };
    int step = static_cast<int>((centre + 0.5 - a.x) / slope);
    step = std::clamp(step, 1, dy);
    while (step > 1 && beyond(step - 1)) --step;
    while (step < dy && !beyond(step)) ++step;
    visit(column, a.y + step - 1);
  }
}

}  // namespace detail

/// The mask of height x width pixels that a closed polygon x0, y0, x1, y1, ... covers, in pixels
/// from the image's top left corner; parts outside of the image are cut off. Pixels are those that
/// pycocotools' masks have: vertices are rounded to fifths of pixels, edges are drawn on that grid,
/// and along each column of pixel centres the mask changes at the first centre at or below a
/// crossing. Throws `error` where that is not a polygon.
inline run_lengths polygon_mask(std::span<const double> coordinates, index_t height,
                                index_t width) {
  const std::size_t vertices = coordinates.size() / 2;
  if (coordinates.size() % 2 || vertices < 3)
    fail("a polygon of ", coordinates.size(),
         " numbers, expected x and y of three vertices or more");
  for (const double c : coordinates)
    if (!(std::abs(c) <= max_polygon_coordinate))
      fail("a polygon with the coordinate ", c, ", expected at most ", max_polygon_coordinate);
  if (height < 1 || width < 1 || height > max_run_pixels / width)
    fail("a polygon in an image of ", width, " x ", height, " pixels");
  const auto vertex = [&](std::size_t i) {
    return detail::grid_point{detail::to_grid(coordinates[2 * i]),
                              detail::to_grid(coordinates[2 * i + 1])};
  };
  std::vector<std::uint32_t> places;
  for (std::size_t i = 0; i < vertices; ++i) {
    detail::for_each_crossing(vertex(i), vertex((i + 1) % vertices), width, [&](index_t x, int y) {
      // The pixel whose centre, 5 row + 2, is at y or below; beyond the last one it is the next
      // column's first.
      const index_t below = y <= 2 ? 0 : (y - 2 + detail::grid_points - 1) / detail::grid_points;
      places.push_back(static_cast<std::uint32_t>(x * height + std::min(below, height)));
    });
    if (places.size() > max_polygon_crossings)
      fail("a polygon that crosses the image's columns more than ", max_polygon_crossings,
           " times");
  }
  std::sort(places.begin(), places.end());
  return detail::runs_between(height, width, places);
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
