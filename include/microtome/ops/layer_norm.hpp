#pragma once

#include <kernels/macros_off.hpp>

#include <string>

#include <microtome/ops/linear.hpp>

namespace microtome {

/// LayerNorm over the channels of each token; over token-major pixels that is LayerNorm2d as well.
class layer_norm {
public:
  layer_norm() = default;

  /// Reads `<name>.weight` and `<name>.bias`, both (channels).
  layer_norm(const weights& file, const std::string& name, index_t channels, float epsilon = 1e-5f)
      : gamma_(file.read(name + ".weight", {channels})),
        beta_(file.read(name + ".bias", {channels})),
        epsilon_(epsilon) {}

  index_t channels() const { return gamma_.size(); }
  const tensor<float>& beta() const { return beta_; }

  /// Serial, for use inside a task. `result` may be `x`.
  void rows(index_t count, const float* const* x, float* const* result,
            activation act = activation::none) const {
    kernels::active().layer_norm({.n = count,
                                  .c = channels(),
                                  .x = x,
                                  .out = result,
                                  .gamma = gamma_.data(),
                                  .beta = beta_.data(),
                                  .epsilon = epsilon_,
                                  .act = act});
  }

  /// Serial: `count` dense rows at x, normalised into dense rows at result.
  void rows(index_t count, const float* x, float* result, activation act = activation::none) const {
    for (index_t row = 0; row < count; row += token_block) {
      const index_t n = std::min(token_block, count - row);
      const row_pointers<const float> from(x + row * channels(), channels(), n);
      const row_pointers<float> to(result + row * channels(), channels(), n);
      rows(n, from.data(), to.data(), act);
    }
  }

  /// x and result are (n, channels); result may be x.
  void operator()(workspace& ws, view<const float> x, view<float> result,
                  activation act = activation::none) const {
    const index_t n = x.extent(0);
    ws.parallel(block_count(n), [&](index_t block, scratch) {
      const index_t row = block * token_block;
      rows(std::min(token_block, n - row), x.row(row), result.row(row), act);
    });
  }

private:
  tensor<float> gamma_;
  tensor<float> beta_;
  float epsilon_ = 0.0f;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
