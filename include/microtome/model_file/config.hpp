#pragma once

#include <kernels/macros_off.hpp>

#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <microtome/model_file/safetensors.hpp>

namespace microtome {

/// One stage of TinyViT: blocks at one resolution, then (but for the last stage) patch merging.
struct stage_config {
  enum class kind { conv, attention };
  kind blocks = kind::conv;
  index_t dim = 0;
  index_t depth = 0;
  index_t expand = 4;     ///< conv: hidden channels of MBConv over dim
  index_t heads = 0;      ///< attention
  index_t window = 0;     ///< attention: tokens along a window's side
  index_t mlp_ratio = 4;  ///< attention: hidden channels of the MLP over dim
  index_t stride = 1;     ///< of the patch merging after the stage
};

/// Shapes and depths of a LiteMedSAM, as the converter writes them into the model file.
struct lite_medsam_config {
  index_t image_size = 0;
  index_t pixel_channels = 3;
  std::vector<stage_config> stages;
  index_t embed_dim = 0;
  index_t mask_in_chans = 0;
  struct decoder_config {
    index_t depth = 0;
    index_t heads = 0;
    index_t mlp_dim = 0;
    index_t attention_downsample = 0;
    index_t multimask_outputs = 0;
    index_t iou_hidden = 0;
    index_t iou_depth = 0;
  } decoder;

  /// Side of the image embedding: image_size over the strides.
  index_t embedding_size() const {
    index_t size = image_size;
    for (std::size_t i = 0; i + 1 < stages.size(); ++i) size /= stages[i].stride;
    return size;
  }
  /// Side of the low-resolution masks, and of mask prompts: four times the embedding's.
  index_t mask_size() const { return 4 * embedding_size(); }

  /// Reads and checks the configuration in the metadata of a model file. Throws `error` where the
  /// file is no LiteMedSAM of a known version or a value is missing or out of range.
  static lite_medsam_config from(const safetensors& file);
};

namespace detail {

/// Access to a JSON object in which every number is bounded and every error names the key.
class config_reader {
public:
  config_reader(const std::string& file, std::string path, const nlohmann::json& object)
      : file_(file), path_(std::move(path)), object_(object) {
    if (!object.is_object()) fail(file_, ": config ", path_, " is not an object");
  }

  index_t number(const char* key, index_t low, index_t high) const {
    const auto found = object_.find(key);
    if (found == object_.end()) fail(file_, ": config lacks ", path_, key);
    if (!found->is_number_integer() || *found < low || *found > high)
      fail(file_, ": config ", path_, key, " is ", found->dump(), ", expected an integer from ",
           low, " to ", high);
    return found->get<index_t>();
  }

  std::string text(const char* key) const {
    const auto found = object_.find(key);
    if (found == object_.end() || !found->is_string())
      fail(file_, ": config lacks the text ", path_, key);
    return found->get<std::string>();
  }

  const nlohmann::json& at(const char* key) const {
    const auto found = object_.find(key);
    if (found == object_.end()) fail(file_, ": config lacks ", path_, key);
    return *found;
  }

private:
  const std::string& file_;
  std::string path_;
  const nlohmann::json& object_;
};

inline stage_config read_stage(const config_reader& json, bool last) {
  stage_config stage;
  stage.blocks =
      json.text("kind") == "conv" ? stage_config::kind::conv : stage_config::kind::attention;
  stage.dim = json.number("dim", 1, 4096);
  stage.depth = json.number("depth", 1, 256);
  if (stage.blocks == stage_config::kind::conv) {
    stage.expand = json.number("expand", 1, 16);
  } else {
    stage.heads = json.number("heads", 1, 256);
    stage.window = json.number("window", 1, 32);
    stage.mlp_ratio = json.number("mlp_ratio", 1, 16);
  }
  if (!last) stage.stride = json.number("stride", 1, 2);
  return stage;
}

}  // namespace detail

inline lite_medsam_config lite_medsam_config::from(const safetensors& file) {
  const auto metadata = [&](const char* key, const char* expected) {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end())
      fail(file.name(), ": metadata '", key,
           "' is missing: not a model that converters/convert.py wrote");
    if (expected && found->second != expected)
      fail(file.name(), ": metadata '", key, "' is '", found->second, "', expected '", expected,
           "'");
    return found->second;
  };
  metadata("format", "microtome");
  metadata("format_version", "1");
  metadata("model", "lite_medsam");

  const detail::json_document json(metadata("config", nullptr),
                                   file.name() + ": metadata 'config'");
  const detail::config_reader top(file.name(), "", json.value);
  lite_medsam_config config;
  config.image_size = top.number("image_size", 8, 1024);
  config.pixel_channels = top.number("pixel_channels", 3, 3);
  config.embed_dim = top.number("embed_dim", 8, 4096);
  config.mask_in_chans = top.number("mask_in_chans", 4, 1024);

  const auto& stages = top.at("stages");
  if (!stages.is_array() || stages.empty() || stages.size() > 16)
    fail(file.name(), ": config stages is not a list of 1 to 16 stages");
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const std::string path = "stages[" + std::to_string(i) + "].";
    config.stages.push_back(detail::read_stage(detail::config_reader(file.name(), path, stages[i]),
                                               i + 1 == stages.size()));
    const stage_config& stage = config.stages.back();
    const bool attends = stage.blocks == stage_config::kind::attention;
    if (attends && stage.dim % stage.heads != 0)
      fail(file.name(), ": config ", path, "dim is ", stage.dim, ", not a multiple of its ",
           stage.heads, " heads");
  }

  const detail::config_reader decoder(file.name(), "decoder.", top.at("decoder"));
  config.decoder.depth = decoder.number("depth", 1, 64);
  config.decoder.heads = decoder.number("heads", 1, 256);
  config.decoder.mlp_dim = decoder.number("mlp_dim", 1, 65536);
  config.decoder.attention_downsample = decoder.number("attention_downsample", 1, 16);
  config.decoder.multimask_outputs = decoder.number("multimask_outputs", 1, 16);
  config.decoder.iou_hidden = decoder.number("iou_hidden", 1, 65536);
  config.decoder.iou_depth = decoder.number("iou_depth", 1, 16);

  index_t strides = 1;
  for (const stage_config& stage : config.stages) strides *= stage.stride;
  if (config.image_size % strides != 0)
    fail(file.name(), ": config image_size is ", config.image_size,
         ", not a multiple of the strides' ", strides);
  if (config.mask_size() != config.image_size)
    fail(file.name(), ": config image_size is ", config.image_size, ", but the masks would be ",
         config.mask_size(), " wide: the strides of the stages must multiply to 4");
  if (config.embed_dim % 8 != 0 ||
      config.embed_dim % (config.decoder.attention_downsample * config.decoder.heads) != 0)
    fail(file.name(), ": config embed_dim ", config.embed_dim, " does not divide into ",
         config.decoder.heads, " heads after downsampling by ",
         config.decoder.attention_downsample);
  return config;
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
