#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <microtome/imaging/resize.hpp>
#include <microtome/models/sam.hpp>

namespace microtome {

/// A box around one object in pixels of the original image, from x0, y0 to x1, y1.
struct pixel_box {
  index_t x0 = 0, y0 = 0, x1 = 0, y1 = 0;
};

/// A box in a volume; slices z0 to z1, both included.
struct voxel_box {
  index_t x0 = 0, y0 = 0, z0 = 0, x1 = 0, y1 = 0, z1 = 0;
};

/// The slice that an object is prompted on first.
inline index_t middle_slice(const voxel_box& b) {
  return (b.z0 + b.z1) / 2;
}

/// Labels of an image (H, W) or volume (D, H, W): 0 is background, i + 1 is the i-th box.
using label_map = tensor<std::uint16_t>;

/// Boxes that one image or volume may have.
inline constexpr index_t max_boxes = 65535;

/// How an image was fitted into a model's square input, and into the square frame of prompts and
/// masks: its longest side to the square's, padded with zeros at the right and at the bottom.
struct image_fit {
  index_t height = 0, width = 0;              ///< of the original
  index_t input_height = 0, input_width = 0;  ///< of the part of the input that it fills
  index_t frame_height = 0, frame_width = 0;  ///< of the part of the frame
  index_t frame = 0;                          ///< side
  bool truncates = true;                      ///< see input_policy

  /// `side` is that of the input.
  static image_fit of(index_t height, index_t width, index_t side, const input_policy& policy) {
    const auto scaled = [&](index_t n, index_t square) {
      const double scale = scale_to(square, height, width);
      const double rounded = std::floor(static_cast<double>(n) * scale + 0.5);
      return std::max<index_t>(1, static_cast<index_t>(rounded));
    };
    return {height,
            width,
            scaled(height, side),
            scaled(width, side),
            scaled(height, policy.frame),
            scaled(width, policy.frame),
            policy.frame,
            policy.truncates};
  }

  static image_fit of(index_t height, index_t width, const sam& model) {
    return of(height, width, model.encoder.image_size(), model.config.input);
  }

  /// A box in the frame. LiteMedSAM truncates coordinates to whole pixels.
  box to_frame(const pixel_box& b) const {
    return {to_frame_x(static_cast<double>(b.x0)), to_frame_y(static_cast<double>(b.y0)),
            to_frame_x(static_cast<double>(b.x1)), to_frame_y(static_cast<double>(b.y1))};
  }

