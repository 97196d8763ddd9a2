#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <span>

#include <microtome/model_file/config.hpp>
#include <microtome/models/image_encoder.hpp>
#include <microtome/models/mask_decoder.hpp>
#include <microtome/models/prompt_encoder.hpp>
#include <microtome/models/sam_config.hpp>

namespace microtome {

struct load_options {
  padding windows = padding::exact;
  /// What the factors of products are rounded to, fp32 or bf16, but for layers that the file has in
  /// 8 bits.
  precision inputs = precision::fp32;
  layer_hook* hook = nullptr;  ///< sees and changes every layer; not kept
  sparsity zeros = sparsity::automatic;
  bool winograd = true;  ///< see winograd3x3; without it convolutions are plain sums
};

/// A promptable model of the family of Segment Anything (Kirillov et al., 2023): an image is
/// encoded once, then any number of prompts are decoded on it. The model file says which image
/// encoder it has, and how an image becomes its input.
///
///     image (side x side, 3) --encoder--> embedding (64 x 64, 256) --.
///     boxes, points, mask    --prompts--> tokens, dense embedding ----+--decoder--> masks
///                                                                         (256 x 256)
///
/// LiteMedSAM (Ma et al., Segment Anything in Medical Images, 2024) and MobileSAM (Zhang et al.,
/// 2023) have a TinyViT.
///
/// The weights, packed for this machine's kernels. Immutable: any number of sessions share it.
class sam {
public:
  /// Reads and packs a model file that converters/convert.py wrote. Throws `error` naming the file
  /// and the tensor where anything in it is not as expected.
  static sam load(const std::filesystem::path& path, load_options options = {}) {
    return sam(safetensors(path), options);
  }

  /// The same from memory, which is not needed afterwards.
  static sam load(std::span<const std::byte> bytes, load_options options = {}) {
    return sam(safetensors(bytes), options);
  }

  sam(const safetensors& file, load_options options)
      : sam(file, model_config(file).reader(), options) {}

  const precision inputs;
  const image_encoder encoder;
  const sam_config config;
  const prompt_encoder prompts;
  const mask_decoder decoder;

private:
  sam(const safetensors& file, const config_reader& json, const load_options& options)
      : inputs(options.inputs),
        encoder(weights_of(file, options), json.object("image_encoder"), options.windows),
        config(sam_config::from(json, encoder)),
        prompts(weights_of(file, options), config),
        decoder(weights_of(file, options), config) {}

  static weights weights_of(const safetensors& file, const load_options& options) {
    return weights(file, options.inputs, options.hook, options.zeros, options.winograd);
  }
};

/// The name it has had as long as LiteMedSAM was the only model.
using lite_medsam = sam;

struct session_options {
  int threads = 0;  ///< 0: all that OpenMP would use
};

/// One stream of inference on a model: its memory, its threads and the image it has encoded. Not
/// for several threads at once; make a session for each.
class session {
public:
  /// `model` must outlive the session.
  explicit session(const sam& model, session_options options = {})
      : model_(model),
        ws_(options.threads, arena_floats(model), scratch_bytes(model)),
        embedding_(shape{model.encoder.embedding_size().tokens(), model.config.embed_dim}) {}

  session(session&&) = default;
  session(const session&) = delete;  // a copy's views would be of the original's memory

  const sam& model() const { return model_; }
  int threads() const { return ws_.threads(); }

  /// Sends intermediate results to `trace` from now on; null ends it. Tracing computes some of them
  /// apart and is slow.
  void set_tracer(tracer* trace) { ws_.trace = trace; }

  /// Encodes an image (image_size * image_size, 3), channels last, as `preprocess` makes it.
  void encode(view<const float> image) {
    const index_t side = model_.encoder.image_size();
    if (image.size() != side * side * 3)
      fail("encode: the image has ", image.size(), " values, expected ", side, " x ", side, " x 3");
    model_.encoder(ws_, {image.data(), {side * side, 3}}, embedding_);
    image_.reset();
  }

  /// The embedding of the last image, (tokens, embed_dim).
  view<const float> embedding() const { return embedding_; }

  /// Takes an embedding made earlier by `encode` in place of encoding.
  void set_embedding(view<const float> embedding) {
    if (embedding.size() != embedding_.size())
      fail("set_embedding: ", embedding.size(), " values, expected ",
           to_string(embedding_.extents()));
    std::copy(embedding.begin(), embedding.end(), embedding_.begin());
    image_.reset();
  }

  /// One mask per box, or three for `multimask`, decoded together: low_res_masks (boxes, masks,
  /// side, side) and iou_predictions (boxes, masks). The views hold until the next call. Allocates
  /// only where there are more boxes than in any call before.
  decoded_masks decode(std::span<const box> boxes, bool multimask = false) {
    const index_t count = static_cast<index_t>(boxes.size());
    const index_t masks = model_.decoder.masks(multimask);
    const decoded_masks out = room_for(count, masks);
    const index_t dim = model_.config.embed_dim;
    for (index_t start = 0; start < count; start += batch) {
      const index_t n = std::min(batch, count - start);
      frame memory(ws_.memory());
      const view<float> sparse = memory.take({n * prompt_encoder::box_tokens, dim});
      for (index_t i = 0; i < n; ++i)
        model_.prompts.encode(boxes[static_cast<std::size_t>(start + i)],
                              sparse.row(i * prompt_encoder::box_tokens));
      const decoded_masks part{{out.low_res_masks.row(start), {n, masks, mask_side(), mask_side()}},
                               {out.iou_predictions.row(start), {n, masks}}};
      model_.decoder(ws_, prepared(), sparse, n, multimask, part);
    }
    return out;
  }

