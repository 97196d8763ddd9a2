#pragma once

#include <kernels/macros_off.hpp>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include <microtome/ops/layer_norm.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// Multi-head attention with separate projections, whose inner dimension may be smaller than the
/// embedding's.
class cross_attention {
public:
  cross_attention() = default;

  /// Reads `<name>.q_proj`, `.k_proj`, `.v_proj` (dim to inner) and `.out_proj` (inner to dim).
  cross_attention(const weights& file, const std::string& name, index_t dim, index_t inner,
                  index_t heads)
      : q_proj(file.of_tokens(), name + ".q_proj", dim, inner),
        k_proj(file, name + ".k_proj", dim, inner),
        v_proj(file, name + ".v_proj", dim, inner),
        out_proj(file.of_tokens(), name + ".out_proj", inner, dim),
        matrix_(&kernels::active().matrix(activations_near(q_proj.inputs()))),
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
      return spread_rows(memory, first + offset, inner(), count);
    };
    matrix_->attention({.n_q = n_q,
                        .n_k = n_k,
                        .d_k = dim,
                        .d_v = dim,
                        .q = rows(q, n_q),
                        .k = rows(k, n_k),
                        .v = rows(v, n_k),
                        .out = rows(out, n_q),
                        .scale = 1.0f / std::sqrt(static_cast<float>(dim)),
                        .scratch = memory.take<float>(matrix_->attention_scratch(n_k, dim, dim))});
  }

  std::size_t scratch_bytes(index_t n_q, index_t n_k) const {
    const index_t dim = inner() / heads_;
    return 2 * scratch::bytes_of<float*>(n_q) + 2 * scratch::bytes_of<float*>(n_k) +
           scratch::bytes_of<float>(matrix_->attention_scratch(n_k, dim, dim));
  }

  /// `count` pointers to rows of `stride` floats, in scratch memory.
  template <class T>
  static T** spread_rows(scratch& memory, T* first, index_t stride, index_t count) {
    T** pointers = memory.take<T*>(count);
    for (index_t i = 0; i < count; ++i) pointers[i] = first + i * stride;
    return pointers;
  }

  linear q_proj, k_proj, v_proj, out_proj;

private:
  const kernels::matrix_kernels* matrix_ = nullptr;
  index_t heads_ = 0;
};

/// What the transformer computes of an image once, for all prompts on it.
struct shared_image {
  view<const float> tokens;    ///< (pixels, dim): image embedding + dense prompt embedding
  view<const float> position;  ///< (pixels, dim)
  view<const float> k, v;      ///< (pixels, inner): what the first layer's tokens look at
  view<const float> q;         ///< (pixels, inner): as what the pixels look at the tokens there
};

/// The activations of a batch of prompts on one image, as they pass through the transformer.
struct two_way_state {
  const shared_image* image = nullptr;
  index_t prompts = 0;               ///< in the batch
  index_t tokens = 0;                ///< per prompt
  view<float> queries;               ///< (prompts * tokens, dim)
  view<const float> token_position;  ///< (prompts * tokens, dim): the queries as they began
  view<float> keys;  ///< (prompts * pixels, dim): the image, from the first layer on

  index_t pixels() const { return image->position.extent(0); }
  index_t dim() const { return image->position.extent(1); }

  /// queries + token_position, for a projection.
  view<float> positioned_queries(arena& memory) const {
    const view<float> sum{memory.take(queries.size()), queries.extents()};
    kernels::active().add(sum.size(), queries.data(), token_position.data(), sum.data());
    return sum;
  }
};

/// One projection of an attention, head by head, as matrices of their own. With few tokens and many
/// pixels it is cheaper to multiply the tokens with them than to project the pixels:
/// (q W_q) (x W_k)^T = (q W_q W_k^T) x^T, and sum_j p_j (x_j W_v) = (sum_j p_j x_j) W_v. Tokens are
/// few, so that their products are always in fp32.
class head_projections {
public:
  head_projections() = default;

