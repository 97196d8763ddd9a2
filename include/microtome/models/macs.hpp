#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>

#include <microtome/model_file/config.hpp>

namespace microtome {

namespace detail {

/// Multiply-adds of queries with keys and of weights with values over all windows of a map whose
/// windows at the right and bottom borders are partial.
inline index_t window_attention_macs(index_t side, index_t window, index_t dim) {
  index_t pairs_along = 0;  // sum over windows of their extent squared, along one axis
  for (index_t start = 0; start < side; start += window) {
    const index_t extent = std::min(window, side - start);
    pairs_along += extent * extent;
  }
  return 2 * pairs_along * pairs_along * dim;
}

}  // namespace detail

/// Multiply-adds of the image encoder that have to be done: convolutions, linear layers and
/// attention on the tokens that exist, without padding. Twice as many FLOPs.
inline index_t encoder_macs(const lite_medsam_config& config) {
  index_t side = config.image_size;
  const index_t first = config.stages[0].dim;
  index_t total = side * side * (config.pixel_channels * (first / 2) + first / 2 * first);
  for (std::size_t i = 0; i < config.stages.size(); ++i) {
    const stage_config& stage = config.stages[i];
    const index_t tokens = side * side, dim = stage.dim;
    if (stage.blocks == stage_config::kind::conv) {
      const index_t hidden = dim * stage.expand;
      total += stage.depth * tokens * (2 * dim * hidden + 9 * hidden);
    } else {
      const index_t linear = 4 * dim * dim + 2 * dim * dim * stage.mlp_ratio;
      total += stage.depth * (tokens * (linear + 9 * dim) +
                              detail::window_attention_macs(side, stage.window, dim));
    }
    if (i + 1 < config.stages.size()) {
      const index_t next = config.stages[i + 1].dim;
      side = (side - 1) / stage.stride + 1;
      total += tokens * dim * next + side * side * (9 * next + next * next);
    }
  }
  const index_t last = config.stages.back().dim, embed = config.embed_dim;
  return total + side * side * (last * embed + 9 * embed * embed);
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
