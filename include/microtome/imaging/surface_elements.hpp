#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace microtome {

/// Areas of the surface that passes between the eight voxels around a point of a volume, for each
/// of the 256 ways in which they can lie inside an object (marching cubes, Lorensen and Cline,
/// 1987, with the surface half-way along every edge that it cuts). Voxel (z, y, x), each 0 or 1, is
/// bit 7 - (4z + 2y + x).
///
/// Two choices define the table, and make it equal to the one of DeepMind's surface-distance, which
/// the field's challenges measure with: on a face with two pairs of opposite corners, the fewer of
/// the eight voxels are kept apart; and of the triangle fans of a polygon that is not flat, the one
/// with the largest area on a unit cube is taken.
class surface_elements {
public:
  using code = std::uint8_t;

  /// `spacing` between voxels along z, y, x.
  explicit surface_elements(const std::array<double, 3>& spacing) {
    for (int c = 0; c < 256; ++c) areas_[static_cast<std::size_t>(c)] = area_of(c, spacing);
  }

  double area(code c) const { return areas_[c]; }

private:
  using vec = std::array<double, 3>;
  using polygon = std::vector<vec>;

  static bool inside(int c, const std::array<int, 3>& corner) {
    return c >> (7 - (4 * corner[0] + 2 * corner[1] + corner[2])) & 1;
  }

  static double area_of(int c, const vec& spacing) {
    int voxels = 0;
    for (int bit = 0; bit < 8; ++bit) voxels += c >> bit & 1;
    if (voxels > 4) c = 255 - c;  // the same surface, seen from the other side
    double area = 0;
    for (const polygon& p : polygons(c)) {
      std::size_t best = 0;
      for (std::size_t start = 1; start < p.size(); ++start)
        if (fan_area(p, start, {1, 1, 1}) > fan_area(p, best, {1, 1, 1}) + 1e-9) best = start;
      area += fan_area(p, best, spacing);
    }
    return area;
  }

  /// Area of the triangles from corner `start` to every edge.
  static double fan_area(const polygon& p, std::size_t start, const vec& spacing) {
    const auto side = [&](std::size_t i) {
      vec d;
      for (std::size_t axis = 0; axis < 3; ++axis)
        d[axis] = (p[(start + i) % p.size()][axis] - p[start][axis]) * spacing[axis];
      return d;
    };
    double area = 0;
    for (std::size_t i = 1; i + 1 < p.size(); ++i) {
      const vec a = side(i), b = side(i + 1);
      area += std::hypot(a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2],
                         a[0] * b[1] - a[1] * b[0]) /
              2;
    }
    return area;
  }

  /// The closed lines that the surface cuts into the cube's faces.
  static std::vector<polygon> polygons(int c) {
    std::vector<std::array<vec, 2>> segments;
    for (std::size_t axis = 0; axis < 3; ++axis)
      for (const int side : {0, 1}) cut_face(c, axis, side, segments);
    std::vector<polygon> closed;
    while (!segments.empty()) {
      polygon p{segments.back()[0], segments.back()[1]};
      segments.pop_back();
      for (auto next = find_end(segments, p.back()); next != segments.end();
           next = find_end(segments, p.back())) {
        p.push_back(next->at(0) == p.back() ? next->at(1) : next->at(0));
        segments.erase(next);
      }
      p.pop_back();  // the first point once more
      closed.push_back(p);
    }
    return closed;
  }

  static std::vector<std::array<vec, 2>>::iterator find_end(
      std::vector<std::array<vec, 2>>& segments, const vec& point) {
    return std::find_if(segments.begin(), segments.end(), [&](const std::array<vec, 2>& s) {
      return s[0] == point || s[1] == point;
    });
  }

  /// Adds the one or two segments between the cut edges of a face.
  static void cut_face(int c, std::size_t axis, int side,
                       std::vector<std::array<vec, 2>>& segments) {
    constexpr int around[4][2] = {{0, 0}, {0, 1}, {1, 1}, {1, 0}};
    std::array<std::array<int, 3>, 4> corner{};
    for (std::size_t i = 0; i < 4; ++i) {
      corner[i][axis] = side;
      corner[i][(axis + 1) % 3] = around[i][0];
      corner[i][(axis + 2) % 3] = around[i][1];
    }
    const auto middle = [&](std::size_t i) {  // of the edge after corner i
      const auto& a = corner[i % 4];
      const auto& b = corner[(i + 1) % 4];
      return vec{(a[0] + b[0]) / 2.0, (a[1] + b[1]) / 2.0, (a[2] + b[2]) / 2.0};
    };
    std::vector<std::size_t> cut;
    for (std::size_t i = 0; i < 4; ++i)
      if (inside(c, corner[i]) != inside(c, corner[(i + 1) % 4])) cut.push_back(i);
    if (cut.size() == 2) segments.push_back({middle(cut[0]), middle(cut[1])});
    if (cut.size() == 4)  // each inside corner gets a segment of its own
      for (std::size_t i = 0; i < 4; ++i)
        if (inside(c, corner[i])) segments.push_back({middle(i + 3), middle(i)});
  }

  std::array<double, 256> areas_{};
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
