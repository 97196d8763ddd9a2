#pragma once

#include <kernels/macros_off.hpp>

#include <string>
#include <vector>

#include <microtome/models/two_way_transformer.hpp>
#include <microtome/ops/convolution.hpp>

namespace microtome {

/// A few fully connected layers with ReLU between them, over a handful of tokens.
class token_mlp {
public:
  /// Reads `<name>.layers.0` to `<name>.layers.<depth - 1>`.
  token_mlp(const weights& file, const std::string& name, index_t in, index_t hidden, index_t out,
            index_t depth) {
    for (index_t i = 0; i < depth; ++i)
      layers.emplace_back(file.of_tokens(), name + ".layers." + std::to_string(i),
                          i == 0 ? in : hidden, i + 1 == depth ? out : hidden);
  }

  /// x is (n, in), result is (n, out).
  void operator()(workspace& ws, view<const float> x, view<float> result) const {
    frame memory(ws.memory());
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const bool last = i + 1 == layers.size();
      const view<float> y = last ? result : memory.take({x.extent(0), layers[i].out()});
      layers[i](ws, x, y, last ? activation::none : activation::relu);
      x = y;
    }
  }

  index_t memory(index_t n) const {
    index_t floats = 0;
    for (const linear& layer : layers) floats += arena::rounded(n * layer.out());
    return floats;
  }

  std::vector<linear> layers;
};

/// What the mask decoder says of a batch of prompts.
struct decoded_masks {
  view<float> low_res_masks;    ///< (prompts, masks, side * side), logits
  view<float> iou_predictions;  ///< (prompts, masks)
};

/// SAM's mask decoder: the two-way transformer over output and prompt tokens, upscaling of the
/// image tokens by four, and a small network per mask token that turns it into a 1x1 filter on
/// them.
class mask_decoder {
  inline static const std::string name_ = "mask_decoder";

public:
  mask_decoder(const weights& file, const sam_config& config)
      : transformer(file, name_ + ".transformer", config),
        upscale1(file, name_ + ".output_upscaling.0", config.embed_dim, config.embed_dim / 4),
        upscale_norm(file, name_ + ".output_upscaling.1", config.embed_dim / 4, 1e-6f),
        upscale2(file, name_ + ".output_upscaling.3", config.embed_dim / 4, config.embed_dim / 8),
        iou_head(file, name_ + ".iou_prediction_head", config.embed_dim, config.decoder.iou_hidden,
                 config.decoder.multimask_outputs + 1, config.decoder.iou_depth),
        mask_tokens_(config.decoder.multimask_outputs + 1),
        side_(config.embedding_size) {
    const index_t dim = config.embed_dim;
    output_tokens_ = tensor<float>(shape{mask_tokens_ + 1, dim});
    const tensor<float> iou = file.read(name_ + ".iou_token.weight", {1, dim});
    const tensor<float> masks = file.read(name_ + ".mask_tokens.weight", {mask_tokens_, dim});
    std::copy(iou.begin(), iou.end(), output_tokens_.row(0));
    std::copy(masks.begin(), masks.end(), output_tokens_.row(1));
    for (index_t i = 0; i < mask_tokens_; ++i)
      hypernetworks.emplace_back(file, name_ + ".output_hypernetworks_mlps." + std::to_string(i),
                                 dim, dim, dim / 8, 3);
  }

  /// Tokens of a prompt in the transformer: IoU, masks, then those of the prompt encoder.
  index_t tokens(index_t prompt_tokens) const { return output_tokens_.extent(0) + prompt_tokens; }
  /// Masks per prompt.
  index_t masks(bool multimask) const { return multimask ? mask_tokens_ - 1 : 1; }

  /// Floats of what `prepare` makes of an image.
  index_t prepared_floats() const { return 3 * side_ * side_ * transformer.inner(); }

