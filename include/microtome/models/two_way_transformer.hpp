#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <microtome/models/sam_config.hpp>
#include <microtome/models/two_way_attention.hpp>

namespace microtome {

/// One layer of SAM's two-way transformer: self-attention of the tokens, tokens to image, MLP,
/// image to tokens; LayerNorm after each.
class two_way_layer {
public:
  /// The first layer has no position encoding and no residual in its self-attention: its queries
  /// are their own position encoding.
  two_way_layer(const weights& file, const std::string& name, const sam_config& config, bool first)
      : first_(first) {
    const index_t dim = config.embed_dim;
    const index_t heads = config.decoder.heads;
    const index_t inner = dim / config.decoder.attention_downsample;
    const float epsilon = config.decoder.norm_epsilon;
    self_attention = cross_attention(file.of_tokens(), name + ".self_attn", dim, dim, heads);
    norm1 = layer_norm(file, name + ".norm1", dim, epsilon);
    const std::string to_image = name + ".cross_attn_token_to_image";
    if (first)
      look_at_shared_image.emplace(file, to_image, dim, inner, heads);
    else
      token_to_image.emplace(file, to_image, dim, inner, heads);
    norm2 = layer_norm(file, name + ".norm2", dim, epsilon);
    lin1 = linear(file.of_tokens(), name + ".mlp.lin1", dim, config.decoder.mlp_dim);
    lin2 = linear(file.of_tokens(), name + ".mlp.lin2", config.decoder.mlp_dim, dim);
    norm3 = layer_norm(file, name + ".norm3", dim, epsilon);
    image_to_token = image_to_token_attention(file, name + ".cross_attn_image_to_token",
                                              name + ".norm4", dim, inner, heads, epsilon, first);
  }

  void operator()(workspace& ws, two_way_state& s) const {
    attend_to_self(ws, s);
    norm1(ws, s.queries, s.queries);
    look_at_shared_image ? (*look_at_shared_image)(ws, s) : (*token_to_image)(ws, s);
    norm2(ws, s.queries, s.queries);
    feed_forward(ws, s);
    norm3(ws, s.queries, s.queries);
    image_to_token(ws, s);
  }

  index_t memory(index_t prompts, index_t tokens, index_t pixels, index_t dim) const {
    const index_t n = prompts * tokens;
    const index_t looking = look_at_shared_image
                                ? look_at_shared_image->memory(prompts, tokens, pixels, dim)
                                : token_to_image->memory(prompts, tokens, pixels, dim);
    return std::max({5 * arena::rounded(n * dim), arena::rounded(n * lin1.out()), looking,
                     image_to_token.memory(prompts, tokens, dim)});
  }
  std::size_t scratch_bytes(index_t prompts, index_t tokens, index_t pixels, index_t dim) const {
    const std::size_t looking =
        look_at_shared_image ? look_at_shared_image->scratch_bytes(prompts, tokens, pixels, dim)
                             : token_to_image->scratch_bytes(prompts, tokens, pixels, dim);
    return std::max({self_attention.scratch_bytes(tokens, tokens), looking,
                     image_to_token.scratch_bytes(tokens, dim)});
  }

  cross_attention self_attention;
  layer_norm norm1;
  std::optional<shared_image_attention> look_at_shared_image;  // in the first layer
  std::optional<token_to_image_attention> token_to_image;      // in the others
  layer_norm norm2;
  linear lin1, lin2;
  layer_norm norm3;
  image_to_token_attention image_to_token;

private:
  void attend_to_self(workspace& ws, two_way_state& s) const {
    frame memory(ws.memory());
    const shape extents = s.queries.extents();
    const view<float> q = memory.take(extents);
    const view<float> k = memory.take(extents);
    const view<float> v = memory.take(extents);
    const view<float> attended = memory.take(extents);
    const view<const float> positioned = first_ ? s.queries : s.positioned_queries(ws.memory());
    self_attention.q_proj(ws, positioned, q);
    self_attention.k_proj(ws, positioned, k);
    self_attention.v_proj(ws, s.queries, v);
    ws.parallel(s.prompts * self_attention.heads(), [&](index_t task, scratch local) {
      const index_t row = task / self_attention.heads() * s.tokens;
      self_attention.attend(task % self_attention.heads(), s.tokens, q.row(row), s.tokens,
                            k.row(row), v.row(row), attended.row(row), local);
    });
    self_attention.out_proj(ws, attended, s.queries, activation::none,
                            first_ ? nullptr : s.queries.data());
  }

