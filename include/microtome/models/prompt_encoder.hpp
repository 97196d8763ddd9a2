#pragma once

#include <kernels/macros_off.hpp>

#include <cmath>
#include <numbers>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <microtome/models/sam_config.hpp>
#include <microtome/ops/convolution.hpp>
#include <microtome/ops/layer_norm.hpp>

namespace microtome {

/// A box prompt in pixels of the prompts' frame, see input_policy.
struct box {
  float x0 = 0, y0 = 0, x1 = 0, y1 = 0;
};

/// A click in pixels of the prompts' frame, see input_policy; label 1 is inside the object, 0
/// outside.
struct point {
  float x = 0, y = 0;
  int label = 1;
};

/// The largest number of points in one prompt.
inline constexpr index_t max_prompt_points = 64;

/// SAM's prompt encoder (Kirillov et al., Segment Anything, 2023): points and box corners become
/// tokens, a mask becomes a dense map that is added to the image embedding.
class prompt_encoder {
public:
  prompt_encoder(const weights& file, const sam_config& config)
      : frame_(static_cast<float>(config.input.frame)),
        mask_side_(config.mask_size()),
        gaussian_(file.read(name_ + ".pe_layer.positional_encoding_gaussian_matrix",
                            {2, config.embed_dim / 2})),
        not_a_point_(file.read(name_ + ".not_a_point_embed.weight", {1, config.embed_dim})),
        no_mask_(file.read(name_ + ".no_mask_embed.weight", {1, config.embed_dim})),
        mask_conv1_(file, name_ + ".mask_downscaling.0", 1, config.mask_in_chans / 4),
        mask_norm1_(file, name_ + ".mask_downscaling.1", config.mask_in_chans / 4, 1e-6f),
        mask_conv2_(file, name_ + ".mask_downscaling.3", config.mask_in_chans / 4,
                    config.mask_in_chans),
        mask_norm2_(file, name_ + ".mask_downscaling.4", config.mask_in_chans, 1e-6f),
        mask_project_(linear::pointwise(file, name_ + ".mask_downscaling.6", config.mask_in_chans,
                                        config.embed_dim)) {
    for (int i = 0; i < 4; ++i)
      points_[static_cast<std::size_t>(i)] = file.read(
          name_ + ".point_embeddings." + std::to_string(i) + ".weight", {1, config.embed_dim});
    const index_t side = config.embedding_size;
    dense_position_ = tensor<float>(shape{side * side, config.embed_dim});
    for (index_t y = 0; y < side; ++y)
      for (index_t x = 0; x < side; ++x)
        encode_position((static_cast<float>(x) + 0.5f) / static_cast<float>(side),
                        (static_cast<float>(y) + 0.5f) / static_cast<float>(side),
                        dense_position_.row(y * side + x));
  }

  index_t embed_dim() const { return no_mask_.size(); }

  /// Position encoding of every pixel of the image embedding: (tokens, embed_dim).
  view<const float> dense_position() const { return dense_position_; }
  /// What is added to every pixel of the image embedding where no mask is given: (embed_dim).
  const float* no_mask() const { return no_mask_.data(); }

  static constexpr index_t box_tokens = 2;

  /// The two corner tokens of a box: (2, embed_dim).
  void encode(const box& b, float* tokens) const {
    encode_corner(b.x0, b.y0, points_[2], tokens);
    encode_corner(b.x1, b.y1, points_[3], tokens + embed_dim());
  }

  /// Tokens that `encode` makes of `count` points, with or without a box.
  static index_t token_count(index_t count, bool with_box) {
    return count + (with_box ? box_tokens : (count > 0 ? 1 : 0));
  }

  /// The tokens of points, then of a box: (token_count, embed_dim). Points without a box are padded
  /// with one "not a point" token, as SAM is trained.
  void encode(std::span<const point> points, const std::optional<box>& b, float* tokens) const {
    for (const point& p : points) {
      encode_corner(p.x, p.y, points_[p.label ? 1 : 0], tokens);
      tokens += embed_dim();
    }
    if (b)
      encode(*b, tokens);
    else if (!points.empty())
      std::copy(not_a_point_.begin(), not_a_point_.end(), tokens);
  }

  /// mask (mask_size^2, 1), logits -> dense (embedding tokens, embed_dim).
  void encode_mask(workspace& ws, view<const float> mask, view<float> dense) const {
    frame memory(ws.memory());
    const map_size full{mask_side_, mask_side_};
    const map_size half{mask_side_ / 2, mask_side_ / 2};
    const view<float> a = memory.take({half.tokens(), mask_conv1_.out()});
    const view<float> b = memory.take({half.tokens() / 4, mask_conv2_.out()});
    mask_conv1_(ws, full, mask, a);
    mask_norm1_(ws, a, a, activation::gelu);
    mask_conv2_(ws, half, a, b);
    mask_norm2_(ws, b, b, activation::gelu);
    mask_project_(ws, b, dense);
  }

  index_t memory() const {
    const index_t half = mask_side_ * mask_side_ / 4;
    return arena::rounded(half * mask_conv1_.out()) + arena::rounded(half / 4 * mask_conv2_.out());
  }

private:
  /// Random Fourier features (Tancik et al., 2020) of a position in [0, 1]^2:
  /// [sin(2 pi p), cos(2 pi p)] with p = (2 (x, y) - 1) G.
  void encode_position(float x, float y, float* out) const {
    const index_t half = embed_dim() / 2;
    // In double, so that C libraries agree when it is rounded.
    const double u = 2.0 * double{x} - 1.0;
    const double v = 2.0 * double{y} - 1.0;
    for (index_t i = 0; i < half; ++i) {
      const double phase =
          2.0 * std::numbers::pi * (u * double{gaussian_[i]} + v * double{gaussian_[half + i]});
      out[i] = static_cast<float>(std::sin(phase));
      out[half + i] = static_cast<float>(std::cos(phase));
    }
  }

  /// The centre of pixel (x, y), marked as a corner or point by adding `kind`.
  void encode_corner(float x, float y, const tensor<float>& kind, float* out) const {
    encode_position((x + 0.5f) / frame_, (y + 0.5f) / frame_, out);
    for (index_t i = 0; i < embed_dim(); ++i) out[i] += kind[i];
  }

  inline static const std::string name_ = "prompt_encoder";
  float frame_;
  index_t mask_side_;
  tensor<float> gaussian_;               // (2, embed_dim / 2)
  std::array<tensor<float>, 4> points_;  // outside, inside, top left corner, bottom right corner
  tensor<float> not_a_point_;
  tensor<float> no_mask_;
  tensor<float> dense_position_;
  convolution2x2 mask_conv1_;
  layer_norm mask_norm1_;
  convolution2x2 mask_conv2_;
  layer_norm mask_norm2_;
  linear mask_project_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