  /// Computes in `memory` (prepared_floats()) what all prompts on an image share.
  ///
  /// image        (side * side, dim): image embedding + dense prompt embedding
  /// position     (side * side, dim)
  shared_image prepare(workspace& ws, view<const float> image, view<const float> position,
                       float* memory) const {
    const shape extents{side_ * side_, transformer.inner()};
    const view<float> k{memory, extents}, v{k.end(), extents}, q{v.end(), extents};
    transformer.prepare(ws, image, position, k, v, q);
    return {image, position, k, v, q};
  }

  /// Decodes `prompts` prompts of `prompt_tokens` tokens each on one image, which `prepare` has
  /// seen.
  ///
  /// sparse       (prompts * prompt_tokens, dim)
  /// result       for `multimask` all masks but the first, otherwise only the first
  void operator()(workspace& ws, const shared_image& image, view<const float> sparse,
                  index_t prompts, bool multimask, const decoded_masks& result) const {
    const index_t dim = image.tokens.extent(1);
    const index_t prompt_tokens = sparse.size() / (prompts * dim);
    const index_t pixels = image.tokens.extent(0);
    frame memory(ws.memory());
    two_way_state s;
    s.image = &image;
    s.prompts = prompts;
    s.tokens = tokens(prompt_tokens);
    s.queries = memory.take({prompts * s.tokens, dim});
    const view<float> first_queries = memory.take(s.queries.extents());
    s.keys = memory.take({prompts * pixels, dim});
    for (index_t p = 0; p < prompts; ++p) {
      float* row =
          std::copy(output_tokens_.begin(), output_tokens_.end(), s.queries.row(p * s.tokens));
      std::copy_n(sparse.data() + p * prompt_tokens * dim, prompt_tokens * dim, row);
    }
    std::copy(s.queries.begin(), s.queries.end(), first_queries.begin());
    s.token_position = first_queries;

    transformer(ws, s);
    ws.record("mask_decoder.transformer.queries", s.queries, layout::tokens);
    ws.record("mask_decoder.transformer.keys", s.keys, layout::tokens);
    predict_masks(ws, s, multimask, result.low_res_masks);
    predict_iou(ws, s, multimask, result.iou_predictions);
  }

  /// Arena floats for a batch.
  index_t memory(index_t prompts, index_t prompt_tokens, index_t dim) const {
    const index_t n = prompts * tokens(prompt_tokens);
    const index_t pixels = side_ * side_;
    return 2 * arena::rounded(n * dim) + arena::rounded(prompts * pixels * dim) +
           std::max(transformer.memory(prompts, tokens(prompt_tokens), pixels, dim),
                    heads_memory(prompts, dim));
  }

  std::size_t scratch_bytes(index_t prompts, index_t prompt_tokens, index_t dim) const {
    return std::max(transformer.scratch_bytes(prompts, tokens(prompt_tokens), side_ * side_, dim),
                    upscale_scratch());
  }

  two_way_transformer transformer;
  transposed_convolution2x2 upscale1;
  layer_norm upscale_norm;
  transposed_convolution2x2 upscale2;
  std::vector<token_mlp> hypernetworks;
  token_mlp iou_head;

private:
  index_t filter() const { return upscale2.out(); }  // channels of the upscaled image
  /// The filters that make masks are products in fp32: what they sum is the result.
  static const kernels::matrix_kernels& filters_matrix() {
    return kernels::active().matrix(precision::fp32);
  }
  index_t panel_floats() const {
    return filters_matrix().packed_bytes(filter(), mask_tokens_) /
           static_cast<index_t>(sizeof(float));
  }

  index_t heads_memory(index_t prompts, index_t dim) const {
    return arena::rounded(prompts * dim) +
           std::max(arena::rounded(prompts * mask_tokens_ * filter()) +
                        arena::rounded(prompts * panel_floats()) + hypernetworks[0].memory(prompts),
                    arena::rounded(prompts * mask_tokens_) + iou_head.memory(prompts));
  }

