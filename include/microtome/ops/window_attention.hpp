#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <microtome/ops/depthwise.hpp>
#include <microtome/ops/layer_norm.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// What the windows at the right and bottom borders of a map do about the tokens they lack.
enum class padding {
  exact,   ///< as if the map were padded with zeros to whole windows, as TinyViT is trained
  dropped  ///< attend among the tokens that exist, as nested tensors do
};

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
        matrix_(&kernels::active().matrix(file.inputs())),
        norm_(file, name + ".norm", dim),
        qkv_(file, name + ".qkv", dim, 3 * dim),
        project_(file, name + ".proj", dim, dim) {
    const tensor<float> biases = file.read(name + ".attention_biases", {heads, window * window});
    if (mode == padding::exact) find_virtual_key();
    plan_windows(biases);
  }

  const std::string& name() const { return name_; }

  /// Arena floats: the qkv of every token.
  index_t memory() const { return arena::rounded(size_.tokens() * 3 * dim()); }

  std::size_t scratch_bytes() const {
    const index_t keys = window_ * window_ + 1;
    return std::max(
        scratch::bytes_of<float>(matrix_->attention_scratch(keys, head_dim(), head_dim())),
        scratch::bytes_of<float>(token_block * dim()));
  }

  /// x (tokens, dim) += attention(x), with `attended` (tokens, dim) as working memory.
  void operator()(workspace& ws, view<float> x, view<float> attended) const {
    frame memory(ws.memory());
    const view<float> qkv = memory.take({size_.tokens(), 3 * dim()});
    normalise_and_project(ws, x, qkv);
    attend(ws, qkv, attended);
    if (ws.tracing(name_)) {
      tensor<float> projected(x.extents());
      project_(ws, attended, projected);
      ws.record(name_, projected, layout::tokens);
    }
    project_(ws, attended, x, activation::none, x.data());
  }

private:
  /// The windows of one shape (rows x columns) share their biases.
  struct window_shape {
    index_t rows, columns;
    index_t keys;          ///< rows * columns, and one more where there is a virtual key
    index_t stride;        ///< floats from one query's biases to the next
    tensor<float> biases;  ///< (heads, rows * columns, stride); -infinity beyond `keys`
  };
  struct window_place {
    index_t y, x;
    std::size_t shape;
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
        const index_t rows = std::min(window_, size_.height - y);
        const index_t columns = std::min(window_, size_.width - x);
        std::size_t s = 0;
        while (s < shapes_.size() && (shapes_[s].rows != rows || shapes_[s].columns != columns))
          ++s;
        if (s == shapes_.size()) shapes_.push_back(expand_biases(biases, rows, columns));
        places_.push_back({y, x, s});
      }
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

  void normalise_and_project(workspace& ws, view<const float> x, view<float> qkv) const {
    ws.parallel(block_count(size_.tokens()), [&](index_t block, scratch memory) {
      float* normed = memory.take<float>(token_block * dim());
      const index_t row = block * token_block;
      const index_t count = std::min(token_block, size_.tokens() - row);
      norm_.rows(count, x.row(row), normed);
      const row_pointers<const float> from(normed, dim(), count);
      const row_pointers<float> to(qkv.row(row), 3 * dim(), count);
      qkv_.rows(count, from.data(), to.data());
    });
  }

  /// Each token's qkv holds, head after head, q, k and v of head_dim floats.
  void attend(workspace& ws, view<const float> qkv, view<float> attended) const {
    const index_t windows = static_cast<index_t>(places_.size());
    ws.parallel(windows * heads_, [&](index_t task, scratch memory) {
      // Head by head over all windows: the biases of a head stay in the cache.
      const window_place& place = places_[static_cast<std::size_t>(task % windows)];
      const index_t head = task / windows;
      const window_shape& s = shapes_[place.shape];
      std::array<const float*, max_keys> q, k, v;
      std::array<float*, max_keys> out;
      std::size_t n = 0;
      for (index_t y = 0; y < s.rows; ++y)
        for (index_t x = 0; x < s.columns; ++x, ++n) {
          const index_t token = (place.y + y) * size_.width + place.x + x;
          q[n] = qkv.row(token) + head * 3 * head_dim();
          k[n] = q[n] + head_dim();
          v[n] = k[n] + head_dim();
          out[n] = attended.row(token) + head * head_dim();
        }
      if (s.keys > s.rows * s.columns) {
        k[n] = virtual_qkv_.data() + head * 3 * head_dim() + head_dim();
        v[n] = k[n] + head_dim();
      }
      matrix_->attention({.n_q = s.rows * s.columns,
                          .n_k = s.keys,
                          .d_k = head_dim(),
                          .d_v = head_dim(),
                          .q = q.data(),
                          .k = k.data(),
                          .v = v.data(),
                          .out = out.data(),
                          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim())),
                          .bias = s.biases.data() + head * s.rows * s.columns * s.stride,
                          .bias_stride = s.stride,
                          .scratch = memory.take<float>(
                              matrix_->attention_scratch(s.keys, head_dim(), head_dim()))});
    });
  }

public:
  /// The largest window that `attend` has room for on its stack.
  static constexpr index_t max_window = 32;

private:
  static constexpr index_t max_keys = max_window * max_window + 1;

  std::string name_;
  map_size size_;
  index_t heads_ = 0;
  index_t window_ = 0;
  const kernels::matrix_kernels* matrix_ = nullptr;
  layer_norm norm_;
  linear qkv_;
  linear project_;
  tensor<float> virtual_qkv_;  // q, k, v per head of the zero-padded token; empty: padding dropped
  std::vector<window_shape> shapes_;
  std::vector<window_place> places_;
};

}  // namespace microtome
