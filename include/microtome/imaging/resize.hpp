/// Interpolation of images and of masks.
#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include <microtome/core/tensor.hpp>

namespace microtome {

namespace detail {

/// x * y rounded to float before anything is added to it. A compiler that contracts the product and
/// a following sum into one fused multiply-add would change the last bit, and with it a pixel.
inline float rounded_product(float x, float y) {
  const volatile float product = x * y;
  return product;
}

/// To the nearest integer, ties to even, as the current rounding mode of every C++ program is.
inline std::uint8_t round_to_pixel(float value) {
  return static_cast<std::uint8_t>(std::clamp(std::nearbyint(value), 0.0f, 255.0f));
}

/// Source pixels that one destination pixel covers, each with its share of the area.
struct area_taps {
  index_t first = 0;
  std::vector<float> shares;
};

/// OpenCV's table of shares for shrinking `from` pixels to `to`: the covered part of each source
/// pixel over the length of a destination pixel; parts below 1e-3 are left out.
inline std::vector<area_taps> area_table(index_t from, index_t to) {
  const double scale = 1.0 / (static_cast<double>(to) / static_cast<double>(from));
  std::vector<area_taps> table(static_cast<std::size_t>(to));
  for (index_t i = 0; i < to; ++i) {
    area_taps& taps = table[static_cast<std::size_t>(i)];
    const double begin = static_cast<double>(i) * scale;
    const double end = begin + scale;
    const double cell = std::min(scale, static_cast<double>(from) - begin);
    const index_t last_full = std::min(static_cast<index_t>(std::floor(end)), from - 1);
    const index_t first_full = std::min(static_cast<index_t>(std::ceil(begin)), last_full);
    taps.first = first_full;
    if (const double part = static_cast<double>(first_full) - begin; part > 1e-3) {
      --taps.first;
      taps.shares.push_back(static_cast<float>(part / cell));
    }
    for (index_t j = first_full; j < last_full; ++j)
      taps.shares.push_back(static_cast<float>(1.0 / cell));
    if (const double part = end - static_cast<double>(last_full); part > 1e-3)
      taps.shares.push_back(static_cast<float>(std::min({part, 1.0, cell}) / cell));
  }
  return table;
}

inline void shrink_by_fractions(view<const std::uint8_t> image, view<std::uint8_t> out) {
  const index_t channels = image.extent(2);
  const index_t row_size = out.extent(1) * channels;
  const std::vector<area_taps> columns = area_table(image.extent(1), out.extent(1));
  const std::vector<area_taps> rows = area_table(image.extent(0), out.extent(0));
  tensor<float> row(shape{row_size});
  tensor<float> sum(shape{row_size});
  for (index_t y = 0; y < out.extent(0); ++y) {
    const area_taps& vertical = rows[static_cast<std::size_t>(y)];
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (std::size_t j = 0; j < vertical.shares.size(); ++j) {
      const std::uint8_t* source = image.row(vertical.first + static_cast<index_t>(j));
      float* to = row.data();
      for (const area_taps& horizontal : columns)
        for (index_t c = 0; c < channels; ++c) {
          const std::uint8_t* from = source + horizontal.first * channels + c;
          float total = 0;
          for (const float share : horizontal.shares) {
            total += rounded_product(*from, share);
            from += channels;
          }
          *to++ = total;
        }
      for (index_t i = 0; i < row_size; ++i) sum[i] += rounded_product(vertical.shares[j], row[i]);
    }
    std::transform(sum.begin(), sum.end(), out.row(y), round_to_pixel);
  }
}

/// The mean of blocks of pixels. OpenCV rounds the mean of 2 x 2 pixels up at a half, and that of
/// others to even.
inline void shrink_by_integers(view<const std::uint8_t> image, view<std::uint8_t> out) {
  const index_t channels = image.extent(2);
  const index_t block_h = image.extent(0) / out.extent(0);
  const index_t block_w = image.extent(1) / out.extent(1);
  const bool rounds_up = block_h == 2 && block_w == 2;
  const float share = 1.0f / static_cast<float>(block_h * block_w);
  for (index_t y = 0; y < out.extent(0); ++y)
    for (index_t x = 0; x < out.extent(1); ++x)
      for (index_t c = 0; c < channels; ++c) {
        int sum = 0;
        for (index_t i = 0; i < block_h; ++i)
          for (index_t j = 0; j < block_w; ++j)
            sum += image.row(y * block_h + i)[(x * block_w + j) * channels + c];
        out.row(y)[x * channels + c] = rounds_up ? static_cast<std::uint8_t>((sum + 2) / 4)
                                                 : round_to_pixel(static_cast<float>(sum) * share);
      }
}

/// Two neighbouring source pixels and their weights in units of 1 / 2048.
struct fixed_point_tap {
  index_t low = 0, high = 0;
  int low_weight = 0, high_weight = 0;
};

/// What OpenCV makes of area interpolation where an axis grows: linear interpolation in which a
/// destination pixel inside one source pixel takes its value alone. In fixed point of 11 bits.
inline std::vector<fixed_point_tap> enlarging_table(index_t from, index_t to) {
  constexpr float one = 2048;
  const double inverse = static_cast<double>(to) / static_cast<double>(from);
  const double scale = 1.0 / inverse;
  std::vector<fixed_point_tap> table(static_cast<std::size_t>(to));
  for (index_t i = 0; i < to; ++i) {
    auto source = static_cast<index_t>(std::floor(static_cast<double>(i) * scale));
    auto part =
        static_cast<float>(static_cast<double>(i + 1) - static_cast<double>(source + 1) * inverse);
    part = part <= 0 ? 0 : part - std::floor(part);
    if (source >= from - 1) {
      source = from - 1;
      part = 0;
    }
    table[static_cast<std::size_t>(i)] = {source, std::min(source + 1, from - 1),
                                          static_cast<int>(std::nearbyint((1 - part) * one)),
                                          static_cast<int>(std::nearbyint(part * one))};
  }
  return table;
}

inline void enlarge(view<const std::uint8_t> image, view<std::uint8_t> out) {
  const index_t channels = image.extent(2);
  const std::vector<fixed_point_tap> columns = enlarging_table(image.extent(1), out.extent(1));
  const std::vector<fixed_point_tap> rows = enlarging_table(image.extent(0), out.extent(0));
  const auto mix = [&](const std::uint8_t* row, const fixed_point_tap& tap, index_t c) {
    return row[tap.low * channels + c] * tap.low_weight +
           row[tap.high * channels + c] * tap.high_weight;
  };
  for (index_t y = 0; y < out.extent(0); ++y) {
    const fixed_point_tap& vertical = rows[static_cast<std::size_t>(y)];
    std::uint8_t* to = out.row(y);
    for (const fixed_point_tap& horizontal : columns)
      for (index_t c = 0; c < channels; ++c) {
        const int low = mix(image.row(vertical.low), horizontal, c) >> 4;
        const int high = mix(image.row(vertical.high), horizontal, c) >> 4;
        const int sum = ((vertical.low_weight * low) >> 16) + ((vertical.high_weight * high) >> 16);
        *to++ = static_cast<std::uint8_t>((sum + 2) >> 2);
      }
  }
}

}  // namespace detail

/// Resizes an image (H, W, C) to (height, width, C) by area interpolation. Equal, bit for bit, to
/// OpenCV's `resize` with INTER_AREA on 8-bit images of 1, 3 or 4 channels, whose three ways it
/// follows: whole factors, fractions, and its fixed-point linear form where an axis grows.
inline tensor<std::uint8_t> resize_area(view<const std::uint8_t> image, index_t height,
                                        index_t width) {
  const index_t from_h = image.extent(0), from_w = image.extent(1);
  if (image.size() == 0 || height < 1 || width < 1)
    fail("resize_area: from ", to_string(image.extents()), " to ", height, " x ", width);
  tensor<std::uint8_t> out(shape{height, width, image.extent(2)});
  if (height > from_h || width > from_w)
    detail::enlarge(image, out);
  else if (from_h % height == 0 && from_w % width == 0)
    detail::shrink_by_integers(image, out);
  else
    detail::shrink_by_fractions(image, out);
  return out;
}

namespace detail {

/// Source pixels that one destination pixel mixes, with their weights in units of 2^-22.
struct antialiased_taps {
  index_t first = 0;
  std::vector<std::int64_t> weights;
};

/// Pillow's table of weights for its triangle filter: as wide as a source pixel where an axis
/// grows, as a destination pixel where it shrinks.
inline std::vector<antialiased_taps> antialiased_table(index_t from, index_t to) {
  const double ratio = static_cast<double>(from) / static_cast<double>(to);
  const double support = std::max(ratio, 1.0);
  std::vector<antialiased_taps> table(static_cast<std::size_t>(to));
  for (index_t i = 0; i < to; ++i) {
    const double centre = (static_cast<double>(i) + 0.5) * ratio;
    const index_t first = std::max<index_t>(0, static_cast<index_t>(centre - support + 0.5));
    const index_t last = std::min(from, static_cast<index_t>(centre + support + 0.5));
    std::vector<double> shares;
    double sum = 0;
    for (index_t j = first; j < last; ++j) {
      const double distance = std::abs(static_cast<double>(j) - centre + 0.5) * (1.0 / support);
      shares.push_back(std::max(0.0, 1.0 - distance));
      sum += shares.back();
    }
    antialiased_taps& taps = table[static_cast<std::size_t>(i)];
    taps.first = first;
    for (const double share : shares)
      taps.weights.push_back(static_cast<std::int64_t>(share / sum * (1 << 22) + 0.5));
  }
  return table;
}

/// One output channel of one pixel: taps along an axis whose neighbours lie `step` apart.
inline std::uint8_t mix(const std::uint8_t* x, index_t step, const antialiased_taps& taps) {
  std::int64_t sum = 1 << 21;
  for (std::size_t j = 0; j < taps.weights.size(); ++j)
    sum += taps.weights[j] * x[static_cast<index_t>(j) * step];
  return static_cast<std::uint8_t>(std::clamp<std::int64_t>(sum >> 22, 0, 255));
}

}  // namespace detail

/// Resizes an image (H, W, C) to (height, width, C) by linear interpolation that takes in all
/// pixels where it shrinks. Equal, bit for bit, to Pillow's `resize` with BILINEAR on 8-bit images
/// (versions up to 12): first along rows, then along columns, 8 bits between.
inline tensor<std::uint8_t> resize_antialiased(view<const std::uint8_t> image, index_t height,
                                               index_t width) {
  const index_t from_h = image.extent(0), from_w = image.extent(1), channels = image.extent(2);
  if (image.size() == 0 || height < 1 || width < 1)
    fail("resize_antialiased: from ", to_string(image.extents()), " to ", height, " x ", width);
  const std::vector<detail::antialiased_taps> columns = detail::antialiased_table(from_w, width);
  const std::vector<detail::antialiased_taps> rows = detail::antialiased_table(from_h, height);
  tensor<std::uint8_t> narrow(shape{from_h, width, channels});
  for (index_t y = 0; y < from_h; ++y)
    for (index_t x = 0; x < width; ++x) {
      const detail::antialiased_taps& taps = columns[static_cast<std::size_t>(x)];
      for (index_t c = 0; c < channels; ++c)
        narrow.row(y)[x * channels + c] =
            detail::mix(image.row(y) + taps.first * channels + c, channels, taps);
    }
  tensor<std::uint8_t> out(shape{height, width, channels});
  const index_t row_size = width * channels;
  for (index_t y = 0; y < height; ++y) {
    const detail::antialiased_taps& taps = rows[static_cast<std::size_t>(y)];
    for (index_t i = 0; i < row_size; ++i)
      out.row(y)[i] = detail::mix(narrow.row(taps.first) + i, row_size, taps);
  }
  return out;
}

/// Bilinear interpolation along one axis: out[i] = in[low] + (in[high] - in[low]) * part.
struct bilinear_tap {
  index_t low = 0, high = 0;
  float part = 0;
};

/// Position of destination pixel `i` among `from` source pixels, pixel centres aligned (PyTorch's
/// `interpolate` with mode="bilinear", align_corners=False).
inline bilinear_tap bilinear_position(index_t i, index_t from, index_t to) {
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  const float position = std::max(0.0f, scale * (static_cast<float>(i) + 0.5f) - 0.5f);
  const index_t low = std::min(static_cast<index_t>(position), from - 1);
  return {low, std::min(low + 1, from - 1), position - static_cast<float>(low)};
}

/// bilinear_position of all `to` destination pixels.
inline std::vector<bilinear_tap> bilinear_table(index_t from, index_t to) {
  std::vector<bilinear_tap> taps(static_cast<std::size_t>(to));
  for (index_t i = 0; i < to; ++i)
    taps[static_cast<std::size_t>(i)] = bilinear_position(i, from, to);
  return taps;
}

namespace detail {

/// out = low + (high - low) * part over n floats: two rows become one between them.
inline void mix_rows(index_t n, const float* low, const float* high, float part, float* out) {
  for (index_t x = 0; x < n; ++x) out[x] = low[x] + (high[x] - low[x]) * part;
}

/// Calls visit(x, value) for each pixel of a row that is interpolated to `columns`.
template <class Visit>
void mix_columns(const float* row, const std::vector<bilinear_tap>& columns, Visit&& visit) {
  index_t x = 0;
  for (const bilinear_tap& tap : columns)
    visit(x++, row[tap.low] + (row[tap.high] - row[tap.low]) * tap.part);
}

}  // namespace detail

/// Bilinear interpolation of the top-left part (crop_h, crop_w) of `plane` (h, w) to (out_h,
/// out_w), rows row_begin to row_end of it. Calls visit(y, x, value) for each pixel.
template <class Visit>
void resize_bilinear(view<const float> plane, index_t crop_h, index_t crop_w, index_t out_h,
                     index_t out_w, index_t row_begin, index_t row_end, Visit&& visit) {
  const std::vector<bilinear_tap> columns = bilinear_table(crop_w, out_w);
  std::vector<float> row(static_cast<std::size_t>(crop_w));
  for (index_t y = row_begin; y < row_end; ++y) {
    const bilinear_tap tap = bilinear_position(y, crop_h, out_h);
    detail::mix_rows(crop_w, plane.row(tap.low), plane.row(tap.high), tap.part, row.data());
    detail::mix_columns(row.data(), columns, [&](index_t x, float value) { visit(y, x, value); });
  }
}

/// Two interpolations after each other: `plane` (side, side) to (frame, frame), then the top-left
/// part (crop_h, crop_w) of that to (out_h, out_w), of which rows row_begin to row_end are visited.
/// One where the plane is of the frame's size already. Nothing of the frame is kept but two rows.
template <class Visit>
void resize_bilinear_through(view<const float> plane, index_t frame, index_t crop_h, index_t crop_w,
                             index_t out_h, index_t out_w, index_t row_begin, index_t row_end,
                             Visit&& visit) {
  const index_t side = plane.extent(0);
  if (side == frame)
    return resize_bilinear(plane, crop_h, crop_w, out_h, out_w, row_begin, row_end,
                           std::forward<Visit>(visit));
  std::vector<bilinear_tap> frame_columns = bilinear_table(side, frame);
  frame_columns.resize(static_cast<std::size_t>(crop_w));
  const std::vector<bilinear_tap> columns = bilinear_table(crop_w, out_w);
  tensor<float> narrow(shape{side}), rows(shape{2, crop_w}), mixed(shape{crop_w});
  index_t held[2] = {-1, -1};  // which rows of the frame those are
  const auto frame_row = [&](index_t y) {
    float* row = rows.row(y % 2);
    if (std::exchange(held[y % 2], y) == y) return row;
    const bilinear_tap tap = bilinear_position(y, side, frame);
    detail::mix_rows(side, plane.row(tap.low), plane.row(tap.high), tap.part, narrow.data());
    detail::mix_columns(narrow.data(), frame_columns, [&](index_t x, float v) { row[x] = v; });
    return row;
  };
  for (index_t y = row_begin; y < row_end; ++y) {
    const bilinear_tap tap = bilinear_position(y, crop_h, out_h);
    const float* low = frame_row(tap.low);
    const float* high = frame_row(tap.high);
    detail::mix_rows(crop_w, low, high, tap.part, mixed.data());
    detail::mix_columns(mixed.data(), columns, [&](index_t x, float value) { visit(y, x, value); });
  }
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
