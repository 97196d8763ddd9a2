#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <kernels/active.hpp>
#include <microtome/model_file/safetensors.hpp>

namespace microtome {

using kernels::precision;

/// Tokens that one task of a token-wise layer takes. Large enough to use packed weights many times,
/// small enough that a task's intermediate rows stay in a core's L2 cache.
inline constexpr index_t token_block = 96;

/// Which layers multiply without the zeros of their weights.
enum class sparsity {
  automatic,  ///< those that are faster so, by kernels::table::sparse_time
  on,         ///< all that have zeros
  off
};

/// Sees what a layer multiplies, to learn from it. From several threads at once.
class input_observer {
public:
  virtual ~input_observer() = default;
  /// Rows of as many channels as the input has; x is [taps][rows].
  virtual void see(index_t taps, index_t rows, index_t channels, const float* const* x) = 0;
};

/// How a float x becomes a byte, which stands for (byte - zero_point) * scale: see
/// kernels::channel_quantization, whose inverse is 1 / scale in fp32.
struct quantization {
  float scale = 1.0f;
  int zero_point = 0;
};

/// A layer's weight, and what its product is computed in.
struct layer_weight {
  std::string name;  ///< module path
  precision inputs = precision::fp32;
  tensor<float> values;  ///< whole numbers for int8 and int8_weights
  tensor<float> scale;   ///< those of the output channels, (out), for int8 and int8_weights
  int out_axis = 0;      ///< which axis of `values` the output channels are
  bool folded = false;   ///< multiplied into others at load: may be stored in 8 bits, no more
  bool depthwise = false;
  std::vector<quantization> input;  ///< for int8: one, or one for each channel of depthwise ones
  /// What channels of the input are divided by before they are quantised, and `values` have been
  /// multiplied by, so that channels are of one size: (in), for int8, or none.
  tensor<float> factor;
  bool simulated = false;  ///< int8 in floating point, with the same results: see simulated_weight
  index_t rows = token_block;  ///< about as many it multiplies at a time
  bool sparse = false;         ///< multiplied without its zeros, with the same results
  input_observer* observer = nullptr;

  index_t out() const { return values.extent(out_axis); }
  bool quantized() const { return inputs == precision::int8 || inputs == precision::int8_weights; }
  /// The output channel of element i.
  index_t channel(index_t i) const {
    index_t inner = 1;
    for (int axis = out_axis + 1; axis < values.extents().rank(); ++axis)
      inner *= values.extent(axis);
    return i / inner % out();
  }
  /// Channels of the input.
  index_t in() const { return depthwise ? out() : values.extent(1 - out_axis); }
  /// The channel of the input that element i multiplies.
  index_t input_channel(index_t i) const {
    if (depthwise) return channel(i);
    index_t inner = 1;
    for (int axis = 2 - out_axis; axis < values.extents().rank(); ++axis)
      inner *= values.extent(axis);
    return i / inner % in();
  }
  /// What it stands for: values times scale, by factor.
  tensor<float> dequantized() const {
    tensor<float> out = values;
    if (quantized())
      for (index_t i = 0; i < out.size(); ++i) out[i] *= scale[channel(i)];
    if (!factor.empty())
      for (index_t i = 0; i < out.size(); ++i) out[i] /= factor[input_channel(i)];
    return out;
  }
};

/// How the kernels quantise the inputs of a layer in int8: see kernels::channel_quantization.
class input_levels {
public:
  input_levels() = default;
  /// For `taps` times the channels of the layer's input.
  explicit input_levels(const layer_weight& layer, index_t taps = 1)
      : inverse_(shape{taps * layer.in()}), zero_point_(inverse_.extents()) {
    for (index_t i = 0; i < inverse_.size(); ++i) {
      const index_t c = i % layer.in();
      const quantization& input = layer.input[layer.input.size() == 1 ? 0 : std::size_t(c)];
      inverse_[i] = 1.0f / (layer.factor.empty() ? input.scale : input.scale * layer.factor[c]);
      zero_point_[i] = static_cast<float>(input.zero_point);
    }
  }