  void feed_forward(workspace& ws, two_way_state& s) const {
    frame memory(ws.memory());
    const view<float> hidden = memory.take({s.queries.extent(0), lin1.out()});
    lin1(ws, s.queries, hidden, activation::relu);
    lin2(ws, hidden, s.queries, activation::none, s.queries.data());
  }

  bool first_;
};

/// SAM's two-way transformer: its layers, then a last look of the tokens at the image.
class two_way_transformer {
public:
  two_way_transformer(const weights& file, const std::string& name, const sam_config& config) {
    for (index_t i = 0; i < config.decoder.depth; ++i)
      layers.emplace_back(file, name + ".layers." + std::to_string(i), config, i == 0);
    final_attention = token_to_image_attention(
        file, name + ".final_attn_token_to_image", config.embed_dim,
        config.embed_dim / config.decoder.attention_downsample, config.decoder.heads);
    final_norm =
        layer_norm(file, name + ".norm_final_attn", config.embed_dim, config.decoder.norm_epsilon);
  }

  index_t inner() const { return final_attention.inner(); }

  /// What can be said of an image before any prompt: k, v and q (pixels, inner) of shared_image.
  void prepare(workspace& ws, view<const float> tokens, view<const float> position, view<float> k,
               view<float> v, view<float> q) const {
    const index_t pixels = tokens.extent(0), dim = tokens.extent(1);
    ws.parallel(block_count(pixels), [&](index_t block, scratch memory) {
      const index_t row = block * token_block;
      const index_t count = std::min(token_block, pixels - row);
      float* positioned = memory.take<float>(token_block * dim);
      kernels::active().add(count * dim, tokens.row(row), position.row(row), positioned);
      const row_pointers<const float> with_position(positioned, dim, count);
      const row_pointers<const float> without(tokens.row(row), dim, count);
      const row_pointers<float> k_rows(k.row(row), inner(), count);
      const row_pointers<float> v_rows(v.row(row), inner(), count);
      const row_pointers<float> q_rows(q.row(row), inner(), count);
      layers[0].look_at_shared_image->project(count, with_position.data(), without.data(),
                                              k_rows.data(), v_rows.data());
      layers[0].image_to_token.project(count, with_position.data(), q_rows.data());
    });
  }

  /// Updates s.queries and makes s.keys.
  void operator()(workspace& ws, two_way_state& s) const {
    for (const two_way_layer& layer : layers) layer(ws, s);
    final_attention(ws, s);
    final_norm(ws, s.queries, s.queries);
  }

  index_t memory(index_t prompts, index_t tokens, index_t pixels, index_t dim) const {
    index_t floats = final_attention.memory(prompts, tokens, pixels, dim);
    for (const two_way_layer& layer : layers)
      floats = std::max(floats, layer.memory(prompts, tokens, pixels, dim));
    return floats;
  }
  std::size_t scratch_bytes(index_t prompts, index_t tokens, index_t pixels, index_t dim) const {
    std::size_t bytes = final_attention.scratch_bytes(prompts, tokens, pixels, dim);
    for (const two_way_layer& layer : layers)
      bytes = std::max(bytes, layer.scratch_bytes(prompts, tokens, pixels, dim));
    return bytes;
  }

  std::vector<two_way_layer> layers;
  token_to_image_attention final_attention;
  layer_norm final_norm;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
