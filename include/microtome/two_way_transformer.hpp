#pragma once

#include <cmath>
#include <string>
#include <vector>

#include <microtome/config.hpp>
#include <microtome/ops/layer_norm.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// Multi-head attention with separate projections, whose inner dimension may be smaller than the
/// embedding's.
class cross_attention {
public:
  cross_attention() = default;

  /// Reads `<name>.q_proj`, `.k_proj`, `.v_proj` (dim to inner) and `.out_proj` (inner to dim).
  cross_attention(const safetensors& file, const std::string& name, index_t dim, index_t inner,
                  index_t heads)
      : q_proj(file, name + ".q_proj", dim, inner),
        k_proj(file, name + ".k_proj", dim, inner),
        v_proj(file, name + ".v_proj", dim, inner),
        out_proj(file, name + ".out_proj", inner, dim),
        heads_(heads) {}

  index_t heads() const { return heads_; }
  index_t inner() const { return q_proj.out(); }

  /// Serial: head `head` of n_q dense query rows against n_k dense key and value rows, all of
  /// `inner` floats.
  void attend(index_t head, index_t n_q, const float* q, index_t n_k, const float* k,
              const float* v, float* out, scratch memory) const {
    const index_t dim = inner() / heads_;
    const index_t offset = head * dim;
    const auto rows = [&](auto* first, index_t count) {
      auto** pointers = memory.take<decltype(first)>(count);
      for (index_t i = 0; i < count; ++i) pointers[i] = first + i * inner() + offset;
      return pointers;
    };
    kernels::active().attention(
        {.n_q = n_q,
         .n_k = n_k,
         .d_k = dim,
         .d_v = dim,
         .q = rows(q, n_q),
         .k = rows(k, n_k),
         .v = rows(v, n_k),
         .out = rows(out, n_q),
         .scale = 1.0f / std::sqrt(static_cast<float>(dim)),
         .scratch = memory.take<float>(kernels::active().attention_scratch(n_k, dim, dim))});
  }

  std::size_t scratch_bytes(index_t n_q, index_t n_k) const {
    const index_t dim = inner() / heads_;
    return 2 * scratch::bytes_of<float*>(n_q) + 2 * scratch::bytes_of<float*>(n_k) +
           scratch::bytes_of<float>(kernels::active().attention_scratch(n_k, dim, dim));
  }

  linear q_proj, k_proj, v_proj, out_proj;

private:
  index_t heads_ = 0;
};

/// The activations of a batch of prompts on one image, as they pass through the transformer.
struct two_way_state {
  index_t prompts = 0;                 ///< in the batch
  index_t tokens = 0;                  ///< per prompt
  view<float> queries;                 ///< (prompts * tokens, dim)
  view<const float> token_position;    ///< (prompts * tokens, dim): the queries as they began
  view<float> keys;                    ///< (prompts * pixels, dim), once a layer has written it
  const float* shared_keys = nullptr;  ///< (pixels, dim): what all prompts see before that
  view<const float> pixel_position;    ///< (pixels, dim)
  view<float> k, v;                    ///< (prompts * pixels, inner): keys and values of the pixels

  index_t pixels() const { return pixel_position.extent(0); }
  index_t dim() const { return pixel_position.extent(1); }
  /// Copies of the image tokens: one as long as the prompts still share them.
  index_t images() const { return shared_keys ? 1 : prompts; }
  const float* image_tokens(index_t prompt) const {
    return shared_keys ? shared_keys : keys.data() + prompt * pixels() * dim();
  }
};

/// queries += attention(queries + position, keys + position, keys): tokens look at the image.
class token_to_image_attention {
public:
  token_to_image_attention() = default;
  token_to_image_attention(const safetensors& file, const std::string& name, index_t dim,
                           index_t inner, index_t heads)
      : attention_(file, name, dim, inner, heads) {}

  index_t inner() const { return attention_.inner(); }

  void operator()(workspace& ws, two_way_state& s) const {
    project_image(ws, s);
    frame memory(ws.memory());
    const index_t n = s.prompts * s.tokens;
    const index_t inner = attention_.inner();
    const view<float> positioned = memory.take({n, s.dim()});
    const view<float> q = memory.take({n, inner});
    const view<float> attended = memory.take({n, inner});
    kernels::active().add(n * s.dim(), s.queries.data(), s.token_position.data(),
                          positioned.data());
    attention_.q_proj(ws, positioned, q);
    ws.parallel(s.prompts * attention_.heads(), [&](index_t task, scratch local) {
      const index_t prompt = task / attention_.heads();
      const index_t image = s.images() == 1 ? 0 : prompt * s.pixels() * inner;
      const index_t token = prompt * s.tokens * inner;
      attention_.attend(task % attention_.heads(), s.tokens, q.data() + token, s.pixels(),
                        s.k.data() + image, s.v.data() + image, attended.data() + token, local);
    });
    attention_.out_proj(ws, attended, s.queries, activation::none, s.queries.data());
  }