  /// From a weight (inner, dim): `onto` the heads' features, or through them back to `dim`.
  static head_projections onto(const tensor<float>& weight, index_t heads) {
    const index_t dim = weight.extent(1), features = weight.extent(0) / heads;
    return {heads, dim, features, weight.data(), features * dim, 1, dim};
  }
  static head_projections through(const tensor<float>& weight, index_t heads) {
    const index_t dim = weight.extent(1), features = weight.extent(0) / heads;
    return {heads, features, dim, weight.data(), features * dim, dim, 1};
  }
  /// From the weight (dim, inner) of an output projection.
  static head_projections out_of(const tensor<float>& weight, index_t heads) {
    const index_t inner = weight.extent(1), features = inner / heads;
    return {heads, features, weight.extent(0), weight.data(), features, 1, inner};
  }

  /// Serial: `count` rows of x at `x_stride` become rows of result, for one head.
  void operator()(index_t head, index_t count, const float* x, index_t x_stride, float* result,
                  index_t result_stride, const float* bias = nullptr) const {
    const packed_weight& weight = weights_[static_cast<std::size_t>(head)];
    for (index_t row = 0; row < count; row += token_block) {
      const index_t n = std::min(token_block, count - row);
      const row_pointers<const float> a(x + row * x_stride, x_stride, n);
      const row_pointers<float> c(result + row * result_stride, result_stride, n);
      weight.multiply({.m = n,
                       .n = weight.width(),
                       .k = weight.depth(),
                       .a = a.data(),
                       .c = c.data(),
                       .bias = bias});
    }
  }

private:
  head_projections(index_t heads, index_t k, index_t n, const float* weight, index_t head_stride,
                   index_t row_stride, index_t column_stride) {
    for (index_t head = 0; head < heads; ++head)
      weights_.emplace_back(k, n, weight + head * head_stride, row_stride, column_stride);
  }

  std::vector<packed_weight> weights_;
};

/// queries += attention(queries + position, image + position, image), for the first layer, where
/// all prompts see one image: its keys and values are in shared_image.
class shared_image_attention {
public:
  shared_image_attention(const weights& file, const std::string& name, index_t dim, index_t inner,
                         index_t heads)
      : attention_(file, name, dim, inner, heads) {}

  /// Serial: k and v of `count` pixels.
  void project(index_t count, const float* const* positioned, const float* const* tokens,
               float* const* k, float* const* v) const {
    attention_.k_proj.rows(count, positioned, k);
    attention_.v_proj.rows(count, tokens, v);
  }

  void operator()(workspace& ws, two_way_state& s) const {
    frame memory(ws.memory());
    const index_t n = s.prompts * s.tokens;
    const view<float> positioned = s.positioned_queries(ws.memory());
    const view<float> q = memory.take({n, attention_.inner()});
    const view<float> attended = memory.take(q.extents());
    attention_.q_proj(ws, positioned, q);
    ws.parallel(attention_.heads(), [&](index_t head, scratch local) {
      attention_.attend(head, n, q.data(), s.pixels(), s.image->k.data(), s.image->v.data(),
                        attended.data(), local);
    });
    attention_.out_proj(ws, attended, s.queries, activation::none, s.queries.data());
  }

  index_t memory(index_t prompts, index_t tokens, index_t, index_t dim) const {
    const index_t n = prompts * tokens;
    return arena::rounded(n * dim) + 2 * arena::rounded(n * attention_.inner());
  }
  std::size_t scratch_bytes(index_t prompts, index_t tokens, index_t pixels, index_t dim) const {
    return std::max(attention_.scratch_bytes(prompts * tokens, pixels),
                    scratch::bytes_of<float>(token_block * dim));
  }

private:
  cross_attention attention_;
};

/// queries += attention(queries + position, keys + position, keys): tokens look at each prompt's
/// own image. The pixels are not projected: see head_projections. (The key projection's bias adds
/// the same to all scores of a query and so has no effect; weights sum to one, so the value
/// projection's is added once.) Pixels are taken in chunks, whose results are weighted by their
/// shares of the softmax's sum.
class token_to_image_attention {
public:
  token_to_image_attention() = default;
  token_to_image_attention(const weights& file, const std::string& name, index_t dim, index_t inner,
                           index_t heads)
      : heads_(heads),
        q_proj_(file.of_tokens(), name + ".q_proj", dim, inner),
        matrix_(&kernels::active().matrix(activations_near(q_proj_.inputs()))),
        fold_keys_(head_projections::through(file.folded(name + ".k_proj", {inner, dim}), heads)),
        project_values_(head_projections::onto(file.folded(name + ".v_proj", {inner, dim}), heads)),
        value_bias_(file.read(name + ".v_proj.bias", {inner})),
        out_proj_(file.of_tokens(), name + ".out_proj", inner, dim) {}

