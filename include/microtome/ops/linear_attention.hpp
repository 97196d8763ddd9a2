#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <string>

#include <microtome/ops/depthwise.hpp>
#include <microtome/ops/grouped_linear.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// EfficientViT's multi-scale linear attention (Cai et al., 2023), added to its input: all
/// positions attend to all others, through ReLU in place of softmax, in time linear in their
/// number.
///
///     x (tokens, c) --1x1--> q, k, v (3 c) --depthwise, grouped 1x1--> coarser q, k, v (3 c)
///     heads of both: ReLU linear attention (2 c) --1x1--> x + ...
///
/// A head's q, k and v lie side by side.
class linear_attention {
public:
  linear_attention() = default;

  /// Reads `<name>.qkv.conv`, `.aggreg.0.0` (depthwise, `side` x `side`), `.aggreg.0.1` and
  /// `.proj.conv`, the last with its BatchNorm folded.
  linear_attention(const weights& file, const std::string& name, index_t channels, index_t head,
                   index_t side)
      : name_(name),
        head_(head),
        qkv(linear::pointwise(file, name + ".qkv.conv", channels, 3 * channels, false)),
        gather(file, name + ".aggreg.0.0", 3 * channels, 1, side, false),
        mix(file, name + ".aggreg.0.1", 3 * channels / head, head),
        proj(linear::pointwise(file, name + ".proj.conv", 2 * channels, channels)) {}

  index_t channels() const { return qkv.in(); }

  /// x (size.tokens(), channels) becomes x + attention(x).
  void operator()(workspace& ws, map_size size, view<float> x) const {
    const index_t tokens = size.tokens(), wide = qkv.out();
    frame memory(ws.memory());
    const view<float> fine = memory.take({tokens, wide}), coarse = memory.take({tokens, wide});
    const view<float> attended = memory.take({tokens, proj.in()});
    qkv(ws, x, fine);
    ws.parallel(size.height, [&](index_t y, scratch local) {
      float* gathered = local.take<float>(size.width * wide);
      gather.rows(size, fine, y, 1, gathered, local);
      for (index_t start = 0; start < size.width; start += token_block)
        mix.rows(std::min(token_block, size.width - start), gathered + start * wide,
                 coarse.row(y * size.width + start));
    });
    const index_t heads = wide / (3 * head_);
    ws.parallel(2 * heads, [&](index_t task, scratch local) {
      const view<float>& from = task < heads ? fine : coarse;
      const auto** rows = local.take<const float*>(tokens);
      auto** out = local.take<float*>(tokens);
      for (index_t i = 0; i < tokens; ++i) {
        rows[i] = from.row(i) + task % heads * 3 * head_;
        out[i] = attended.row(i) + task * head_;
      }
      kernels::active().linear_attention({.n = tokens,
                                          .d = head_,
                                          .qkv = rows,
                                          .out = out,
                                          .epsilon = 1e-15f,
                                          .scratch = local.take<float>(head_ * (head_ + 1))});
    });
    if (ws.trace) record_parts(ws, size, fine, coarse, attended);
    proj(ws, attended, x, activation::none, x.data());
  }

  index_t memory(map_size size) const {
    return 2 * arena::rounded(size.tokens() * qkv.out()) +
           arena::rounded(size.tokens() * proj.in());
  }
  std::size_t scratch_bytes(map_size size) const {
    return std::max(scratch::bytes_of<float>(size.width * qkv.out()) +
                        scratch::bytes_of<float>(gather.ring_floats(size.width)),
                    2 * scratch::bytes_of<float*>(size.tokens()) +
                        scratch::bytes_of<float>(head_ * (head_ + 1)));
  }
  /// Multiply-adds on a map of this size.
  index_t macs(map_size size) const {
    const index_t wide = qkv.out();
    const index_t products = 2 * wide / 3 * (2 * head_ + 2);
    return size.tokens() * (channels() * wide + gather.side() * gather.side() * wide + mix.macs() +
                            products + proj.in() * channels());
  }

private:
  void record_parts(workspace& ws, map_size size, view<float> fine, view<float> coarse,
                    view<float> attended) const {
    ws.record(name_ + ".qkv", fine, layout::pixels, size.width);
    if (ws.tracing(name_ + ".aggreg.0.0")) {
      tensor<float> gathered(fine.extents());
      gather(size, fine, gathered);
      ws.record(name_ + ".aggreg.0.0", gathered, layout::pixels, size.width);
    }
    ws.record(name_ + ".aggreg.0", coarse, layout::pixels, size.width);
    ws.record(name_ + ".attention", attended, layout::pixels, size.width);
    if (ws.tracing(name_ + ".proj")) {
      tensor<float> projected(shape{size.tokens(), channels()});
      proj(ws, attended, projected);
      ws.record(name_ + ".proj", projected, layout::pixels, size.width);
    }
  }

  std::string name_;
  index_t head_ = 0;  // channels of one

public:
  linear qkv;
  depthwise_convolution gather;
  grouped_linear mix;
  linear proj;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