  index_t memory(index_t tokens, index_t dim) const {
    return arena::rounded(tokens * dim) + 2 * arena::rounded(tokens * attention_.inner());
  }
  std::size_t scratch_bytes(index_t tokens, index_t pixels, index_t dim) const {
    return std::max(attention_.scratch_bytes(tokens, pixels),
                    scratch::bytes_of<float>(token_block * dim));
  }

private:
  /// k and v of every image token; computed once for all prompts while they share the image.
  void project_image(workspace& ws, two_way_state& s) const {
    const index_t blocks = block_count(s.pixels());
    const index_t inner = attention_.inner();
    ws.parallel(s.images() * blocks, [&](index_t task, scratch memory) {
      const index_t image = task / blocks;
      const index_t row = task % blocks * token_block;
      const index_t count = std::min(token_block, s.pixels() - row);
      const float* tokens = s.image_tokens(image) + row * s.dim();
      float* positioned = memory.take<float>(token_block * s.dim());
      kernels::active().add(count * s.dim(), tokens, s.pixel_position.row(row), positioned);
      const index_t out = (image * s.pixels() + row) * inner;
      const row_pointers<const float> k_in(positioned, s.dim(), count);
      const row_pointers<const float> v_in(tokens, s.dim(), count);
      const row_pointers<float> k_out(s.k.data() + out, inner, count);
      const row_pointers<float> v_out(s.v.data() + out, inner, count);
      attention_.k_proj.rows(count, k_in.data(), k_out.data());
      attention_.v_proj.rows(count, v_in.data(), v_out.data());
    });
  }

  cross_attention attention_;
};

/// keys = norm(keys + attention(keys + position, queries + position, queries)): the image looks at
/// the tokens. Fused by blocks of image tokens: query projection, all heads, output projection,
/// residual and norm pass over a block while it is in L2.
class image_to_token_attention {
public:
  image_to_token_attention() = default;
  image_to_token_attention(const safetensors& file, const std::string& name,
                           const std::string& norm, index_t dim, index_t inner, index_t heads)
      : attention_(file, name, dim, inner, heads), norm_(file, norm, dim) {}

  void operator()(workspace& ws, two_way_state& s) const {
    frame memory(ws.memory());
    const index_t n = s.prompts * s.tokens;
    const index_t inner = attention_.inner();
    const view<float> positioned = memory.take({n, s.dim()});
    const view<float> k = memory.take({n, inner});
    const view<float> v = memory.take({n, inner});
    kernels::active().add(n * s.dim(), s.queries.data(), s.token_position.data(),
                          positioned.data());
    attention_.k_proj(ws, positioned, k);
    attention_.v_proj(ws, s.queries, v);

    const index_t blocks = block_count(s.pixels());
    ws.parallel(s.prompts * blocks, [&](index_t task, scratch local) {
      const index_t prompt = task / blocks;
      const index_t row = task % blocks * token_block;
      const index_t token = prompt * s.tokens * inner;
      update_block(s, prompt, row, std::min(token_block, s.pixels() - row), k.data() + token,
                   v.data() + token, local);
    });
    s.shared_keys = nullptr;
  }

  index_t memory(index_t tokens, index_t dim) const {
    return arena::rounded(tokens * dim) + 2 * arena::rounded(tokens * attention_.inner());
  }
  std::size_t scratch_bytes(index_t tokens, index_t dim) const {
    return scratch::bytes_of<float>(token_block * dim) +
           2 * scratch::bytes_of<float>(token_block * attention_.inner()) +
           attention_.scratch_bytes(token_block, tokens);
  }

private:
  void update_block(const two_way_state& s, index_t prompt, index_t row, index_t count,
                    const float* k, const float* v, scratch memory) const {
    const float* tokens = s.image_tokens(prompt) + row * s.dim();
    const index_t inner = attention_.inner();
    float* positioned = memory.take<float>(token_block * s.dim());
    float* q = memory.take<float>(token_block * inner);
    float* attended = memory.take<float>(token_block * inner);
    kernels::active().add(count * s.dim(), tokens, s.pixel_position.row(row), positioned);

    const row_pointers<const float> in(positioned, s.dim(), count);
    const row_pointers<float> q_rows(q, inner, count);
    attention_.q_proj.rows(count, in.data(), q_rows.data());
    for (index_t head = 0; head < attention_.heads(); ++head)
      attention_.attend(head, count, q, s.tokens, k, v, attended, memory);

    const row_pointers<const float> from(attended, inner, count);
    const row_pointers<const float> residual(tokens, s.dim(), count);
    const row_pointers<float> out(s.keys.data() + (prompt * s.pixels() + row) * s.dim(), s.dim(),
                                  count);
    attention_.out_proj.rows(count, from.data(), out.data(), activation::none, residual.data());
    norm_.rows(count, out.data(), out.data());
  }

