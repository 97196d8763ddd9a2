#pragma once

#include <string>

#include <microtome/ops/layer_norm.hpp>
#include <microtome/ops/linear.hpp>

namespace microtome {

/// result = x + fc2(gelu(fc1(norm(x)))), block of tokens by block of tokens: the hidden rows (four
/// times as wide) stay in L2.
class mlp {
public:
  mlp() = default;

  /// Reads `<name>.norm`, `<name>.fc1` and `<name>.fc2`.
  mlp(const weights& file, const std::string& name, index_t dim, index_t hidden)
      : name_(name),
        norm_(file, name + ".norm", dim),
        fc1_(file, name + ".fc1", dim, hidden),
        fc2_(file, name + ".fc2", hidden, dim) {}

  std::size_t scratch_bytes() const {
    return scratch::bytes_of<float>(block() * fc1_.in()) +
           scratch::bytes_of<float>(block() * fc1_.out());
  }

  /// x and result are (tokens, dim); result may be x.
  void operator()(workspace& ws, view<const float> x, view<float> result) const {
    if (ws.tracing(name_)) record_output(ws, x);
    const index_t tokens = x.extent(0);
    const index_t dim = fc1_.in();
    const index_t hidden = fc1_.out();
    ws.parallel((tokens + block() - 1) / block(), [&](index_t task, scratch memory) {
      const index_t row = task * block();
      const index_t count = std::min(block(), tokens - row);
      float* normed = memory.take<float>(block() * dim);
      float* expanded = memory.take<float>(block() * hidden);
      norm_.rows(count, x.row(row), normed);
      const row_pointers<const float> a(normed, dim, count);
      const row_pointers<float> b(expanded, hidden, count);
      const row_pointers<const float> residual(x.row(row), dim, count);
      const row_pointers<float> c(result.row(row), dim, count);
      fc1_.rows(count, a.data(), b.data(), activation::gelu);
      fc2_.rows(count, b.data(), c.data(), activation::none, residual.data());
    });
  }

private:
  /// Tokens per task: fewer where the hidden rows are wide, so that they take about 256 KiB.
  index_t block() const { return fc1_.out() > 720 ? token_block / 2 : token_block; }

  void record_output(workspace& ws, view<const float> x) const {
    tensor<float> normed(x.extents());
    tensor<float> hidden(shape{x.extent(0), fc1_.out()});
    norm_(ws, x, normed);
    fc1_(ws, normed, hidden, activation::gelu);
    fc2_(ws, hidden, normed);
    ws.record(name_, normed, layout::tokens);
  }

  std::string name_;
  layer_norm norm_;
  linear fc1_;
  linear fc2_;
};

}  // namespace microtome
