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
#include <string>
#include <type_traits>
#include <vector>

#include <microtome/imaging/prompts.hpp>
#include <microtome/imaging/resize.hpp>
#include <microtome/models/sam.hpp>

namespace microtome {

/// Labels of an image (H, W) or volume (D, H, W): 0 is background, i + 1 is the i-th box.
using label_map = tensor<std::uint16_t>;

/// Objects that one image or volume may have.
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

  box to_frame(const image_box& b) const {
    return {to_frame_x(b.x0), to_frame_y(b.y0), to_frame_x(b.x1), to_frame_y(b.y1)};
  }
  point to_frame(const image_point& p) const { return {to_frame_x(p.x), to_frame_y(p.y), p.label}; }

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

/// Called with an object that cannot be segmented, by its number from 0, and what is wrong with its
/// box or its other prompts.
using bad_box_callback = std::function<void(std::size_t number, const std::string& complaint)>;

/// Called with what was found for an object, by its number from 0: logits (side, side) in the
/// prompts' frame, which are overwritten afterwards, and the IoU that the model expects them to
/// have with the object.
using mask_callback =
    std::function<void(std::size_t number, view<const float> logits, float predicted_iou)>;

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

/// Of the masks of prompt `i` the one that the model expects most of.
inline index_t best_mask(const decoded_masks& masks, index_t i) {
  const index_t count = masks.iou_predictions.extent(1);
  const float* iou = masks.iou_predictions.row(i);
  return i * count + std::distance(iou, std::max_element(iou, iou + count));
}

/// That mask, (side, side).
inline view<const float> mask_of(const decoded_masks& masks, index_t i) {
  const shape& extents = masks.low_res_masks.extents();
  const index_t pixels = extents[2] * extents[3];
  return {masks.low_res_masks.data() + best_mask(masks, i) * pixels, {extents[2], extents[3]}};
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

/// Draws a mask, logits (side, side) as `decode` and mask_callback give them, at the full
/// resolution of the image: 0 or 1, (H, W).
inline tensor<std::uint8_t> full_mask(const session& s, view<const float> logits,
                                      const image_fit& fit) {
  tensor<std::uint8_t> mask(shape{fit.height, fit.width});
  detail::draw_mask(s.threads(), logits, fit, std::uint8_t{1}, mask);
  return mask;
}

namespace detail {

/// The numbers of the prompts that can be segmented; of the others `bad_prompt` is told.
inline std::vector<std::size_t> good_prompts(std::span<const image_prompt> prompts,
                                             const image_fit& fit, index_t mask_side,
                                             const bad_box_callback& bad_prompt) {
  check_box_count(prompts.size());
  std::vector<std::size_t> good;
  for (std::size_t i = 0; i < prompts.size(); ++i)
    if (good_box(prompt_complaint(prompts[i], i, fit.height, fit.width, mask_side), i, bad_prompt))
      good.push_back(i);
  return good;
}

/// Decodes those prompts in their order, boxes alone together.
inline void decode(session& s, const image_fit& fit, std::span<const image_prompt> prompts,
                   std::span<const std::size_t> good, bool multimask, const mask_callback& found) {
  constexpr std::size_t at_once = 32;
  std::vector<std::size_t> waiting;  // the numbers of the boxes that are to be decoded together
  std::vector<box> boxes;
  const auto tell = [&](std::size_t number, const decoded_masks& masks, std::size_t i) {
    const auto row = static_cast<index_t>(i);
    found(number, mask_of(masks, row), masks.iou_predictions[best_mask(masks, row)]);
  };
  const auto decode_boxes = [&] {
    if (boxes.empty()) return;
    const decoded_masks masks = s.decode(boxes, multimask);
    for (std::size_t i = 0; i < boxes.size(); ++i) tell(waiting[i], masks, i);
    waiting.clear();
    boxes.clear();
  };
  for (const std::size_t number : good) {
    const image_prompt& prompt = prompts[number];
    std::optional<box> bounds;
    if (prompt.box) bounds = fit.to_frame(*prompt.box);
    if (prompt.points.empty() && prompt.mask.empty()) {
      waiting.push_back(number);
      boxes.push_back(*bounds);
      if (boxes.size() == at_once) decode_boxes();
      continue;
    }
    decode_boxes();
    std::vector<point> points;
    for (const image_point& p : prompt.points) points.push_back(fit.to_frame(p));
    view<const float> mask;
    if (!prompt.mask.empty()) mask = {prompt.mask.data(), {s.mask_side(), s.mask_side()}};
    tell(number, s.decode(points, bounds, mask, multimask), 0);
  }
  decode_boxes();
}

}  // namespace detail

/// Finds the object of each prompt in the image that `s` has encoded, and that was fitted so. With
/// `multimask` the model proposes three masks, and the one that it expects most of is taken: for a
/// single point, which may mean a part or the whole. Throws `error` where prompt_complaint() has
/// something to say, before anything is computed; or tells `bad_prompt` of it and goes on.
inline void decode_prompts(session& s, const image_fit& fit, std::span<const image_prompt> prompts,
                           bool multimask, const mask_callback& found,
                           const bad_box_callback& bad_prompt = {}) {
  detail::decode(s, fit, prompts, detail::good_prompts(prompts, fit, s.mask_side(), bad_prompt),
                 multimask, found);
}

/// Segments an image (H, W, 3) or (H, W, 1): one mask per prompt, as decode_prompts() finds them,
/// later ones over earlier ones; `found` is told of each. What cannot be segmented leaves its label
/// out.
inline label_map segment(session& s, view<const std::uint8_t> image,
                         std::span<const image_prompt> prompts, bool multimask = false,
                         const bad_box_callback& bad_prompt = {}, const mask_callback& found = {}) {
  const image_fit fit = image_fit::of(image.extent(0), image.extent(1), s.model());
  const std::vector<std::size_t> good =
      detail::good_prompts(prompts, fit, s.mask_side(), bad_prompt);
  label_map labels(shape{fit.height, fit.width});
  if (good.empty()) return labels;
  const index_t side = s.model().encoder.image_size();
  tensor<float> input(shape{side * side, 3});
  preprocess(image, s.model(), input);
  s.encode(input);
  detail::decode(s, fit, prompts, good, multimask,
                 [&](std::size_t number, view<const float> logits, float predicted_iou) {
                   detail::draw_mask(s.threads(), logits, fit,
                                     static_cast<std::uint16_t>(number + 1), labels);
                   if (found) found(number, logits, predicted_iou);
                 });
  return labels;
}

/// The same of boxes in whole pixels.
inline label_map segment(session& s, view<const std::uint8_t> image,
                         std::span<const pixel_box> boxes, const bad_box_callback& bad_box = {}) {
  return segment(s, image, std::vector<image_prompt>(boxes.begin(), boxes.end()), false, bad_box);
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
                   const bad_box_callback& bad_box = {}, bool multimask = false)
      : session_(s),
        multimask_(multimask),
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
    const box prompt = fit_.to_frame(pixel_box{b.x0, b.y0, b.x1, b.y1});
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
    const decoded_masks masks = session_.decode(prompts_, multimask_);
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
  bool multimask_;
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
                         const bad_box_callback& bad_box = {}, bool multimask = false) {
  return volume_segmenter(s, volume, boxes, bad_box, multimask).run(progress);
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