  void operator()(workspace& ws, two_way_state& s) const {
    frame memory(ws.memory());
    const index_t n = s.prompts * s.tokens;
    const view<float> positioned = s.positioned_queries(ws.memory());
    const view<float> q = memory.take({n, q_proj_.out()});
    const view<float> attended = memory.take(q.extents());
    const view<float> folded = memory.take({n, heads_, s.dim()});
    q_proj_(ws, positioned, q);
    const index_t features = q_proj_.out() / heads_;
    ws.parallel(heads_, [&](index_t head, scratch) {
      fold_keys_(head, n, q.data() + head * features, q_proj_.out(), folded.data() + head * s.dim(),
                 heads_ * s.dim());
    });
    look(ws, s, folded);
    ws.parallel(heads_, [&](index_t head, scratch) {
      project_values_(head, n, folded.data() + head * s.dim(), heads_ * s.dim(),
                      attended.data() + head * features, q_proj_.out(),
                      value_bias_.data() + head * features);
    });
    out_proj_(ws, attended, s.queries, activation::none, s.queries.data());
  }

  index_t inner() const { return q_proj_.out(); }

  index_t memory(index_t prompts, index_t tokens, index_t pixels, index_t dim) const {
    const index_t n = prompts * tokens;
    const index_t parts = prompts * chunks(pixels);
    return arena::rounded(n * dim) + 2 * arena::rounded(n * q_proj_.out()) +
           arena::rounded(n * heads_ * dim) + arena::rounded(parts * tokens * heads_ * dim) +
           arena::rounded(parts * tokens * heads_);
  }
  std::size_t scratch_bytes(index_t, index_t tokens, index_t, index_t dim) const {
    return scratch::bytes_of<float>(chunk * dim) + 2 * scratch::bytes_of<float*>(chunk) +
           2 * scratch::bytes_of<float*>(tokens * heads_) +
           scratch::bytes_of<float>(matrix_->attention_scratch(chunk, dim, dim));
  }

private:
  /// Pixels whose keys and values, packed, lie in L2 together.
  static constexpr index_t chunk = 128;
  static index_t chunks(index_t pixels) { return (pixels + chunk - 1) / chunk; }

  /// Replaces every query (prompts * tokens, heads, dim) by the mean of the pixels it looks at.
  void look(workspace& ws, const two_way_state& s, view<float> queries) const {
    frame memory(ws.memory());
    const index_t parts = chunks(s.pixels());
    const index_t rows = s.tokens * heads_;  // of one prompt
    const view<float> partial = memory.take({s.prompts * parts, rows, s.dim()});
    const view<float> lse = memory.take({s.prompts * parts, rows});
    ws.parallel(s.prompts * parts, [&](index_t task, scratch local) {
      look_at_chunk(s, queries.row(task / parts * s.tokens), task / parts, task % parts * chunk,
                    partial.row(task), lse.row(task), local);
    });
    ws.parallel(s.prompts * rows, [&](index_t task, scratch) {
      const index_t first = task / rows * parts, row = task % rows;
      float greatest = lse.row(first)[row];
      for (index_t i = 1; i < parts; ++i) greatest = std::max(greatest, lse.row(first + i)[row]);
      float* out = queries.data() + task * s.dim();
      std::fill_n(out, s.dim(), 0.0f);
      float sum = 0.0f;
      for (index_t i = 0; i < parts; ++i) {
        // In double, so that C libraries agree when it is rounded.
        const auto share =
            static_cast<float>(std::exp(double{lse.row(first + i)[row]} - double{greatest}));
        kernels::active().add_scaled(s.dim(), share, partial.row(first + i) + row * s.dim(), out);
        sum += share;
      }
      for (index_t j = 0; j < s.dim(); ++j) out[j] /= sum;
    });
  }

