/// Masks as runs of pixels, and how much two of them share.
#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <microtome/core/tensor.hpp>

namespace microtome {

/// A mask of height x width pixels. `counts` are the lengths of its runs, column by column from the
/// top left, outside and inside by turns; the first is outside, and any of them may be 0. Together
/// they have height * width pixels.
struct run_lengths {
  index_t height = 0, width = 0;
  std::vector<std::uint32_t> counts;
};

/// Largest mask that is kept as runs, in pixels.
inline constexpr index_t max_run_pixels = index_t{1} << 30;

namespace detail {

/// The mask that changes at `places`, which are in order, from 0 to height * width: where it is
/// outside before, it is inside from there on, and the other way round.
inline run_lengths runs_between(index_t height, index_t width,
                                std::span<const std::uint32_t> places) {
  run_lengths runs{height, width, {}};
  std::uint32_t last = 0;
  for (const std::uint32_t place : places) {
    if (place == last && !runs.counts.empty()) {  // changes there and back
      last -= runs.counts.back();
      runs.counts.pop_back();
      continue;
    }
    runs.counts.push_back(place - last);
    last = place;
  }
  const auto pixels = static_cast<std::uint32_t>(height * width);
  if (last < pixels || runs.counts.empty()) runs.counts.push_back(pixels - last);
  return runs;
}

/// Calls visit(begin, end, in_a, in_b) for every piece of two masks of the same size in which both
/// stay what they are.
template <class Visit>
void for_each_piece(const run_lengths& a, const run_lengths& b, Visit&& visit) {
  std::size_t i = 0, j = 0;
  std::uint64_t place = 0, end_a = 0, end_b = 0;
  while (true) {
    // After these, run i - 1 of a and run j - 1 of b hold `place`.
    while (end_a <= place && i < a.counts.size()) end_a += a.counts[i++];
    while (end_b <= place && j < b.counts.size()) end_b += b.counts[j++];
    const std::uint64_t end = std::min(end_a, end_b);
    if (end <= place) return;
    visit(place, end, i % 2 == 0, j % 2 == 0);
    place = end;
  }
}

inline void check_same_size(const char* what, const run_lengths& a, const run_lengths& b) {
  if (a.height != b.height || a.width != b.width)
    fail(what, ": masks of ", a.width, " x ", a.height, " and ", b.width, " x ", b.height,
         " pixels");
}

}  // namespace detail

/// The runs of a mask (H, W), inside where it is not 0.
inline run_lengths runs_of(view<const std::uint8_t> mask) {
  const index_t height = mask.extent(0), width = mask.extent(1);
  if (mask.size() > max_run_pixels)
    fail("a mask of ", width, " x ", height, " pixels, at most ", max_run_pixels, " are possible");
  std::vector<std::uint8_t> used(static_cast<std::size_t>(width));  // columns that are not empty
  for (index_t y = 0; y < height; ++y) {
    const std::uint8_t* row = mask.data() + y * width;
    for (index_t x = 0; x < width; ++x) used[static_cast<std::size_t>(x)] |= row[x];
  }
  std::vector<std::uint32_t> places;
  bool inside = false;
  for (index_t x = 0; x < width; ++x) {
    if (!used[static_cast<std::size_t>(x)] && !inside) continue;
    for (index_t y = 0; y < height; ++y) {
      const bool now = mask[y * width + x] != 0;
      if (now != inside) places.push_back(static_cast<std::uint32_t>(x * height + y));
      inside = now;
    }
  }
  return detail::runs_between(height, width, places);
}

/// The mask (H, W) that has these runs, 1 inside.
inline tensor<std::uint8_t> mask_of_runs(const run_lengths& runs) {
  tensor<std::uint8_t> mask(shape{runs.height, runs.width});
  index_t place = 0;
  for (std::size_t i = 0; i < runs.counts.size(); ++i)
    for (std::uint32_t n = 0; n < runs.counts[i]; ++n, ++place)
      if (i % 2 == 1) mask[place % runs.height * runs.width + place / runs.height] = 1;
  return mask;
}

/// Pixels inside.
inline index_t area_of(const run_lengths& runs) {
  index_t sum = 0;
  for (std::size_t i = 1; i < runs.counts.size(); i += 2) sum += runs.counts[i];
  return sum;
}

/// Pixels inside both.
inline index_t common_area(const run_lengths& a, const run_lengths& b) {
  detail::check_same_size("common_area", a, b);
  std::uint64_t sum = 0;
  detail::for_each_piece(a, b, [&](std::uint64_t begin, std::uint64_t end, bool in_a, bool in_b) {
    if (in_a && in_b) sum += end - begin;
  });
  return static_cast<index_t>(sum);
}

/// What is inside either mask.
inline run_lengths united(const run_lengths& a, const run_lengths& b) {
  detail::check_same_size("united", a, b);
  std::vector<std::uint32_t> places;
  bool inside = false;
  detail::for_each_piece(a, b, [&](std::uint64_t begin, std::uint64_t, bool in_a, bool in_b) {
    if ((in_a || in_b) != inside) places.push_back(static_cast<std::uint32_t>(begin));
    inside = in_a || in_b;
  });
  return detail::runs_between(a.height, a.width, places);
}

/// |A and B| / |A or B|, the Jaccard index; 0 where both are empty, as COCO's evaluation has it.
inline double intersection_over_union(const run_lengths& a, const run_lengths& b) {
  const index_t both = common_area(a, b);
  if (both == 0) return 0;
  return static_cast<double>(both) / static_cast<double>(area_of(a) + area_of(b) - both);
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