  static constexpr index_t max_points = max_prompt_points;

  /// One prompt of points, perhaps a box and perhaps a mask (side, side) of logits from an earlier
  /// decoding; three masks for `multimask`, one otherwise.
  decoded_masks decode(std::span<const point> points, const std::optional<box>& b = std::nullopt,
                       view<const float> mask = {}, bool multimask = true) {
    const index_t count = static_cast<index_t>(points.size());
    if (count > max_points) fail("decode: ", count, " points in one prompt, at most ", max_points);
    if (mask.data() && mask.size() != mask_side() * mask_side())
      fail("decode: the mask prompt has ", mask.size(), " values, expected ", mask_side(), " x ",
           mask_side());
    const decoded_masks out = room_for(1, model_.decoder.masks(multimask));
    const index_t dim = model_.config.embed_dim;
    frame memory(ws_.memory());
    const view<float> sparse =
        memory.take({prompt_encoder::token_count(count, b.has_value()), dim});
    model_.prompts.encode(points, b, sparse.data());
    if (!mask.data()) {
      model_.decoder(ws_, prepared(), sparse, 1, multimask, out);
      return out;
    }
    const view<float> image = memory.take(embedding_.extents());
    model_.prompts.encode_mask(ws_, {mask.data(), {mask.size(), 1}}, image);
    kernels::active().add(image.size(), embedding_.data(), image.data(), image.data());
    float* room = memory.take({model_.decoder.prepared_floats()}).data();
    model_.decoder(ws_, model_.decoder.prepare(ws_, image, model_.prompts.dense_position(), room),
                   sparse, 1, multimask, out);
    return out;
  }

  index_t mask_side() const { return model_.config.mask_size(); }

private:
  /// Prompts that pass through the decoder together: enough to use its weights well, few enough to
  /// need no more memory than the encoder.
  static constexpr index_t batch = 4;

  static index_t arena_floats(const sam& model) {
    const index_t dim = model.config.embed_dim;
    const index_t tokens = model.encoder.embedding_size().tokens();
    const index_t boxes = arena::rounded(batch * prompt_encoder::box_tokens * dim) +
                          model.decoder.memory(batch, prompt_encoder::box_tokens, dim);
    const index_t clicks =
        arena::rounded((max_points + 2) * dim) + arena::rounded(tokens * dim) +
        arena::rounded(model.decoder.prepared_floats()) +
        std::max(model.prompts.memory(), model.decoder.memory(1, max_points + 2, dim));
    return std::max({model.encoder.memory(), boxes, clicks});
  }
  static std::size_t scratch_bytes(const sam& model) {
    const index_t dim = model.config.embed_dim;
    return std::max({model.encoder.scratch_bytes(),
                     model.decoder.scratch_bytes(batch, prompt_encoder::box_tokens, dim),
                     model.decoder.scratch_bytes(1, max_points + 2, dim)});
  }

  /// What the decoder makes of the embedding and of what stands for "no mask", once per image: all
  /// boxes share it.
  const shared_image& prepared() {
    if (image_) return *image_;
    if (prepared_.empty()) {
      dense_ = tensor<float>(embedding_.extents());
      prepared_ = tensor<float>(shape{model_.decoder.prepared_floats()});
    }
    const index_t dim = model_.config.embed_dim;
    for (index_t row = 0; row < embedding_.extent(0); ++row)
      kernels::active().add(dim, embedding_.row(row), model_.prompts.no_mask(), dense_.row(row));
    image_ = model_.decoder.prepare(ws_, dense_, model_.prompts.dense_position(), prepared_.data());
    return *image_;
  }

  decoded_masks room_for(index_t prompts, index_t masks) {
    const index_t floats = prompts * masks * mask_side() * mask_side();
    if (low_res_masks_.size() < floats) low_res_masks_ = tensor<float>(shape{floats});
    if (iou_predictions_.size() < prompts * masks)
      iou_predictions_ = tensor<float>(shape{prompts * masks});
    return {{low_res_masks_.data(), {prompts, masks, mask_side(), mask_side()}},
            {iou_predictions_.data(), {prompts, masks}}};
  }

  const sam& model_;
  workspace ws_;
  tensor<float> embedding_;
  tensor<float> dense_;                // embedding_ with no mask; from the first prompt on
  tensor<float> prepared_;             // likewise
  std::optional<shared_image> image_;  // views of dense_ and prepared_, once there are prompts
  tensor<float> low_res_masks_;
  tensor<float> iou_predictions_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
