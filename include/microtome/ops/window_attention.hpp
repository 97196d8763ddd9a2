#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <microtome/ops/depthwise.hpp>
#include <microtome/ops/layer_norm.hpp>
#include <microtome/ops/linear.hpp>
#include <microtome/ops/padding.hpp>

namespace microtome {

/// Multi-head attention within non-overlapping windows, with learned relative position biases
/// (Wu et al., TinyViT, 2022): LayerNorm, QKV, attention, projection, residual.
///
/// Windows are never padded. TinyViT pads the map with zero tokens *before* the LayerNorm, which
/// maps them to its beta, so all of them carry one key k0 and one value v0. Their sum in the
/// softmax of query i is
///
///     sum over padded p of exp(s q_i.k0 + b(i, p)) = exp(s q_i.k0 + c_i),
///     c_i = log sum over padded p of exp(b(i, p)),
///
/// so a window of r x c tokens attends to its r c keys and one virtual key (k0, v0) with bias c_i.
///
/// A task takes a window, or as many small ones as make a block of tokens, through all of it: rows
/// of x are read where they lie, q, k and v stay in L2, and the result is added to x in place,
/// since no other window reads these rows.
class window_attention {
public:
  window_attention() = default;

  /// Reads `<name>.norm`, `<name>.qkv`, `<name>.proj` and `<name>.attention_biases`
  /// (heads, window * window) for a map of the given size.
  window_attention(const weights& file, const std::string& name, map_size size, index_t dim,
                   index_t heads, index_t window, padding mode)
      : name_(name),
        size_(size),
        heads_(heads),
        window_(window),
        norm_(file, name + ".norm", dim),
        qkv_(file, name + ".qkv", dim, 3 * dim),
        matrix_(&kernels::active().matrix(activations_near(qkv_.inputs()))),
        project_(file, name + ".proj", dim, dim) {
    const tensor<float> biases = file.read(name + ".attention_biases", {heads, window * window});
    if (mode == padding::exact) find_virtual_key();
    if (mode == padding::padded) zeros_ = tensor<float>(shape{dim});
    plan_windows(biases);
  }

  const std::string& name() const { return name_; }

  std::size_t scratch_bytes() const {
    std::size_t bytes = 0;
    for (const window_group& group : groups_) {
      const index_t n = group.count() * shapes_[group.shape].tokens();
      const index_t keys = shapes_[group.shape].keys;
      bytes = std::max(
          bytes,
          4 * scratch::bytes_of<float*>(n) + 4 * scratch::bytes_of<float*>(keys) +
              scratch::bytes_of<float>(n * dim()) + scratch::bytes_of<float>(n * 3 * dim()) +
              scratch::bytes_of<float>(zeros_.size()) +
              scratch::bytes_of<float>(matrix_->attention_scratch(keys, head_dim(), head_dim())));
    }
    return bytes;
  }

  /// x (tokens, dim) += attention(x).
  void operator()(workspace& ws, view<float> x) const {
    if (ws.tracing(name_)) {
      tensor<float> attended(x.extents());
      attend(ws, x, attended, false);
      ws.record(name_, attended, layout::tokens);
    }
    attend(ws, x, x, true);
  }

private:
  /// Tokens that small windows are gathered to: two windows of 7 x 7.
  static constexpr index_t group_tokens = 98;

  /// The windows of one shape (rows x columns) share their biases.
  struct window_shape {
    index_t tokens() const { return rows * columns; }

    index_t rows, columns;
    index_t keys;          ///< rows * columns, and one more where there is a virtual key
    index_t stride;        ///< floats from one query's biases to the next
    tensor<float> biases;  ///< (heads, rows * columns, stride); -infinity beyond `keys`
  };
  /// Windows of one shape that a task takes.
  struct window_group {
    std::size_t shape;
    std::vector<std::array<index_t, 2>> places;  ///< y and x of the windows' first tokens

    index_t count() const { return static_cast<index_t>(places.size()); }
  };

  index_t dim() const { return project_.out(); }
  index_t head_dim() const { return dim() / heads_; }
  bool is_partial(index_t rows, index_t columns) const {
    return rows < window_ || columns < window_;
  }

  /// k0 and v0: the QKV layer applied to the LayerNorm's beta, as it would be in a padded map.
  void find_virtual_key() {
    virtual_qkv_ = tensor<float>(shape{3 * dim()});
    const float* beta = norm_.beta().data();
    float* qkv = virtual_qkv_.data();
    qkv_.rows(1, &beta, &qkv);
  }

  void plan_windows(const tensor<float>& biases) {
    for (index_t y = 0; y < size_.height; y += window_)
      for (index_t x = 0; x < size_.width; x += window_) {
        const bool whole = !zeros_.empty();
        const index_t rows = whole ? window_ : std::min(window_, size_.height - y);
        const index_t columns = whole ? window_ : std::min(window_, size_.width - x);
        std::size_t s = 0;
        while (s < shapes_.size() && (shapes_[s].rows != rows || shapes_[s].columns != columns))
          ++s;
        if (s == shapes_.size()) shapes_.push_back(expand_biases(biases, rows, columns));
        const index_t tokens = shapes_[s].tokens();
        const auto open = std::find_if(groups_.begin(), groups_.end(), [&](const window_group& g) {
          return g.shape == s && (g.count() + 1) * tokens <= group_tokens;
        });
        window_group& group =
            open != groups_.end() ? *open : groups_.emplace_back(window_group{s, {}});
        group.places.push_back({y, x});
      }
    // Large ones first: the small ones then even out what threads have to do.
    std::stable_sort(
        groups_.begin(), groups_.end(), [&](const window_group& a, const window_group& b) {
          return a.count() * shapes_[a.shape].tokens() > b.count() * shapes_[b.shape].tokens();
        });
  }