  void look_at_chunk(const two_way_state& s, const float* queries, index_t prompt, index_t pixel,
                     float* out, float* lse, scratch memory) const {
    const index_t count = std::min(chunk, s.pixels() - pixel);
    const index_t rows = s.tokens * heads_;
    const float* tokens = s.keys.row(prompt * s.pixels() + pixel);
    float* positioned = memory.take<float>(chunk * s.dim());
    kernels::active().add(count * s.dim(), tokens, s.image->position.row(pixel), positioned);
    const auto spread = [&]<class T>(T* first, index_t n) {
      return cross_attention::spread_rows(memory, first, s.dim(), n);
    };
    matrix_->attention(
        {.n_q = rows,
         .n_k = count,
         .d_k = s.dim(),
         .d_v = s.dim(),
         .q = spread(queries, rows),
         .k = spread(static_cast<const float*>(positioned), count),
         .v = spread(tokens, count),
         .out = spread(out, rows),
         .scale = 1.0f / std::sqrt(static_cast<float>(q_proj_.out() / heads_)),
         .scratch = memory.take<float>(matrix_->attention_scratch(chunk, s.dim(), s.dim())),
         .lse = lse});
  }

  index_t heads_ = 0;
  linear q_proj_;
  const kernels::matrix_kernels* matrix_ = nullptr;
  head_projections fold_keys_, project_values_;
  tensor<float> value_bias_;
  linear out_proj_;
};

/// keys = norm(keys + attention(keys + position, queries + position, queries)): the image looks at
/// the tokens. The query and output projections are folded into the few keys and values (see
/// head_projections), so that a block of pixels passes through one small matrix into scores, a
/// softmax over the tokens, another small matrix, residual and norm while it is in L2.
class image_to_token_attention {
public:
  image_to_token_attention() = default;

  /// In the first layer the pixels' queries come from shared_image.
  image_to_token_attention(const weights& file, const std::string& name, const std::string& norm,
                           index_t dim, index_t inner, index_t heads, float epsilon, bool first)
      : heads_(heads),
        k_proj_(file.of_tokens(), name + ".k_proj", dim, inner),
        v_proj_(file.of_tokens(), name + ".v_proj", dim, inner),
        matrix_(&kernels::active().matrix(activations_near(k_proj_.inputs()))),
        fold_values_(
            head_projections::out_of(file.folded(name + ".out_proj", {dim, inner}), heads)),
        out_bias_(file.read(name + ".out_proj.bias", {dim})),
        norm_(file, norm, dim, epsilon) {
    if (first) {
      q_proj_.emplace(file, name + ".q_proj", dim, inner);
    } else {
      fold_keys_ = head_projections::through(file.folded(name + ".q_proj", {inner, dim}), heads);
      query_bias_ = file.read(name + ".q_proj.bias", {inner});
    }
  }

  /// Serial, first layer only: the queries of `count` pixels.
  void project(index_t count, const float* const* positioned, float* const* q) const {
    q_proj_->rows(count, positioned, q);
  }

  void operator()(workspace& ws, two_way_state& s) const {
    frame memory(ws.memory());
    const index_t n = s.prompts * s.tokens;
    const view<float> positioned = s.positioned_queries(ws.memory());
    const view<float> k = memory.take({n, inner()});
    const view<float> v = memory.take({n, inner()});
    k_proj_(ws, positioned, k);
    v_proj_(ws, s.queries, v);
    const index_t scores = s.tokens * heads_, depth = q_proj_ ? inner() : s.dim();
    const view<float> into = memory.take({s.prompts, packed_floats(depth, scores)});
    const view<float> out_of = memory.take({s.prompts, packed_floats(scores, s.dim())});
    const view<float> bias = memory.take({s.prompts, scores});
    const view<float> rows = memory.take({s.prompts, scores, std::max(depth, s.dim())});
    ws.parallel(s.prompts, [&](index_t prompt, scratch) {
      const index_t token = prompt * s.tokens;
      fold_keys(s.tokens, depth, k.row(token), rows.row(prompt), bias.row(prompt));
      matrix_->pack_b(depth, scores, rows.row(prompt), 1, depth, nullptr, into.row(prompt));
      for (index_t head = 0; head < heads_; ++head)
        fold_values_(head, s.tokens, v.row(token) + head * features(), inner(),
                     rows.row(prompt) + head * s.dim(), heads_ * s.dim());
      matrix_->pack_b(scores, s.dim(), rows.row(prompt), s.dim(), 1, nullptr, out_of.row(prompt));
    });

    const index_t blocks = block_count(s.pixels());
    ws.parallel(s.prompts * blocks, [&](index_t task, scratch local) {
      const index_t prompt = task / blocks;
      update_block(s, prompt, task % blocks * token_block, into.row(prompt), out_of.row(prompt),
                   bias.row(prompt), local);
    });
  }