  float to_frame_x(double x) const { return scaled(x, frame_width, width); }
  float to_frame_y(double y) const { return scaled(y, frame_height, height); }

private:
  static double scale_to(index_t square, index_t height, index_t width) {
    return static_cast<double>(square) / static_cast<double>(std::max(height, width));
  }
  float scaled(double v, index_t in_frame, index_t in_image) const {
    if (truncates)
      return static_cast<float>(static_cast<index_t>(v * scale_to(frame, height, width)));
    return static_cast<float>(v * (static_cast<double>(in_frame) / static_cast<double>(in_image)));
  }
};

/// Preprocesses an image (H, W, 1) or (H, W, 3), grey repeated over the channels, as the model's
/// input_policy says: the longest side to that of its input, `side`, on 8 bits, normalised, zeros
/// right and below. `out` is (side * side, 3).
inline image_fit preprocess(view<const std::uint8_t> image, const sam& model, view<float> out) {
  const input_policy& policy = model.config.input;
  const index_t channels = image.extent(2), side = model.encoder.image_size();
  const image_fit fit = image_fit::of(image.extent(0), image.extent(1), model);
  const index_t height = fit.input_height, width = fit.input_width;
  tensor<std::uint8_t> resized;
  view<const std::uint8_t> pixels = image;
  if (height != fit.height || width != fit.width) {
    resized = policy.resize == input_policy::interpolation::area
                  ? resize_area(image, height, width)
                  : resize_antialiased(image, height, width);
    pixels = resized;
  }
  std::array<std::array<float, 256>, 3> values;  // of every level
  const auto [low, high] = std::minmax_element(pixels.begin(), pixels.end());
  const float range = std::max(static_cast<float>(*high) - static_cast<float>(*low), 1e-8f);
  for (std::size_t c = 0; c < 3; ++c)
    for (std::size_t level = 0; level < 256; ++level) {
      const auto x = static_cast<float>(level);
      values[c][level] = policy.normalize ? (x / 255 - policy.normalize->mean[c] / 255) /
                                                (policy.normalize->deviation[c] / 255)
                                          : (x - static_cast<float>(*low)) / range;
    }
  std::fill(out.begin(), out.end(), 0.0f);
  for (index_t y = 0; y < height; ++y)
    for (index_t x = 0; x < width; ++x)
      for (index_t c = 0; c < 3; ++c) {
        const index_t from = (y * width + x) * channels + (channels == 3 ? c : 0);
        out[(y * side + x) * 3 + c] = values[static_cast<std::size_t>(c)][pixels[from]];
      }
  return fit;
}

/// Called after every step of a segmentation with the steps done and their total.
using progress_callback = std::function<void(index_t done, index_t total)>;

/// Called with a box that cannot be segmented, by its number from 0, and what is wrong with it.
using bad_box_callback = std::function<void(std::size_t number, const std::string& complaint)>;

/// What is wrong with box `number` in an image of height x width pixels; empty where nothing is. As
/// for LiteMedSAM's script, a box may be as thin as a line (tools that count the last pixel in
/// write x0 = x1 for one column) and may reach outside, as long as it touches the image.
inline std::string box_complaint(const pixel_box& b, std::size_t number, index_t height,
                                 index_t width) {
  const char* problem = nullptr;
  if (b.x0 > b.x1 || b.y0 > b.y1)
    problem = " is reversed: expected x0 <= x1 and y0 <= y1";
  else if (b.x1 < 0 || b.y1 < 0 || b.x0 > width || b.y0 > height)
    problem = " lies outside the image of ";
  if (!problem) return "";
  std::ostringstream text;
  text << "box " << number << " (" << b.x0 << ", " << b.y0 << ", " << b.x1 << ", " << b.y1 << ')'
       << problem;
  if (b.x0 <= b.x1 && b.y0 <= b.y1) text << width << " x " << height << " pixels";
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

namespace detail {

inline void check_box_count(std::size_t count) {
  if (count > static_cast<std::size_t>(max_boxes))
    fail(count, " boxes, at most ", max_boxes, " are possible");
}

/// Passes a complaint on, or throws it as an `error` where nobody wants it. Returns whether there
/// is none.
inline bool good_box(const std::string& complaint, std::size_t number,
                     const bad_box_callback& bad_box) {
  if (complaint.empty()) return true;
  if (!bad_box) fail(complaint);
  bad_box(number, complaint);
  return false;
}

/// Mask `i` of those with one per prompt.
inline view<const float> mask_of(const decoded_masks& masks, index_t i) {
  const shape& extents = masks.low_res_masks.extents();
  return {masks.low_res_masks.row(i), {extents[2], extents[3]}};
}

/// Draws a mask, logits (side, side), over `labels` (H, W) at full resolution, rows shared out over
/// the threads.
template <class Label>
void draw_mask(int threads, view<const float> logits, const image_fit& fit, Label label,
               std::type_identity_t<view<Label>> labels) {
  constexpr index_t rows = 64;
  parallel_for(threads, (fit.height + rows - 1) / rows, [&](index_t task, int) {
    resize_bilinear_through(logits, fit.frame, fit.frame_height, fit.frame_width, fit.height,
                            fit.width, task * rows, std::min(fit.height, (task + 1) * rows),
                            [&](index_t y, index_t x, float v) {
                              if (v > 0) labels[y * fit.width + x] = label;
                            });
  });
}

}  // namespace detail

/// Segments an image (H, W, 3) or (H, W, 1): one mask per box, later boxes over earlier ones.
/// Throws `error` where box_complaint() has something to say about a box, before anything is
/// computed; or tells `bad_box` of it and leaves its label out.
inline label_map segment(session& s, view<const std::uint8_t> image,
                         std::span<const pixel_box> boxes, const bad_box_callback& bad_box = {}) {
  detail::check_box_count(boxes.size());
  std::vector<std::size_t> good;
  for (std::size_t i = 0; i < boxes.size(); ++i)
    if (detail::good_box(box_complaint(boxes[i], i, image.extent(0), image.extent(1)), i, bad_box))
      good.push_back(i);
  label_map labels(shape{image.extent(0), image.extent(1)});
  if (good.empty()) return labels;

  const index_t side = s.model().encoder.image_size();
  tensor<float> input(shape{side * side, 3});
  const image_fit fit = preprocess(image, s.model(), input);
  s.encode(input);
  constexpr std::size_t at_once = 32;
  for (std::size_t start = 0; start < good.size(); start += at_once) {
    std::vector<box> prompts;
    for (std::size_t i = start; i < std::min(good.size(), start + at_once); ++i)
      prompts.push_back(fit.to_frame(boxes[good[i]]));
    const decoded_masks masks = s.decode(prompts);
    for (std::size_t i = 0; i < prompts.size(); ++i)
      detail::draw_mask(s.threads(), detail::mask_of(masks, static_cast<index_t>(i)), fit,
                        static_cast<std::uint16_t>(good[start + i] + 1), labels);
  }
  return labels;
}

/// Segments a volume (D, H, W) slice by slice, each object from the middle of its box outwards.
///
/// The middle slice is prompted with the box itself; each next one, up and then down, with the
/// bounding box of the object's mask in the slice before, in pixels of the prompts' frame and
/// widened by 3 on each side (of 256; by more in a larger frame), or with the original box where
/// that mask is empty (LiteMedSAM's own way).
///
/// For that bounding box LiteMedSAM's script draws the mask with the object's number, which counts
/// from 1, in 8 bits, and shrinks it by area interpolation to whole numbers. Object n therefore
/// keeps each pixel that it covers by more than 1 / (2 n), and of object 256, whose number wraps to
/// 0, nothing is left: all its slices are prompted with the original box.
///
/// Slices are swept upwards once and downwards once for all objects together: a slice is encoded
/// once and its prompts are decoded as a batch, where the original encodes it once per object.
class volume_segmenter {
public:
  /// `volume` must outlive this object. Bad boxes are thrown or told of, as by segment().
  volume_segmenter(session& s, view<const std::uint8_t> volume, std::span<const voxel_box> boxes,
                   const bad_box_callback& bad_box = {})
      : session_(s),
        volume_(volume),
        fit_(image_fit::of(volume.extent(1), volume.extent(2), s.model())),
        input_(shape{s.model().encoder.image_size() * s.model().encoder.image_size(), 3}),
        labels_(volume.extents()),
        mask_(shape{fit_.height, fit_.width, 1}) {
    detail::check_box_count(boxes.size());
    for (std::size_t i = 0; i < boxes.size(); ++i)
      if (detail::good_box(box_complaint(boxes[i], i, volume.extents()), i, bad_box))
        add_object(boxes[i], i);
  }

  label_map run(const progress_callback& progress = {}) {
    const index_t depth = volume_.extent(0);
    index_t total = 0;
    for (const object& o : objects_) total += o.last - o.first + 1;
    index_t done = 0;
    const auto sweep = [&](index_t z, bool up) {
      const index_t count = segment_slice(z, up);
      done += count;
      if (count && progress) progress(done, total);
    };
    for (index_t z = 0; z < depth; ++z) sweep(z, true);
    for (object& o : objects_) o.previous = o.after_middle;
    for (index_t z = depth - 1; z >= 0; --z) sweep(z, false);
    return std::move(labels_);
  }

private:
  struct object {
    index_t first, middle, last;  ///< slices, all included
    box prompt;                   ///< the original box in the prompts' frame
    std::uint16_t label;
    box previous;      ///< prompt that the slice before gave
    box after_middle;  ///< prompt that the middle slice gave, for the way down

    /// The number that its mask is drawn with for the prompt of the next slice.
    std::uint8_t drawn() const { return static_cast<std::uint8_t>(label); }
  };

  void add_object(const voxel_box& b, std::size_t i) {
    const box prompt = fit_.to_frame({b.x0, b.y0, b.x1, b.y1});
    objects_.push_back({std::max<index_t>(b.z0, 0), middle_slice(b),
                        std::min(b.z1, volume_.extent(0) - 1), prompt,
                        static_cast<std::uint16_t>(i + 1), prompt, prompt});
  }

  /// Segments all objects that pass through slice z on the way up (from their middle on) or down
  /// (below their middle). Returns how many.
  index_t segment_slice(index_t z, bool up) {
    active_.clear();
    prompts_.clear();
    for (object& o : objects_)
      if (up ? (o.middle <= z && z <= o.last) : (o.first <= z && z < o.middle)) {
        active_.push_back(&o);
        prompts_.push_back(o.previous);
      }
    if (active_.empty()) return 0;
    encode(z, up);
    const decoded_masks masks = session_.decode(prompts_);
    const view<std::uint16_t> slice(labels_.row(z), {fit_.height, fit_.width});
    for (std::size_t i = 0; i < active_.size(); ++i) {
      object& o = *active_[i];
      draw(detail::mask_of(masks, static_cast<index_t>(i)), o, slice);
      o.previous = next_prompt(o);
      if (z == o.middle) o.after_middle = o.previous;
    }
    return static_cast<index_t>(active_.size());
  }

  /// Encodes slice z, or takes the embedding kept on the way up.
  void encode(index_t z, bool up) {
    if (const auto kept = kept_.find(z); kept != kept_.end()) {
      session_.set_embedding(kept->second);
      kept_.erase(kept);
      return;
    }
    preprocess({volume_.row(z), {fit_.height, fit_.width, 1}}, session_.model(), input_);
    session_.encode(input_);
    const bool needed_again =
        up && std::any_of(objects_.begin(), objects_.end(),
                          [&](const object& o) { return o.first <= z && z < o.middle; });
    if (!needed_again || kept_.size() >= max_kept) return;
    tensor<float> copy(session_.embedding().extents());
    std::copy(session_.embedding().begin(), session_.embedding().end(), copy.begin());
    kept_.emplace(z, std::move(copy));
  }

  /// The object's mask at full resolution into mask_, and over the slice where no later object is.
  void draw(view<const float> logits, const object& o, view<std::uint16_t> slice) {
    std::fill(mask_.begin(), mask_.end(), std::uint8_t{0});
    detail::draw_mask(session_.threads(), logits, fit_, std::max(o.drawn(), std::uint8_t{1}),
                      mask_);
    for (index_t i = 0; i < mask_.size(); ++i)
      if (mask_[i]) slice[i] = std::max(slice[i], o.label);
  }

  /// Bounding box of mask_ in the prompts' frame, widened; the original box where it is empty.
  box next_prompt(const object& o) const {
    if (o.drawn() == 0) return o.prompt;
    const tensor<std::uint8_t> shrunk = resize_area(mask_, fit_.frame_height, fit_.frame_width);
    index_t x0 = fit_.frame, y0 = fit_.frame, x1 = -1, y1 = -1;
    for (index_t y = 0; y < fit_.frame_height; ++y)
      for (index_t x = 0; x < fit_.frame_width; ++x)
        if (shrunk[y * fit_.frame_width + x]) {
          x0 = std::min(x0, x);
          x1 = std::max(x1, x);
          y0 = std::min(y0, y);
          y1 = std::max(y1, y);
        }
    if (x1 < 0) return o.prompt;
    const index_t margin = std::max<index_t>(3, 3 * fit_.frame / 256);
    return {static_cast<float>(std::max<index_t>(0, x0 - margin)),
            static_cast<float>(std::max<index_t>(0, y0 - margin)),
            static_cast<float>(std::min(fit_.frame, x1 + margin)),
            static_cast<float>(std::min(fit_.frame, y1 + margin))};
  }

  /// Embeddings kept between the sweeps, 4 MB each at LiteMedSAM's size.
  static constexpr std::size_t max_kept = 32;

  session& session_;
  view<const std::uint8_t> volume_;
  image_fit fit_;
  tensor<float> input_;
  label_map labels_;
  tensor<std::uint8_t> mask_;  ///< of one object at full resolution, (H, W, 1)
  std::vector<object> objects_;
  std::vector<object*> active_;
  std::vector<box> prompts_;
  std::map<index_t, tensor<float>> kept_;
};

/// Segments a volume (D, H, W); see volume_segmenter. `progress` counts objects times slices.
inline label_map segment(session& s, view<const std::uint8_t> volume,
                         std::span<const voxel_box> boxes, const progress_callback& progress = {},
                         const bad_box_callback& bad_box = {}) {
  return volume_segmenter(s, volume, boxes, bad_box).run(progress);
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