  bool empty() const { return inverse_.empty(); }
  kernels::channel_quantization get() const { return {inverse_.data(), zero_point_.data()}; }

private:
  tensor<float> inverse_, zero_point_;
};

/// How many of a layer's weights are zeros, and what it would take to skip them.
struct layer_sparsity {
  index_t zeros = 0;
  float relative_time = 0;    ///< about, of the time that the dense product takes
  const char* why = nullptr;  ///< where it cannot be: why
  explicit layer_sparsity(const layer_weight& layer) {
    const tensor<float>& w = layer.values;
    zeros = std::count(w.begin(), w.end(), 0.0f);
    if (layer.depthwise) {
      why = "depthwise";
      return;
    }
    const index_t in = w.extent(1 - layer.out_axis), taps = w.size() / (in * layer.out());
    const kernels::sparse_matrix shape{taps, in, layer.out(), nullptr, 0, 0, layer.rows};
    relative_time = kernels::active().sparse_time(layer.inputs, shape, w.size() - zeros);
    if (layer.folded || layer.simulated) why = "never multiplied as it is";
    if (layer.inputs == precision::bf16 && in % 2 != 0 && taps > 1) why = "pairs across taps";
    if (layer.inputs == precision::int8 && !sums_fit(layer)) why = "sums beyond 2^24";
    if (layer.out() > max_columns) why = "too many columns";
  }

  bool pays(sparsity mode) const {
    if (why || zeros == 0 || mode == sparsity::off) return false;
    return mode == sparsity::on || relative_time < limit;
  }

private:
  static constexpr float limit = 0.9f;           // what sparse_time is off by in most cases
  static constexpr index_t max_columns = 32768;  // sparse kernels count them in 16 bits

  static bool sums_fit(const layer_weight& layer) {
    std::vector<float> sums(static_cast<std::size_t>(layer.out()));
    for (index_t i = 0; i < layer.values.size(); ++i)
      sums[static_cast<std::size_t>(layer.channel(i))] += std::abs(layer.values[i]);
    return *std::max_element(sums.begin(), sums.end()) <=
           static_cast<float>(kernels::max_sparse_column_sum);
  }
};

/// Changes layers as a model is loaded.
class layer_hook {
public:
  virtual ~layer_hook() = default;
  /// Called once for each layer, as it is in the file.
  virtual void load(layer_weight& layer) = 0;
};

/// Where layers read their weights. A layer `<name>` is in 8 bits where `<name>.weight` is I8; then
/// there is `<name>.weight_scale` (out) and, if its input is quantised too, `<name>.input_scale`
/// and `<name>.input_zero_point`: (1), or (channels) for a depthwise convolution. Others may have
/// `<name>.input_factor` (in): see layer_weight. Any `<name>.weight` may be compressed: see
/// safetensors.
class weights {
public:
  /// Of an input: scales and their inverses are far from where fp32 ends.
  static constexpr float least_scale = 1e-20f;

  weights(const safetensors& file, precision inputs = precision::fp32, layer_hook* hook = nullptr,
          sparsity zeros = sparsity::automatic, bool winograd = true)
      : file_(&file), inputs_(inputs), hook_(hook), zeros_(zeros), winograd_(winograd) {}

  /// Whether convolutions may take Winograd's algorithm.
  bool winograd() const { return winograd_; }

  /// The same weights for layers that stay in fp32.
  weights kept() const { return weights(*file_, precision::fp32, nullptr, zeros_, winograd_); }

  /// The same weights for layers that multiply about so many rows at a time.
  weights of_rows(index_t n) const {
    weights same = *this;
    same.rows_ = n;
    return same;
  }
  /// Those that multiply the tokens of a prompt: a box's two corners and five of the decoder.
  weights of_tokens() const { return of_rows(7); }