  window_shape expand_biases(const tensor<float>& biases, index_t rows, index_t columns) const {
    const bool has_virtual = !virtual_qkv_.empty() && is_partial(rows, columns);
    const index_t queries = rows * columns;
    const index_t keys = queries + (has_virtual ? 1 : 0);
    const index_t stride = kernels::active().attention_columns(keys);
    window_shape s{rows, columns, keys, stride, tensor<float>(shape{heads_, queries, stride})};
    for (index_t head = 0; head < heads_; ++head) {
      // The bias depends on the distance alone: entry |dy| * window + |dx|.
      const auto bias = [&](index_t query, index_t y, index_t x) {
        const index_t dy = std::abs(query / columns - y);
        const index_t dx = std::abs(query % columns - x);
        return biases[head * window_ * window_ + dy * window_ + dx];
      };
      for (index_t query = 0; query < queries; ++query) {
        float* out = s.biases.data() + (head * queries + query) * stride;
        std::fill_n(out, stride, -std::numeric_limits<float>::infinity());
        double padded = 0.0;
        for (index_t y = 0; y < window_; ++y)
          for (index_t x = 0; x < window_; ++x) {
            if (y < rows && x < columns)
              out[y * columns + x] = bias(query, y, x);
            else
              padded += std::exp(static_cast<double>(bias(query, y, x)));
          }
        if (has_virtual) out[queries] = static_cast<float>(std::log(padded));
      }
    }
    return s;
  }

  /// result = attention(x), and x more for `residual`.
  void attend(workspace& ws, view<const float> x, view<float> result, bool residual) const {
    ws.parallel(static_cast<index_t>(groups_.size()), [&](index_t task, scratch memory) {
      const window_group& group = groups_[static_cast<std::size_t>(task)];
      const window_shape& shape = shapes_[group.shape];
      const index_t n = group.count() * shape.tokens();
      const float** from = memory.take<const float*>(n);
      float** to = memory.take<float*>(n);
      float** normed = memory.take<float*>(n);
      float** qkv = memory.take<float*>(n);
      float* features = memory.take<float>(n * dim());
      float* projected = memory.take<float>(n * 3 * dim());
      float* discarded = memory.take<float>(zeros_.size());
      for (index_t i = 0; i < n; ++i) {
        const auto [top, left] = group.places[static_cast<std::size_t>(i / shape.tokens())];
        const index_t y = top + i % shape.tokens() / shape.columns;
        const index_t column = left + i % shape.tokens() % shape.columns;
        const bool exists = y < size_.height && column < size_.width;
        from[i] = exists ? x.row(y * size_.width + column) : zeros_.data();
        to[i] = exists ? result.row(y * size_.width + column) : discarded;
        normed[i] = features + i * dim();
        qkv[i] = projected + i * 3 * dim();
      }
      norm_.rows(n, from, normed);
      qkv_.rows(n, normed, qkv);
      for (index_t w = 0; w < group.count(); ++w)
        attend_in_window(shape, qkv + w * shape.tokens(), normed + w * shape.tokens(), memory);
      project_.rows(n, normed, to, activation::none, residual ? from : nullptr);
    });
  }

  /// Each token's qkv holds, head after head, q, k and v of head_dim floats.
  void attend_in_window(const window_shape& shape, const float* const* qkv, float* const* attended,
                        scratch memory) const {
    const index_t tokens = shape.tokens();
    const float** q = memory.take<const float*>(shape.keys);
    const float** k = memory.take<const float*>(shape.keys);
    const float** v = memory.take<const float*>(shape.keys);
    float** out = memory.take<float*>(shape.keys);
    float* room =
        memory.take<float>(matrix_->attention_scratch(shape.keys, head_dim(), head_dim()));
    for (index_t head = 0; head < heads_; ++head) {
      const index_t first = head * 3 * head_dim();
      for (index_t i = 0; i < shape.keys; ++i) {
        q[i] = (i < tokens ? qkv[i] : virtual_qkv_.data()) + first;
        k[i] = q[i] + head_dim();
        v[i] = k[i] + head_dim();
        if (i < tokens) out[i] = attended[i] + head * head_dim();
      }
      matrix_->attention({.n_q = tokens,
                          .n_k = shape.keys,
                          .d_k = head_dim(),
                          .d_v = head_dim(),
                          .q = q,
                          .k = k,
                          .v = v,
                          .out = out,
                          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim())),
                          .bias = shape.biases.data() + head * tokens * shape.stride,
                          .bias_stride = shape.stride,
                          .scratch = room});
    }
  }

  std::string name_;
  map_size size_;
  index_t heads_ = 0;
  index_t window_ = 0;
  layer_norm norm_;
  linear qkv_;
  const kernels::matrix_kernels* matrix_ = nullptr;
  linear project_;
  tensor<float> virtual_qkv_;  // padding::exact: q, k, v per head of a padded token
  tensor<float> zeros_;        // padding::padded: a padded token
  std::vector<window_shape> shapes_;
  std::vector<window_group> groups_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