  std::size_t upscale_scratch() const {
    return scratch::bytes_of<float>(4 * side_ * upscale1.out()) +
           scratch::bytes_of<float>(16 * side_ * filter()) +
           scratch::bytes_of<float>(16 * side_ * mask_tokens_);
  }

  /// Token `index` of every prompt, gathered: (prompts, dim).
  static void gather_token(const two_way_state& s, index_t token, view<float> out) {
    for (index_t p = 0; p < s.prompts; ++p)
      std::copy_n(s.queries.row(p * s.tokens + token), s.dim(), out.row(p));
  }

  void predict_masks(workspace& ws, const two_way_state& s, bool multimask, view<float> out) const {
    frame memory(ws.memory());
    const index_t first = multimask ? 1 : 0;
    const index_t count = masks(multimask);
    const view<float> token = memory.take({s.prompts, s.dim()});
    const view<float> filters = memory.take({count, s.prompts, filter()});
    for (index_t m = 0; m < count; ++m) {
      gather_token(s, 1 + first + m, token);
      hypernetworks[static_cast<std::size_t>(first + m)](ws, token,
                                                         {filters.row(m), {s.prompts, filter()}});
    }
    const view<float> panels = memory.take({s.prompts, panel_floats()});
    for (index_t p = 0; p < s.prompts; ++p)
      filters_matrix().pack_b(filter(), count, filters.data() + p * filter(), 1,
                              s.prompts * filter(), nullptr, panels.row(p));
    // Row y of the image tokens becomes rows 4y to 4y + 3 of the masks, all of it in L2.
    ws.parallel(s.prompts * side_, [&](index_t task, scratch local) {
      const index_t p = task / side_;
      const index_t y = task % side_;
      upscale_row(s.keys.row((p * side_ + y) * side_), panels.row(p), count,
                  out.data() + p * count * 16 * side_ * side_ + y * 16 * side_, local);
    });
  }

  /// x is `side` image tokens. Mask m's four rows go to out + m * (4 side)^2.
  void upscale_row(const float* x, const float* panel, index_t count, float* out,
                   scratch memory) const {
    const index_t width = 2 * side_;
    float* half = memory.take<float>(2 * width * upscale1.out());
    float* full = memory.take<float>(8 * width * filter());
    float* logits = memory.take<float>(8 * width * count);
    upscale1.row(side_, x, half, half + width * upscale1.out());
    upscale_norm.rows(2 * width, half, half, activation::gelu);
    const index_t full_row = 2 * width * filter();
    for (index_t i = 0; i < 2; ++i)
      upscale2.row(width, half + i * width * upscale1.out(), full + 2 * i * full_row,
                   full + (2 * i + 1) * full_row, activation::gelu);

    const index_t pixels = 8 * width;
    for (index_t start = 0; start < pixels; start += token_block) {
      const index_t n = std::min(token_block, pixels - start);
      const row_pointers<const float> a(full + start * filter(), filter(), n);
      const row_pointers<float> c(logits + start * count, count, n);
      filters_matrix().gemm(
          {.m = n, .n = count, .k = filter(), .a = a.data(), .b = panel, .c = c.data()});
    }
    for (index_t m = 0; m < count; ++m)
      for (index_t i = 0; i < pixels; ++i) out[m * 16 * side_ * side_ + i] = logits[i * count + m];
  }

  void predict_iou(workspace& ws, const two_way_state& s, bool multimask, view<float> out) const {
    frame memory(ws.memory());
    const view<float> token = memory.take({s.prompts, s.dim()});
    const view<float> all = memory.take({s.prompts, mask_tokens_});
    gather_token(s, 0, token);
    iou_head(ws, token, all);
    for (index_t p = 0; p < s.prompts; ++p)
      std::copy_n(all.row(p) + (multimask ? 1 : 0), masks(multimask), out.row(p));
  }

  index_t mask_tokens_;
  index_t side_;
  tensor<float> output_tokens_;  // (1 + masks, dim): the IoU token, then the mask tokens
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