  /// A tensor that no product takes, in fp32. See safetensors::read.
  tensor<float> read(const std::string& name, shape expected) const {
    return file_->read(name, expected);
  }

  /// `<name>.weight`.
  layer_weight layer(const std::string& name, shape expected, int out_axis = 0) const {
    return load(name, expected, out_axis, false);
  }

  /// That of a depthwise convolution, (channels, 1, side, side). It never mixes channels, so that
  /// each may have a range of its own at no cost: its scale goes into that of the output channel.
  layer_weight depthwise(const std::string& name, index_t channels, index_t side) const {
    return load(name, {channels, 1, side, side}, 0, false, true);
  }

  /// The same in fp32, for a layer that is multiplied into others.
  tensor<float> folded(const std::string& name, shape expected) const {
    return load(name, expected, 0, true).dequantized();
  }

private:
  layer_weight load(const std::string& name, shape expected, int out_axis, bool folded,
                    bool depthwise = false) const {
    const std::string stored = name + ".weight";
    layer_weight layer;
    layer.name = name;
    layer.inputs = inputs_;
    layer.out_axis = out_axis;
    layer.folded = folded;
    layer.rows = rows_;
    layer.depthwise = depthwise;
    if (file_->contains(stored + "_scale")) {
      layer.inputs =
          file_->contains(name + ".input_scale") ? precision::int8 : precision::int8_weights;
      layer.values = file_->read_int8(stored, expected);
      layer.scale = file_->read(stored + "_scale", {layer.out()});
      if (layer.inputs == precision::int8) read_input(layer);
    } else {
      layer.values = file_->read(stored, expected);
      // In a file with a scheme, bf16 is what the layer is computed in, too.
      if (file_->metadata().contains("scheme") && file_->dtype(stored) == "BF16")
        layer.inputs = precision::bf16;
    }
    if (hook_) hook_->load(layer);
    layer.sparse = layer_sparsity(layer).pays(zeros_);
    return layer;
  }

  void read_input(layer_weight& layer) const {
    const std::string& name = layer.name;
    const bool one = file_->tensors().at(name + ".input_scale").extents == shape{1};
    const shape expected{one || !layer.depthwise ? 1 : layer.in()};
    const tensor<float> scales = read_scale(name + ".input_scale", expected);
    const tensor<float> zero_points = file_->read(name + ".input_zero_point", expected);
    for (index_t i = 0; i < expected.size(); ++i) {
      const float zero_point = zero_points[i];
      if (!(zero_point >= 0 && zero_point <= 255 && zero_point == std::floor(zero_point)))
        fail(file_->name(), ": tensor '", name, ".input_zero_point' holds ", zero_point,
             ", expected whole numbers from 0 to 255");
      layer.input.push_back({scales[i], static_cast<int>(zero_point)});
    }
    if (!layer.depthwise && file_->contains(name + ".input_factor"))
      layer.factor = read_scale(name + ".input_factor", {layer.in()});
    for (const float factor : layer.factor)
      if (const float step = factor * scales[0]; !(step >= least_scale && step <= 1 / least_scale))
        fail(file_->name(), ": '", name, ".input_factor' times '", name, ".input_scale' is ", step,
             ", expected ", least_scale, " to ", 1 / least_scale);
  }

  tensor<float> read_scale(const std::string& name, shape expected) const {
    tensor<float> scales = file_->read(name, expected);
    for (const float scale : scales)
      if (!(scale >= least_scale && scale <= 1 / least_scale))
        fail(file_->name(), ": tensor '", name, "' holds ", scale, ", expected ", least_scale,
             " to ", 1 / least_scale);
    return scales;
  }

  const safetensors* file_;
  precision inputs_;
  layer_hook* hook_;
  sparsity zeros_;
  bool winograd_;
  index_t rows_ = token_block;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
