#pragma once

#include <kernels/macros_off.hpp>

#include <array>
#include <optional>

#include <microtome/model_file/config.hpp>
#include <microtome/models/image_encoder.hpp>

namespace microtome {

/// How an image and prompts become what a model takes, and its masks become the image's: data of
/// the model file. The image is fitted into a square, its longest side to the square's, zeros at
/// the right and at the bottom.
struct input_policy {
  enum class interpolation {
    area,        ///< OpenCV's INTER_AREA: see resize_area
    antialiased  ///< Pillow's BILINEAR: see resize_antialiased
  };
  /// Mean and standard deviation of the three channels, of values from 0 to 255.
  struct statistics {
    std::array<float, 3> mean, deviation;
  };

  /// Side of the square that prompts' coordinates are in, and that masks are cut in. It may differ
  /// from the encoder's.
  index_t frame = 0;
  interpolation resize = interpolation::area;
  /// What is subtracted and divided by; where null, it is the image's own minimum and range.
  std::optional<statistics> normalize{};
  /// Whether coordinates are cut to whole pixels of the frame.
  bool truncates = true;

  static input_policy from(const config_reader& json) {
    input_policy policy;
    policy.frame = json.number("frame", 8, 4096);
    policy.resize = static_cast<interpolation>(json.one_of("resize", {"area", "antialiased"}));
    policy.truncates = json.one_of("coordinates", {"truncated", "exact"}) == 0;
    if (json.one_of("normalize", {"range", "statistics"}) == 1) {
      const std::vector<double> mean = json.numbers("mean", 3, 0, 255);
      const std::vector<double> deviation = json.numbers("deviation", 3, 1e-3, 1e6);
      policy.normalize.emplace();
      for (std::size_t c = 0; c < 3; ++c) {
        policy.normalize->mean[c] = static_cast<float>(mean[c]);
        policy.normalize->deviation[c] = static_cast<float>(deviation[c]);
      }
    }
    return policy;
  }
};

/// Sizes of a promptable model, SAM's prompt encoder and mask decoder behind any image encoder.
struct sam_config {
  input_policy input;
  index_t embed_dim = 0;
  index_t mask_in_chans = 0;
  /// Side of the image embedding: the encoder's.
  index_t embedding_size = 0;
  struct decoder_config {
    index_t depth = 0;
    index_t heads = 0;
    index_t mlp_dim = 0;
    index_t attention_downsample = 0;
    index_t multimask_outputs = 0;
    index_t iou_hidden = 0;
    index_t iou_depth = 0;
    float norm_epsilon = 0;  ///< of the transformer's LayerNorms
  } decoder;

  /// Side of the low-resolution masks, and of mask prompts: four times the embedding's.
  index_t mask_size() const { return 4 * embedding_size; }

  /// Reads and checks the configuration of a model file with this encoder. Throws `error` where a
  /// value is missing or out of range.
  static sam_config from(const config_reader& json, const image_encoder& encoder) {
    sam_config config;
    config.input = input_policy::from(json.object("input"));
    config.mask_in_chans = json.number("mask_in_chans", 4, 1024);
    config.embed_dim = encoder.embed_dim();
    config.embedding_size = encoder.embedding_size().width;

    const config_reader decoder = json.object("decoder");
    config.decoder.depth = decoder.number("depth", 1, 64);
    config.decoder.heads = decoder.number("heads", 1, 256);
    config.decoder.mlp_dim = decoder.number("mlp_dim", 1, 65536);
    config.decoder.attention_downsample = decoder.number("attention_downsample", 1, 16);
    config.decoder.multimask_outputs = decoder.number("multimask_outputs", 1, 16);
    config.decoder.iou_hidden = decoder.number("iou_hidden", 1, 65536);
    config.decoder.iou_depth = decoder.number("iou_depth", 1, 16);
    config.decoder.norm_epsilon = static_cast<float>(decoder.real("norm_epsilon", 1e-12, 1));

    if (config.embed_dim % 8 != 0 ||
        config.embed_dim % (config.decoder.attention_downsample * config.decoder.heads) != 0)
      json.refuse("image_encoder.embed_dim ", config.embed_dim, " does not divide into ",
                  config.decoder.heads, " heads after downsampling by ",
                  config.decoder.attention_downsample);
    if (config.input.frame < config.mask_size())
      json.refuse("input.frame is ", config.input.frame, ", but the masks are ", config.mask_size(),
                  " wide: expected at least as much");
    return config;
  }
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
