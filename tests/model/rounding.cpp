// Rounding by second moments, against the same thing done the long way.
#include <random>

#include <Eigen/LU>

#include "../../apps/rounding.hpp"
#include "../support.hpp"

namespace microtome::tests {

namespace {

/// Rows whose elements depend on each other, the first ones largest.
tensor<float> correlated_rows(index_t rows, index_t n) {
  tensor<float> x = random_tensor({rows, n}, 7);
  for (index_t row = 0; row < rows; ++row)
    for (index_t i = 1; i < n; ++i)
      x.row(row)[i] = 0.8f * x.row(row)[i - 1] * (i % 5 ? 1.0f : -0.5f) + 0.4f * x.row(row)[i];
  return x;
}

std::vector<std::byte> moments_file_of(const std::string& layer, const tensor<float>& moments) {
  safetensors_writer out;
  out.metadata("format", "microtome moments");
  out.metadata("model", "0");
  out.add(layer + ".moments", moments);
  return out.bytes();
}

/// The moments of rows of `channels` for each of `taps`, and what a weight multiplies, (rows,
/// channels * taps).
struct inputs {
  tensor<float> moments, rows;
  inputs(index_t count, index_t channels, index_t taps)
      : rows(correlated_rows(count, channels * taps)) {
    second_moments sum(channels, taps, false);
    for (index_t start = 0; start < count; start += 100) {
      const index_t n = std::min<index_t>(100, count - start);
      tensor<float> by_tap(shape{taps * n, channels});
      for (index_t tap = 0; tap < taps; ++tap)
        for (index_t i = 0; i < n; ++i)
          for (index_t c = 0; c < channels; ++c)
            by_tap.row(tap * n + i)[c] = rows.row(start + i)[c * taps + tap];
      const auto pointers = row_pointers_of(std::as_const(by_tap).data(), taps * n, channels);
      sum.add(n, pointers.data());
    }
    moments = sum.mean();
  }
};

/// The squared error of a layer's output, where its weight is (out, channels, taps).
double output_error(const tensor<float>& rows, const tensor<float>& a, const tensor<float>& b) {
  double error = 0;
  const index_t depth = rows.extent(1);
  for (index_t row = 0; row < rows.extent(0); ++row)
    for (index_t o = 0; o < a.extent(0); ++o) {
      double difference = 0;
      for (index_t i = 0; i < depth; ++i)
        difference += double{rows.row(row)[i]} * (double{a.row(o)[i]} - double{b.row(o)[i]});
      error += difference * difference;
    }
  return error;
}

layer_weight layer_of(shape extents, int out_axis = 0) {
  layer_weight layer;
  layer.name = "layer";
  layer.values = random_tensor(extents, 5);
  layer.out_axis = out_axis;
  return layer;
}

}  // namespace

TEST_CASE("second moments are those of the rows") {
  const index_t channels = 5, taps = 9, n = channels * taps;
  const inputs seen(531, channels, taps);
  for (index_t i = 0; i < n; ++i)
    for (index_t j = 0; j < n; ++j) {
      double sum = 0;
      for (index_t row = 0; row < 531; ++row)
        sum += double{seen.rows.row(row)[i]} * double{seen.rows.row(row)[j]};
      CHECK(std::abs(sum / 531 - double{seen.moments[i * n + j]}) < 1e-4);
    }
}

TEST_CASE("weights that are zero stay zero as others are rounded") {
  const inputs seen(700, 37, 1);
  layer_weight layer = layer_of({11, 37});
  for (index_t i = 0; i < layer.values.size(); i += 3) layer.values[i] = 0;
  const tensor<float> before = layer.values;
  layer.scale = tensor<float>(shape{11});
  std::fill(layer.scale.begin(), layer.scale.end(), 0.4f);
  layer.inputs = precision::int8_weights;
  const std::vector<std::byte> bytes = moments_file_of("layer", seen.moments);
  const safetensors file(bytes);
  moment_rounder(file).round(layer);
  index_t zeros = 0;
  for (index_t i = 0; i < before.size(); ++i)
    if (before[i] == 0) {
      CHECK(layer.values[i] == 0);
      ++zeros;
    }
  CHECK(zeros == (before.size() + 2) / 3);
}

TEST_CASE("rounding by moments errs less than to the nearest") {
  const inputs seen(700, 37, 1);
  layer_weight nearest = layer_of({11, 37}), better = nearest;
  const tensor<float> exact = nearest.values;
  // Few levels, so that there is much to gain.
  nearest.scale = tensor<float>(shape{11});
  std::fill(nearest.scale.begin(), nearest.scale.end(), 0.4f);
  better.scale = nearest.scale;
  nearest.inputs = better.inputs = precision::int8_weights;
  const std::vector<std::byte> bytes = moments_file_of("layer", seen.moments);
  const safetensors file(bytes);
  weight_rounder().round(nearest);
  moment_rounder(file).round(better);
  CHECK(output_error(seen.rows, exact, better.dequantized()) <
        0.5 * output_error(seen.rows, exact, nearest.dequantized()));
}

TEST_CASE("rounding by moments is what a search of one element after the other finds") {
  const index_t channels = 4, taps = 9, depth = channels * taps, out = 3;
  const inputs seen(900, channels, taps);
  const std::vector<std::byte> bytes = moments_file_of("layer", seen.moments);
  const safetensors file(bytes);
  layer_weight layer = layer_of({out, channels, 3, 3});
  layer.factor = tensor<float>(shape{channels});
  for (index_t c = 0; c < channels; ++c) layer.factor[c] = 0.3f + 0.2f * static_cast<float>(c);
  tensor<float> exact = layer.values;
  for (index_t i = 0; i < exact.size(); ++i) exact[i] *= layer.factor[layer.input_channel(i)];
  quantize_weight(layer, precision::int8, moment_rounder(file));

  // After each element, those left change so that the error over all rows is least: their part of
  // the moments is inverted anew each time.
  Eigen::MatrixXd moments(depth, depth);
  for (index_t i = 0; i < depth; ++i)
    for (index_t j = 0; j < depth; ++j)
      moments(i, j) = double{seen.moments[i * depth + j]} / double{layer.factor[i / taps]} /
                      double{layer.factor[j / taps]};
  moments.diagonal().array() += 0.01 * moments.trace() / static_cast<double>(depth);
  for (index_t o = 0; o < out; ++o) {
    std::vector<index_t> left;
    for (index_t i = 0; i < depth; ++i) left.push_back(i);
    std::stable_sort(left.begin(), left.end(),
                     [&](index_t a, index_t b) { return moments(a, a) > moments(b, b); });
    std::vector<double> weight(exact.row(o), exact.row(o) + depth);
    while (!left.empty()) {
      const auto n = static_cast<index_t>(left.size());
      Eigen::MatrixXd part(n, n);
      for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < n; ++j)
          part(i, j) = moments(left[std::size_t(i)], left[std::size_t(j)]);
      const Eigen::MatrixXd inverse = part.inverse();
      const auto first = static_cast<std::size_t>(left[0]);
      const double scale = double{layer.scale[o]};
      const double whole = std::clamp(std::nearbyint(weight[first] / scale), -127.0, 127.0);
      CAPTURE(first);
      CHECK(layer.values.row(o)[first] == static_cast<float>(whole));
      const double error = (weight[first] - whole * scale) / inverse(0, 0);
      for (index_t i = 0; i < n; ++i)
        weight[std::size_t(left[std::size_t(i)])] -= error * inverse(0, i);
      left.erase(left.begin());
    }
  }
}