  cross_attention attention_;
  layer_norm norm_;
};

/// One layer of SAM's two-way transformer: self-attention of the tokens, tokens to image, MLP,
/// image to tokens; LayerNorm after each.
class two_way_layer {
public:
  /// The first layer has no position encoding and no residual in its self-attention: its queries
  /// are their own position encoding.
  two_way_layer(const safetensors& file, const std::string& name, const lite_medsam_config& config,
                bool first)
      : first_(first) {
    const index_t dim = config.embed_dim;
    const index_t heads = config.decoder.heads;
    const index_t inner = dim / config.decoder.attention_downsample;
    self_attention = cross_attention(file, name + ".self_attn", dim, dim, heads);
    norm1 = layer_norm(file, name + ".norm1", dim);
    token_to_image =
        token_to_image_attention(file, name + ".cross_attn_token_to_image", dim, inner, heads);
    norm2 = layer_norm(file, name + ".norm2", dim);
    lin1 = linear(file, name + ".mlp.lin1", dim, config.decoder.mlp_dim);
    lin2 = linear(file, name + ".mlp.lin2", config.decoder.mlp_dim, dim);
    norm3 = layer_norm(file, name + ".norm3", dim);
    image_to_token = image_to_token_attention(file, name + ".cross_attn_image_to_token",
                                              name + ".norm4", dim, inner, heads);
  }

  void operator()(workspace& ws, two_way_state& s) const {
    attend_to_self(ws, s);
    norm1(ws, s.queries, s.queries);
    token_to_image(ws, s);
    norm2(ws, s.queries, s.queries);
    feed_forward(ws, s);
    norm3(ws, s.queries, s.queries);
    image_to_token(ws, s);
  }

  index_t memory(index_t tokens, index_t dim) const {
    return std::max({5 * arena::rounded(tokens * dim), arena::rounded(tokens * lin1.out()),
                     token_to_image.memory(tokens, dim), image_to_token.memory(tokens, dim)});
  }
  std::size_t scratch_bytes(index_t tokens, index_t pixels, index_t dim) const {
    return std::max({self_attention.scratch_bytes(tokens, tokens),
                     token_to_image.scratch_bytes(tokens, pixels, dim),
                     image_to_token.scratch_bytes(tokens, dim)});
  }

  cross_attention self_attention;
  layer_norm norm1;
  token_to_image_attention token_to_image;
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
    view<const float> positioned = s.queries;
    if (!first_) {
      const view<float> sum = memory.take(extents);
      kernels::active().add(sum.size(), s.queries.data(), s.token_position.data(), sum.data());
      positioned = sum;
    }
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
  two_way_transformer(const safetensors& file, const std::string& name,
                      const lite_medsam_config& config) {
    for (index_t i = 0; i < config.decoder.depth; ++i)
      layers.emplace_back(file, name + ".layers." + std::to_string(i), config, i == 0);
    final_attention = token_to_image_attention(
        file, name + ".final_attn_token_to_image", config.embed_dim,
        config.embed_dim / config.decoder.attention_downsample, config.decoder.heads);
    final_norm = layer_norm(file, name + ".norm_final_attn", config.embed_dim);
  }

  /// Updates s.queries and s.keys.
  void operator()(workspace& ws, two_way_state& s) const {
    for (const two_way_layer& layer : layers) layer(ws, s);
    final_attention(ws, s);
    final_norm(ws, s.queries, s.queries);
  }

  index_t memory(index_t tokens, index_t dim) const {
    return std::max(layers[0].memory(tokens, dim), final_attention.memory(tokens, dim));
  }
  std::size_t scratch_bytes(index_t tokens, index_t pixels, index_t dim) const {
    return std::max(layers[0].scratch_bytes(tokens, pixels, dim),
                    final_attention.scratch_bytes(tokens, pixels, dim));
  }

  std::vector<two_way_layer> layers;
  token_to_image_attention final_attention;
  layer_norm final_norm;
};

}  // namespace microtome
