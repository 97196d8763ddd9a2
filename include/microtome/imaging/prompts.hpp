#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <microtome/core/tensor.hpp>
#include <microtome/models/prompt_encoder.hpp>

namespace microtome {

/// A box around one object in whole pixels of the original image, from x0, y0 to x1, y1.
struct pixel_box {
  index_t x0 = 0, y0 = 0, x1 = 0, y1 = 0;
};

/// The same with fractions of pixels.
struct image_box {
  double x0 = 0, y0 = 0, x1 = 0, y1 = 0;

  image_box() = default;
  image_box(double left, double top, double right, double bottom)
      : x0(left), y0(top), x1(right), y1(bottom) {}
  image_box(const pixel_box& b)
      : image_box(static_cast<double>(b.x0), static_cast<double>(b.y0), static_cast<double>(b.x1),
                  static_cast<double>(b.y1)) {}
};

/// A click in pixels of the original image; label 1 is inside the object, 0 outside.
struct image_point {
  double x = 0, y = 0;
  int label = 1;
};

/// A box in a volume; slices z0 to z1, both included.
struct voxel_box {
  index_t x0 = 0, y0 = 0, z0 = 0, x1 = 0, y1 = 0, z1 = 0;
};

/// The slice that an object is prompted on first.
inline index_t middle_slice(const voxel_box& b) {
  return (b.z0 + b.z1) / 2;
}

/// What tells one object of an image from the rest: a box, points or both, and perhaps a mask.
struct image_prompt {
  std::optional<image_box> box;
  std::vector<image_point> points;
  /// Logits (side * side) that an earlier decoding on this image gave, see session::mask_side();
  /// none where empty.
  std::vector<float> mask;

  image_prompt() = default;
  image_prompt(const image_box& b) : box(b) {}
  image_prompt(const pixel_box& b) : box(b) {}
};

/// What is wrong with box `number` in an image of height x width pixels; empty where nothing is. As
/// for LiteMedSAM's script, a box may be as thin as a line (tools that count the last pixel in
/// write x0 = x1 for one column) and may reach outside, as long as it touches the image.
inline std::string box_complaint(const image_box& b, std::size_t number, index_t height,
                                 index_t width) {
  constexpr double limit = 1e9;  // far beyond any image
  const auto sound = [](double v) { return std::abs(v) <= limit; };
  const char* problem = nullptr;
  if (!sound(b.x0) || !sound(b.y0) || !sound(b.x1) || !sound(b.y1))
    problem = " is not of numbers of pixels";
  else if (b.x0 > b.x1 || b.y0 > b.y1)
    problem = " is reversed: expected x0 <= x1 and y0 <= y1";
  else if (b.x1 < 0 || b.y1 < 0 || b.x0 > static_cast<double>(width) ||
           b.y0 > static_cast<double>(height))
    problem = " lies outside the image of ";
  if (!problem) return "";
  std::ostringstream text;
  text.precision(10);
  text << "box " << number << " (" << b.x0 << ", " << b.y0 << ", " << b.x1 << ", " << b.y1 << ')'
       << problem;
  if (text.str().ends_with(" of ")) text << width << " x " << height << " pixels";
  return text.str();
}

/// What is wrong with box `number` in a volume (D, H, W) of `extents`; empty where nothing is. Its
/// slices may reach outside, too, but the middle one may not.
inline std::string box_complaint(const voxel_box& b, std::size_t number, const shape& extents) {
  const std::string plane =
      box_complaint(pixel_box{b.x0, b.y0, b.x1, b.y1}, number, extents[1], extents[2]);
  if (!plane.empty()) return plane;
  std::ostringstream text;
  if (b.z0 > b.z1)
    text << "box " << number << " is reversed: z0 = " << b.z0 << " is above z1 = " << b.z1;
  else if (b.z0 + b.z1 < 0 || middle_slice(b) >= extents[0])
    text << "box " << number << " spans slices " << b.z0 << " to " << b.z1
         << ", whose middle is outside the volume of " << extents[0] << " slices";
  return text.str();
}

/// What is wrong with the prompt of object `number` in an image of height x width pixels, for a
/// model whose low-resolution masks are mask_side x mask_side; empty where nothing is.
inline std::string prompt_complaint(const image_prompt& prompt, std::size_t number, index_t height,
                                    index_t width, index_t mask_side) {
  if (prompt.box) {
    const std::string complaint = box_complaint(*prompt.box, number, height, width);
    if (!complaint.empty()) return complaint;
  }
  std::ostringstream text;
  text.precision(10);
  text << "object " << number;
  if (!prompt.box && prompt.points.empty() && prompt.mask.empty()) {
    text << " has no prompt: expected a box, points or a mask";
    return text.str();
  }
  if (prompt.points.size() > static_cast<std::size_t>(max_prompt_points)) {
    text << " has " << prompt.points.size() << " points, at most " << max_prompt_points
         << " are possible";
    return text.str();
  }
  for (std::size_t i = 0; i < prompt.points.size(); ++i) {
    const image_point& p = prompt.points[i];
    const bool inside = p.x >= 0 && p.y >= 0 && p.x <= static_cast<double>(width) &&
                        p.y <= static_cast<double>(height);
    if (inside && (p.label == 0 || p.label == 1)) continue;
    text << ": point " << i << " (" << p.x << ", " << p.y << ')';
    if (inside)
      text << " has label " << p.label << ", expected 1 inside the object or 0 outside";
    else
      text << " lies outside the image of " << width << " x " << height << " pixels";
    return text.str();
  }
  if (prompt.mask.empty()) return "";
  if (prompt.mask.size() != static_cast<std::size_t>(mask_side * mask_side)) {
    text << ": its mask has " << prompt.mask.size() << " values, expected " << mask_side << " x "
         << mask_side;
    return text.str();
  }
  if (std::all_of(prompt.mask.begin(), prompt.mask.end(), [](float v) { return std::isfinite(v); }))
    return "";
  text << ": its mask holds values that are not finite";
  return text.str();
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
