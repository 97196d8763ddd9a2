#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include <microtome/imaging/pipeline.hpp>
#include <microtome/io/colors.hpp>

namespace microtome::io {

/// A box to draw, in the colour of its label.
struct labelled_box {
  pixel_box box;
  int label = 0;
};

/// A click to draw, likewise.
struct labelled_point {
  image_point point;
  int label = 0;
};

namespace detail {

/// Draws on an RGB picture whose pixels are `zoom` times finer than the image's.
class overlay_painter {
public:
  overlay_painter(view<const std::uint8_t> image, index_t zoom)
      : zoom_(zoom),
        height_(image.extent(0) * zoom),
        width_(image.extent(1) * zoom),
        picture_(shape{height_, width_, 3}) {
    const index_t channels = image.extent(2);
    for (index_t y = 0; y < height_; ++y)
      for (index_t x = 0; x < width_; ++x) {
        const std::uint8_t* from =
            image.data() + (y / zoom * image.extent(1) + x / zoom) * channels;
        for (index_t c = 0; c < 3; ++c) pixel(y, x)[c] = from[channels == 3 ? c : 0];
      }
    line_ = std::max<index_t>(1, std::max(height_, width_) / 500);
  }

  /// Fills each label with a third of its colour and draws its border in full.
  void paint_masks(view<const std::uint16_t> labels) {
    const auto label_at = [&](index_t y, index_t x) -> int {
      if (y < 0 || x < 0 || y >= height_ || x >= width_) return 0;
      return labels[y / zoom_ * labels.extent(1) + x / zoom_];
    };
    for (index_t y = 0; y < height_; ++y)
      for (index_t x = 0; x < width_; ++x) {
        const int label = label_at(y, x);
        if (label == 0) continue;
        const bool border = label_at(y - line_, x) != label || label_at(y + line_, x) != label ||
                            label_at(y, x - line_) != label || label_at(y, x + line_) != label;
        blend(y, x, label_color(label), border ? 1.0 : 0.35);
      }
  }

  /// A dashed frame, so that it is not taken for a mask's border.
  void paint_box(const labelled_box& b) {
    const index_t y0 = b.box.y0 * zoom_, y1 = b.box.y1 * zoom_ - 1;
    const index_t x0 = b.box.x0 * zoom_, x1 = b.box.x1 * zoom_ - 1;
    const index_t dash = 6 * line_;
    const rgb color = label_color(b.label);
    const auto dot = [&](index_t y, index_t x, index_t along) {
      if (along / dash % 2 == 0 && y >= 0 && x >= 0 && y < height_ && x < width_)
        blend(y, x, color, 0.9);
    };
    for (index_t i = 0; i < line_; ++i) {
      for (index_t x = x0; x <= x1; ++x) {
        dot(y0 + i, x, x - x0);
        dot(y1 - i, x, x - x0);
      }
      for (index_t y = y0 + line_; y <= y1 - line_; ++y) {
        dot(y, x0 + i, y - y0);
        dot(y, x1 - i, y - y0);
      }
    }
  }

  /// A disc where a click is inside its object, a ring where it is outside, each with a white rim.
  void paint_point(const labelled_point& p) {
    const auto zoom = static_cast<double>(zoom_);
    const double radius = 4.0 * static_cast<double>(line_);
    const double x = p.point.x * zoom, y = p.point.y * zoom;
    const auto first = [](double v) { return std::max<index_t>(0, static_cast<index_t>(v)); };
    for (index_t row = first(y - radius); row < std::min(height_, first(y + radius + 1)); ++row)
      for (index_t column = first(x - radius); column < std::min(width_, first(x + radius + 1));
           ++column) {
        const double away =
            std::hypot(static_cast<double>(column) + 0.5 - x, static_cast<double>(row) + 0.5 - y);
        if (away > radius) continue;
        if (away > 0.75 * radius)
          blend(row, column, {255, 255, 255}, 1.0);
        else if (p.point.label == 1 || away > 0.4 * radius)
          blend(row, column, label_color(p.label), 1.0);
      }
  }

  tensor<std::uint8_t> take() { return std::move(picture_); }

private:
  std::uint8_t* pixel(index_t y, index_t x) { return picture_.data() + (y * width_ + x) * 3; }

  void blend(index_t y, index_t x, rgb color, double share) {
    const std::uint8_t to[3] = {color.r, color.g, color.b};
    for (index_t c = 0; c < 3; ++c) {
      std::uint8_t& value = pixel(y, x)[c];
      value = static_cast<std::uint8_t>(value + (to[c] - value) * share);
    }
  }

  index_t zoom_, height_, width_;
  index_t line_ = 1;
  tensor<std::uint8_t> picture_;
};

}  // namespace detail

/// A picture to look at (H', W', 3): the image (H, W, 3) or (H, W, 1), its masks (H, W) translucent
/// in distinct colours with sharp borders, the boxes dashed, and the clicks. Small images are
/// enlarged by a whole factor to at least 512 pixels.
inline tensor<std::uint8_t> make_overlay(view<const std::uint8_t> image,
                                         view<const std::uint16_t> labels,
                                         std::span<const labelled_box> boxes,
                                         std::span<const labelled_point> points = {}) {
  const index_t longest = std::max(image.extent(0), image.extent(1));
  detail::overlay_painter painter(image, std::max<index_t>(1, (511 + longest) / longest));
  painter.paint_masks(labels);
  for (const labelled_box& b : boxes) painter.paint_box(b);
  for (const labelled_point& p : points) painter.paint_point(p);
  return painter.take();
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