  index_t memory(index_t prompts, index_t tokens, index_t dim) const {
    const index_t n = prompts * tokens;
    const index_t scores = tokens * heads_, depth = q_proj_ ? inner() : dim;
    return arena::rounded(n * dim) + 2 * arena::rounded(n * inner()) +
           arena::rounded(prompts * packed_floats(depth, scores)) +
           arena::rounded(prompts * packed_floats(scores, dim)) + arena::rounded(prompts * scores) +
           arena::rounded(prompts * scores * std::max(depth, dim));
  }
  std::size_t scratch_bytes(index_t tokens, index_t dim) const {
    return scratch::bytes_of<float>(token_block * dim) +
           scratch::bytes_of<float>(token_block * tokens * heads_);
  }

private:
  index_t inner() const { return k_proj_.out(); }
  index_t features() const { return inner() / heads_; }
  index_t packed_floats(index_t k, index_t n) const {
    return (matrix_->packed_bytes(k, n) + 3) / static_cast<index_t>(sizeof(float));
  }

  /// What a pixel's query is multiplied with, row (token, head) of `depth` floats, and a bias.
  void fold_keys(index_t tokens, index_t depth, float* k, float* rows, float* bias) const {
    const float scale = 1.0f / std::sqrt(static_cast<float>(features()));
    for (index_t i = 0; i < tokens * inner(); ++i) k[i] *= scale;
    if (q_proj_) {  // the queries are there: each head's key among zeros
      std::fill_n(rows, tokens * heads_ * depth, 0.0f);
      std::fill_n(bias, tokens * heads_, 0.0f);
      for (index_t i = 0; i < tokens * heads_; ++i)
        std::copy_n(k + i * features(), features(), rows + i * depth + i % heads_ * features());
      return;
    }
    for (index_t head = 0; head < heads_; ++head)
      fold_keys_(head, tokens, k + head * features(), inner(), rows + head * depth, heads_ * depth);
    for (index_t i = 0; i < tokens * heads_; ++i) {
      bias[i] = 0.0f;
      for (index_t j = 0; j < features(); ++j)
        bias[i] =
            std::fma(k[i * features() + j], query_bias_[i % heads_ * features() + j], bias[i]);
    }
  }

  void update_block(const two_way_state& s, index_t prompt, index_t pixel, const float* into,
                    const float* out_of, const float* bias, scratch memory) const {
    const kernels::table& kernel = kernels::active();
    const index_t count = std::min(token_block, s.pixels() - pixel);
    const index_t scores = s.tokens * heads_;
    float* positioned = memory.take<float>(token_block * s.dim());
    float* attended = memory.take<float>(token_block * scores);
    float* keys = s.keys.row(prompt * s.pixels() + pixel);
    const float* tokens = q_proj_ ? s.image->tokens.row(pixel) : keys;
    if (!q_proj_) kernel.add(count * s.dim(), tokens, s.image->position.row(pixel), positioned);

    const index_t depth = q_proj_ ? inner() : s.dim();
    const row_pointers<const float> in(q_proj_ ? s.image->q.row(pixel) : positioned, depth, count);
    const row_pointers<float> score_rows(attended, scores, count);
    matrix_->gemm({.m = count,
                   .n = scores,
                   .k = depth,
                   .a = in.data(),
                   .b = into,
                   .c = score_rows.data(),
                   .bias = bias});
    kernel.softmax_columns(count, s.tokens, heads_, attended);
    const row_pointers<const float> residual(tokens, s.dim(), count);
    const row_pointers<float> out(keys, s.dim(), count);
    matrix_->gemm({.m = count,
                   .n = s.dim(),
                   .k = scores,
                   .a = score_rows.data(),
                   .b = out_of,
                   .c = out.data(),
                   .bias = out_bias_.data(),
                   .residual = residual.data()});
    norm_.rows(count, out.data(), out.data());
  }

  index_t heads_ = 0;
  std::optional<linear> q_proj_;  // first layer only, which has no use for the next two
  head_projections fold_keys_;
  tensor<float> query_bias_;
  linear k_proj_, v_proj_;
  const kernels::matrix_kernels* matrix_ = nullptr;
  head_projections fold_values_;
  tensor<float> out_bias_;
  layer_norm norm_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
