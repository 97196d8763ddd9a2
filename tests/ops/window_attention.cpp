#include <limits>

#include <kernels/reference.hpp>
#include <microtome/ops/window_attention.hpp>

#include "../file_builder.hpp"

namespace microtome::tests {

namespace {

constexpr index_t dim = 12, heads = 3, head_dim = dim / heads;

std::vector<std::byte> attention_file(index_t window) {
  return file_builder()
      .add("attn.norm.weight", {dim}, 1, 1.0f)
      .add("attn.norm.bias", {dim}, 2, 0.5f)
      .add("attn.qkv.weight", {3 * dim, dim}, 3, 0.5f)
      .add("attn.qkv.bias", {3 * dim}, 4, 0.5f)
      .add("attn.proj.weight", {dim, dim}, 5, 0.5f)
      .add("attn.proj.bias", {dim}, 6, 0.5f)
      .add("attn.attention_biases", {heads, window * window}, 7, 1.0f)
      .bytes();
}

/// x + attention(x) as TinyViT defines it, in double precision: the map padded with zeros to whole
/// windows, every token of a window attending to every other. With `dropped`, to the real ones.
tensor<float> padded_attention(const safetensors& file, map_size size, index_t window,
                               const tensor<float>& x, bool dropped) {
  const tensor<float> gamma = file.read("attn.norm.weight", {dim});
  const tensor<float> beta = file.read("attn.norm.bias", {dim});
  const tensor<float> qkv_weight = file.read("attn.qkv.weight", {3 * dim, dim});
  const tensor<float> qkv_bias = file.read("attn.qkv.bias", {3 * dim});
  const tensor<float> proj_weight = file.read("attn.proj.weight", {dim, dim});
  const tensor<float> proj_bias = file.read("attn.proj.bias", {dim});
  const tensor<float> biases = file.read("attn.attention_biases", {heads, window * window});

  const auto real = [&](index_t y, index_t column) {
    return y < size.height && column < size.width;
  };
  const auto qkv_of = [&](index_t y, index_t column) {
    std::vector<double> token(dim, 0.0), out(3 * dim);
    double mean = 0, variance = 0;
    for (index_t c = 0; c < dim; ++c) {
      if (real(y, column))
        token[static_cast<std::size_t>(c)] = x[(y * size.width + column) * dim + c];
      mean += token[static_cast<std::size_t>(c)] / dim;
    }
    for (const double v : token) variance += (v - mean) * (v - mean) / dim;
    for (index_t o = 0; o < 3 * dim; ++o) {
      double sum = qkv_bias[o];
      for (index_t c = 0; c < dim; ++c)
        sum += qkv_weight[o * dim + c] * ((token[static_cast<std::size_t>(c)] - mean) /
                                              std::sqrt(variance + 1e-5) * gamma[c] +
                                          beta[c]);
      out[static_cast<std::size_t>(o)] = sum;
    }
    return out;
  };

  tensor<float> result(x.extents());
  for (index_t wy = 0; wy < size.height; wy += window)
    for (index_t wx = 0; wx < size.width; wx += window) {
      std::vector<std::vector<double>> tokens;
      for (index_t i = 0; i < window * window; ++i)
        tokens.push_back(qkv_of(wy + i / window, wx + i % window));
      for (index_t i = 0; i < window * window; ++i) {
        const index_t y = wy + i / window, column = wx + i % window;
        if (!real(y, column)) continue;
        std::vector<double> attended(dim);
        for (index_t h = 0; h < heads; ++h) {
          // A head's q, k and v lie side by side.
          const auto part = [&](index_t token, index_t which, index_t d) {
            return tokens[static_cast<std::size_t>(token)]
                         [static_cast<std::size_t>((h * 3 + which) * head_dim + d)];
          };
          std::vector<double> scores;
          for (index_t j = 0; j < window * window; ++j) {
            double dot = 0;
            for (index_t d = 0; d < head_dim; ++d) dot += part(i, 0, d) * part(j, 1, d);
            const index_t dy = std::abs(i / window - j / window);
            const index_t dx = std::abs(i % window - j % window);
            const double score =
                dot / std::sqrt(double{head_dim}) + biases[h * window * window + dy * window + dx];
            const bool skipped = dropped && !real(wy + j / window, wx + j % window);
            scores.push_back(skipped ? -std::numeric_limits<double>::infinity() : score);
          }
          kernels::reference::softmax(window * window, scores.data());
          for (index_t d = 0; d < head_dim; ++d)
            for (index_t j = 0; j < window * window; ++j)
              attended[static_cast<std::size_t>(h * head_dim + d)] +=
                  scores[static_cast<std::size_t>(j)] * part(j, 2, d);
        }
        const index_t token = (y * size.width + column) * dim;
        for (index_t o = 0; o < dim; ++o) {
          double sum = proj_bias[o] + x[token + o];
          for (index_t c = 0; c < dim; ++c)
            sum += proj_weight[o * dim + c] * attended[static_cast<std::size_t>(c)];
          result[token + o] = static_cast<float>(sum);
        }
      }
    }
  return result;
}

double window_error(map_size size, index_t window, padding mode) {
  const std::vector<std::byte> bytes = attention_file(window);
  const safetensors file(bytes);
  const window_attention attention(file, "attn", size, dim, heads, window, mode);
  workspace ws(2, 0, attention.scratch_bytes());
  tensor<float> x = random_tensor({size.tokens(), dim}, 9);
  const tensor<float> expected = padded_attention(file, size, window, x, mode == padding::dropped);
  attention(ws, x);
  return max_error(x, expected) / deviation(expected);
}

}  // namespace

TEST_CASE("windows without padding equal padded ones: every remainder") {
  for (const index_t window : {3, 5, 7})
    for (index_t side = 1; side <= 2 * window + 1; ++side) {
      CAPTURE(window);
      CAPTURE(side);
      CHECK(window_error({side, side}, window, padding::exact) < 1e-5);
      CHECK(window_error({side, 2 * window + 2 - side}, window, padding::exact) < 1e-5);
    }
  for (const index_t side : {14, 15, 17, 20, 23, 27}) {
    CAPTURE(side);
    CHECK(window_error({side, side}, 14, padding::exact) < 1e-5);
  }
}

TEST_CASE("windows without padding equal padded ones: TinyViT's own maps") {
  CHECK(window_error({64, 64}, 7, padding::exact) < 1e-5);
  CHECK(window_error({64, 64}, 14, padding::exact) < 1e-5);
  CHECK(window_error({128, 128}, 7, padding::exact) < 1e-5);
}

TEST_CASE("computed padding equals PyTorch's way") {
  CHECK(window_error({9, 11}, 7, padding::padded) < 1e-5);
  CHECK(window_error({20, 17}, 14, padding::padded) < 1e-5);
}

TEST_CASE("dropped padding attends to the real tokens alone, and differs from exact") {
  CHECK(window_error({9, 11}, 7, padding::dropped) < 1e-5);
  CHECK(window_error({20, 20}, 14, padding::dropped) < 1e-5);
  const std::vector<std::byte> bytes = attention_file(7);
  const safetensors file(bytes);
  const tensor<float> x = random_tensor({81, dim}, 9);
  CHECK(max_error(padded_attention(file, {9, 9}, 7, x, true),
                  padded_attention(file, {9, 9}, 7, x, false)) > 0.01);
}

}  // namespace microtome::tests