TEST_CASE("each channel of a depthwise weight is rounded by its own moments") {
  const index_t channels = 3, taps = 9, rows = 200;
  tensor<float> pixels = random_tensor({taps * rows, channels}, 3);
  for (float& v : pixels) v += 2.0f;  // so that what all taps err by matters most
  second_moments sum(channels, taps, true);
  sum.add(rows, row_pointers_of(std::as_const(pixels).data(), taps * rows, channels).data());
  const tensor<float> moments = sum.mean();
  const std::vector<std::byte> bytes = moments_file_of("layer", moments);
  const safetensors file(bytes);
  layer_weight layer = layer_of({channels, 1, 3, 3});
  layer.depthwise = true;
  for (float& w : layer.values) w *= 0.01f;
  layer.values[0] = layer.values[9] = layer.values[18] = 1.0f;  // few levels for the others
  layer_weight nearest = layer;
  quantize_weight(layer, precision::int8, moment_rounder(file));
  quantize_weight(nearest, precision::int8, weight_rounder());
  const tensor<float> exact = layer_of({channels, 1, 3, 3}).values;
  double better = 0, worse = 0;
  for (index_t c = 0; c < channels; ++c) {
    CHECK(layer.scale[c] == nearest.scale[c]);
    // The same as a layer of one channel of input.
    tensor<float> own(shape{taps, taps});
    std::copy_n(moments.row(c), taps * taps, own.data());
    const std::vector<std::byte> own_bytes = moments_file_of("layer", own);
    const safetensors own_file(own_bytes);
    layer_weight one = layer_of({1, 1, 3, 3});
    for (index_t tap = 0; tap < taps; ++tap)
      one.values[tap] = tap == 0 ? 1.0f : 0.01f * exact[c * taps + tap];
    quantize_weight(one, precision::int8, moment_rounder(own_file));
    for (index_t tap = 0; tap < taps; ++tap) CHECK(one.values[tap] == layer.values[c * taps + tap]);
    double sum_better = 0, sum_worse = 0;
    for (index_t tap = 1; tap < taps; ++tap) {
      const double w = 0.01 * double{exact[c * taps + tap]};
      sum_better += double{layer.values[c * taps + tap] * layer.scale[c]} - w;
      sum_worse += double{nearest.values[c * taps + tap] * layer.scale[c]} - w;
    }
    better += sum_better * sum_better;
    worse += sum_worse * sum_worse;
  }
  CHECK(better < 0.5 * worse);
}

