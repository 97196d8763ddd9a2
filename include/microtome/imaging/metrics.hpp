/// How good a segmentation is: Dice coefficient and normalised surface distance.
#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include <microtome/core/tensor.hpp>
#include <microtome/imaging/distance_transform.hpp>
#include <microtome/imaging/surface_elements.hpp>

namespace microtome {

/// Dice coefficient of two masks, 2 |A and B| / (|A| + |B|); 1 where both are empty.
inline double dice(view<const std::uint8_t> a, view<const std::uint8_t> b) {
  if (!(a.extents() == b.extents()))
    fail("dice: masks of shapes ", to_string(a.extents()), " and ", to_string(b.extents()));
  index_t both = 0, sum = 0;
  for (index_t i = 0; i < a.size(); ++i) {
    both += a[i] && b[i];
    sum += (a[i] != 0) + (b[i] != 0);
  }
  return sum ? 2.0 * static_cast<double>(both) / static_cast<double>(sum) : 1.0;
}

namespace detail {

/// Part of a volume, each axis from begin to end.
struct bounding_box {
  std::array<index_t, 3> begin{}, end{};
};

/// The smallest box around what either mask covers; empty (end 0) where both are.
inline bounding_box box_around(view<const std::uint8_t> a, view<const std::uint8_t> b) {
  bounding_box box;
  box.begin.fill(a.size());
  for (index_t i = 0; i < a.size(); ++i) {
    if (!a[i] && !b[i]) continue;
    const index_t width = a.extent(2), height = a.extent(1);
    const std::array<index_t, 3> at{i / width / height, i / width % height, i % width};
    for (std::size_t axis = 0; axis < 3; ++axis) {
      box.begin[axis] = std::min(box.begin[axis], at[axis]);
      box.end[axis] = std::max(box.end[axis], at[axis] + 1);
    }
  }
  return box;
}

/// The codes of `surface_elements` at the points between the voxels of a box of a mask (the outside
/// of the volume is empty): one more than voxels along each axis. For a flat mask (one slice) only
/// the four voxels of the slice count, all in the lower half of the code.
inline tensor<std::uint8_t> neighbour_codes(view<const std::uint8_t> mask, const bounding_box& box,
                                            bool flat) {
  std::array<index_t, 3> n{};
  for (std::size_t axis = 0; axis < 3; ++axis) n[axis] = box.end[axis] - box.begin[axis];
  tensor<std::uint8_t> codes(shape{flat ? 1 : n[0] + 1, n[1] + 1, n[2] + 1});
  const index_t height = codes.extent(1), width = codes.extent(2);
  for (index_t z = 0; z < n[0]; ++z)
    for (index_t y = 0; y < n[1]; ++y)
      for (index_t x = 0; x < n[2]; ++x) {
        const index_t voxel =
            ((box.begin[0] + z) * mask.extent(1) + box.begin[1] + y) * mask.extent(2) +
            box.begin[2] + x;
        if (!mask[voxel]) continue;
        // The voxel is the far corner (1, 1, 1) of the point at its own position, and so on.
        for (index_t dz = flat ? 1 : 0; dz < 2; ++dz)
          for (index_t dy = 0; dy < 2; ++dy)
            for (index_t dx = 0; dx < 2; ++dx) {
              const index_t point =
                  ((z + (flat ? 0 : 1 - dz)) * height + y + 1 - dy) * width + x + 1 - dx;
              codes[point] |= static_cast<std::uint8_t>(1 << (7 - (4 * dz + 2 * dy + dx)));
            }
      }
  return codes;
}

/// Lengths of the contour between four pixels, for the codes of a flat mask.
inline double contour_length(std::uint8_t code, const std::array<double, 3>& spacing) {
  const double diagonal = std::hypot(spacing[1], spacing[2]) / 2;
  switch (code & 15) {
    case 0:
    case 15:
      return 0;
    case 3:
    case 12:
      return spacing[2];  // one row of the two inside
    case 5:
    case 10:
      return spacing[1];
    case 6:
    case 9:
      return 2 * diagonal;
    default:
      return diagonal;
  }
}

}  // namespace detail

/// Normalised surface distance (Nikolov et al., Deep learning to achieve clinically applicable
/// segmentation of head and neck anatomy, 2018): the share of the two masks' surfaces that lies
/// within `tolerance` of the other's. Surface elements are weighted by their area, in flat masks
/// (one slice) by their length; see surface_elements.
///
/// Masks are (D, H, W); `spacing` in mm along D, H, W. 0 where one mask is empty, 1 where both are.
inline double normalised_surface_distance(view<const std::uint8_t> a, view<const std::uint8_t> b,
                                          const std::array<double, 3>& spacing, double tolerance) {
  if (!(a.extents() == b.extents()) || a.extents().rank() != 3)
    fail("normalised_surface_distance: masks of shapes ", to_string(a.extents()), " and ",
         to_string(b.extents()));
  const bool a_empty = std::none_of(a.begin(), a.end(), [](std::uint8_t v) { return v != 0; });
  const bool b_empty = std::none_of(b.begin(), b.end(), [](std::uint8_t v) { return v != 0; });
  if (a_empty || b_empty) return a_empty && b_empty ? 1.0 : 0.0;

  const bool flat = a.extent(0) == 1;
  const surface_elements elements(spacing);
  const detail::bounding_box box = detail::box_around(a, b);
  struct surface {
    tensor<std::uint8_t> codes, border;
    tensor<double> distance;
  };
  const auto surface_of = [&](view<const std::uint8_t> mask) {
    surface s;
    s.codes = detail::neighbour_codes(mask, box, flat);
    s.border = tensor<std::uint8_t>(s.codes.extents());
    const std::uint8_t full = flat ? 15 : 255;
    for (index_t i = 0; i < s.codes.size(); ++i)
      s.border[i] = s.codes[i] != 0 && s.codes[i] != full;
    s.distance = distance_transform(s.border, spacing);
    return s;
  };
  const surface sa = surface_of(a), sb = surface_of(b);
  double close = 0, all = 0;
  const auto add = [&](const surface& of, const surface& to) {
    for (index_t i = 0; i < of.codes.size(); ++i) {
      if (!of.border[i]) continue;
      const double size =
          flat ? detail::contour_length(of.codes[i], spacing) : elements.area(of.codes[i]);
      all += size;
      if (to.distance[i] <= tolerance) close += size;
    }
  };
  add(sa, sb);
  add(sb, sa);
  return close / all;
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
