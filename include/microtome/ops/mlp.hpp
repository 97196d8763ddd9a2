#pragma once

#include <kernels/macros_off.hpp>

#include <string>

#include <microtome/ops/layer_norm.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// x + fc2(gelu(fc1(norm(x)))), block of tokens by block of tokens: the hidden rows (four times as
/// wide) stay in L2.
class mlp {
public:
  mlp() = default;

  /// Reads `<name>.norm`, `<name>.fc1` and `<name>.fc2`.
  mlp(const weights& file, const std::string& name, index_t dim, index_t hidden)
      : norm_(file, name + ".norm", dim),
        fc1_(file.of_rows(block_rows(max_rows, hidden)), name + ".fc1", dim, hidden),
        fc2_(file.of_rows(block_rows(max_rows, hidden)), name + ".fc2", hidden, dim) {}

  std::size_t scratch_bytes(index_t count) const {
    const index_t most = block_rows(count, fc1_.out());
    return scratch::bytes_of<float>(most * fc1_.in()) + scratch::bytes_of<float>(most * fc1_.out());
  }

  /// Serial: `count` dense rows of x become dense rows of result, which may be x. Without
  /// `shortcut` x is not added.
  void rows(index_t count, const float* x, float* result, scratch memory,
            bool shortcut = true) const {
    const index_t dim = fc1_.in();
    const index_t hidden = fc1_.out();
    const index_t n = blocks(count, hidden), most = block_rows(count, hidden);
    float* normed = memory.take<float>(most * dim);
    float* expanded = memory.take<float>(most * hidden);
    for (index_t block = 0; block < n; ++block) {
      const index_t row = count * block / n, size = count * (block + 1) / n - row;
      const row_pointers<const float> in(x + row * dim, dim, size);
      const row_pointers<float> a(normed, dim, size), b(expanded, hidden, size);
      const row_pointers<float> out(result + row * dim, dim, size);
      norm_.rows(size, in.data(), a.data());
      fc1_.rows(size, a.data(), b.data(), activation::gelu);
      fc2_.rows(size, b.data(), out.data(), activation::none, shortcut ? in.data() : nullptr);
    }
  }

private:
  /// Blocks of nearly equal size whose hidden rows take at most 336 KiB each.
  static index_t blocks(index_t count, index_t hidden) {
    const index_t fit = 336 * 1024 / static_cast<index_t>(sizeof(float)) / hidden;
    const index_t most = std::clamp<index_t>(fit, 1, max_rows);
    return (count + most - 1) / most;
  }
  /// Rows of the largest.
  static index_t block_rows(index_t count, index_t hidden) {
    const index_t n = blocks(count, hidden);
    return (count + n - 1) / n;
  }

  layer_norm norm_;
  linear fc1_;
  linear fc2_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