TEST_CASE("weights that lie the other way round are rounded alike") {
  const inputs seen(300, 13, 1);
  const std::vector<std::byte> bytes = moments_file_of("layer", seen.moments);
  const safetensors file(bytes);
  layer_weight plain = layer_of({7, 13}), other = layer_of({13, 7, 1, 1}, 1);
  for (index_t o = 0; o < 7; ++o)
    for (index_t i = 0; i < 13; ++i) other.values[i * 7 + o] = plain.values[o * 13 + i];
  quantize_weight(plain, precision::int8, moment_rounder(file));
  quantize_weight(other, precision::int8, moment_rounder(file));
  for (index_t o = 0; o < 7; ++o)
    for (index_t i = 0; i < 13; ++i) CHECK(other.values[i * 7 + o] == plain.values[o * 13 + i]);
}

TEST_CASE(
    "inputs that do not depend on each other, or that were never seen, are rounded to the "
    "nearest") {
  tensor<float> moments(shape{9, 9});
  for (index_t i = 0; i < 9; ++i) moments[i * 9 + i] = i == 4 ? 0.0f : 1.0f + static_cast<float>(i);
  const std::vector<std::byte> bytes = moments_file_of("layer", moments);
  const safetensors file(bytes);
  for (const char* name : {"layer", "another"}) {
    layer_weight one = layer_of({5, 9}), other = one;
    one.name = name;
    quantize_weight(one, precision::int8, moment_rounder(file));
    quantize_weight(other, precision::int8, weight_rounder());
    CHECK(max_error(one.values, other.values) == 0);
  }
}

TEST_CASE("files that hold no moments are refused") {
  const std::vector<std::byte> bytes = safetensors_writer().bytes();
  const safetensors file(bytes, "x.safetensors");
  CHECK(mentions(error_of([&] { moment_rounder unused(file); }),
                 {"x.safetensors", "calibrate --moments"}));
}

}  // namespace microtome::tests
