/// Not among the public headers, since it needs Eigen.
#pragma once

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Cholesky>
#include <Eigen/Core>

#include <microtome/quantization/quantize.hpp>

namespace microtome {

/// Rounds a weight's elements one input after the other, each time changing those that are still to
/// come so that the layer's output errs least over the inputs that calibration saw (Frantar et al.,
/// GPTQ: Accurate Post-Training Quantization, 2023). Weights that are zero stay so: where a model
/// is pruned, zeros are neither stored nor multiplied.
class moment_rounder : public weight_rounder {
public:
  /// Of a file that `calibrate --moments` wrote; `file` must outlive this object.
  explicit moment_rounder(const safetensors& file) : file_(file) {
    if (!file.metadata().contains("format") ||
        file.metadata().find("format")->second != "microtome moments")
      fail(file.name(), ": not a file of second moments, which `calibrate --moments` writes");
  }

  /// The fingerprint of the model that they were seen in.
  std::string model() const {
    const auto found = file_.metadata().find("model");
    return found == file_.metadata().end() ? "" : found->second;
  }

  void round(layer_weight& layer) const override {
    if (!file_.contains(layer.name + ".moments")) return weight_rounder::round(layer);
    if (layer.depthwise) {
      const index_t taps = layer.values.size() / layer.in();
      const tensor<float> moments = file_.read(layer.name + ".moments", {layer.in(), taps, taps});
      for (index_t c = 0; c < layer.in(); ++c) {
        const view<const float> of_channel{moments.row(c), {taps, taps}};
        round({layer.values.row(c), {1, taps}}, taps, 1, &layer.scale[c], 1, of_channel, {});
      }
      return;
    }
    // As a matrix (rows, depth) whose rows have a scale each. Where the output channels are not the
    // outermost axis it lies in memory the other way round.
    const index_t depth = layer.out_axis ? layer.in() : layer.values.size() / layer.out();
    const index_t rows = layer.values.size() / depth;
    const tensor<float> moments = file_.read(layer.name + ".moments", {depth, depth});
    round({layer.values.data(), {rows, depth}}, layer.out_axis ? 1 : depth,
          layer.out_axis ? rows : 1, layer.scale.data(), rows / layer.out(), moments, layer.factor);
  }

private:
  static constexpr double damping = 0.01;  // of the mean moment, so that the matrix has an inverse
  static constexpr index_t block = 64;     // columns whose errors wait until they are passed on

  /// Makes whole numbers of weights (rows, depth), element (row, i) at row * row_stride + i *
  /// column_stride, of which `rows_of_channel` at a time have a scale; `moments` (depth, depth) are
  /// of what they multiply times `factor`, each of as many elements that follow each other.
  static void round(view<float> weight, index_t row_stride, index_t column_stride,
                    const float* scales, index_t rows_of_channel, view<const float> moments,
                    view<const float> factor) {
    const index_t rows = weight.extent(0), depth = weight.extent(1);
    Eigen::MatrixXd balanced(depth, depth);
    const auto factor_of = [&](index_t i) {
      return factor.size() ? double{factor[i / (depth / factor.size())]} : 1.0;
    };
    for (index_t i = 0; i < depth; ++i)
      for (index_t j = 0; j < depth; ++j)
        balanced(i, j) = double{moments[i * depth + j]} / factor_of(i) / factor_of(j);
    const std::vector<index_t> order = by_size(balanced);
    const auto at = [&](index_t row, index_t i) -> float& {
      return weight[row * row_stride + order[std::size_t(i)] * column_stride];
    };
    Eigen::MatrixXd values(rows, depth);
    for (index_t i = 0; i < depth; ++i)
      for (index_t row = 0; row < rows; ++row) values(row, i) = double{at(row, i)};
    Eigen::VectorXd scale(rows);
    for (index_t row = 0; row < rows; ++row) scale[row] = double{scales[row / rows_of_channel]};
    round(values, feedback(balanced, order), scale);
    for (index_t i = 0; i < depth; ++i)
      for (index_t row = 0; row < rows; ++row) at(row, i) = static_cast<float>(values(row, i));
  }

  /// Inputs by their size, the largest first: errors of those can still be made up for.
  static std::vector<index_t> by_size(const Eigen::MatrixXd& moments) {
    std::vector<index_t> order(static_cast<std::size_t>(moments.rows()));
    std::iota(order.begin(), order.end(), index_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](index_t a, index_t b) { return moments(a, a) > moments(b, b); });
    return order;
  }

  /// The upper triangle U of the inverse U^T U: row i, by its diagonal, is how much an error of
  /// input i is made up for by those that follow it.
  static Eigen::MatrixXd feedback(const Eigen::MatrixXd& moments,
                                  const std::vector<index_t>& order) {
    const index_t n = moments.rows();
    const double more = damping * moments.trace() / static_cast<double>(n) + 1e-30;
    Eigen::MatrixXd ordered(n, n);
    for (index_t i = 0; i < n; ++i)
      for (index_t j = 0; j < n; ++j)
        ordered(i, j) = moments(order[std::size_t(i)], order[std::size_t(j)]) + (i == j ? more : 0);
    const Eigen::MatrixXd inverse =
        ordered.llt().solve(Eigen::MatrixXd::Identity(n, n)).selfadjointView<Eigen::Lower>();
    return inverse.llt().matrixU();
  }

  static void round(Eigen::MatrixXd& values, const Eigen::MatrixXd& upper,
                    const Eigen::VectorXd& scale) {
    const index_t depth = values.cols();
    const Eigen::Array<bool, Eigen::Dynamic, Eigen::Dynamic> zero = values.array() == 0;
    for (index_t start = 0; start < depth; start += block) {
      const index_t count = std::min(block, depth - start), rest = depth - start - count;
      Eigen::MatrixXd errors(values.rows(), count);
      for (index_t i = 0; i < count; ++i) {
        const index_t at = start + i;
        Eigen::VectorXd whole = values.col(at)
                                    .cwiseQuotient(scale)
                                    .unaryExpr([](double v) { return std::nearbyint(v); })
                                    .cwiseMin(127.0)
                                    .cwiseMax(-127.0);
        whole = zero.col(at).select(0.0, whole);
        errors.col(i) = (values.col(at) - whole.cwiseProduct(scale)) / upper(at, at);
        values.middleCols(at, count - i) -= errors.col(i) * upper.row(at).segment(at, count - i);
        values.col(at) = whole;
      }
      values.rightCols(rest) -= errors * upper.block(start, start + count, count, rest);
    }
  }

  const safetensors& file_;
};

}  // namespace microtome
