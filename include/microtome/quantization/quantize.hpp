#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <microtome/core/bits.hpp>
#include <microtome/model_file/safetensors_writer.hpp>
#include <microtome/quantization/calibration.hpp>
#include <microtome/quantization/scheme.hpp>

namespace microtome {

/// The nearest bf16 number to a finite one, ties to even, as products in bf16 round.
inline std::uint16_t bf16_bits(float x) {
  if (std::abs(x) < std::numeric_limits<float>::min()) x = std::copysign(0.0f, x);
  const auto bits = bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// Makes whole numbers of a layer's weight.
class weight_rounder {
public:
  virtual ~weight_rounder() = default;

  /// `layer` has its scale; its values become whole numbers from -127 to 127: here the nearest to
  /// value / scale, ties to even.
  virtual void round(layer_weight& layer) const {
    for (index_t i = 0; i < layer.values.size(); ++i) {
      const float whole = std::nearbyint(layer.values[i] / layer.scale[layer.channel(i)]);
      layer.values[i] = std::clamp(whole, -127.0f, 127.0f);
    }
  }
};

/// Makes a layer's weight whole numbers with one scale per output channel, the largest weight of
/// the channel, times the factor of its input, becoming 127.
inline void quantize_weight(layer_weight& layer, precision inputs, const weight_rounder& rounder) {
  layer.inputs = inputs;
  if (!layer.factor.empty())
    for (index_t i = 0; i < layer.values.size(); ++i)
      layer.values[i] *= layer.factor[layer.input_channel(i)];
  layer.scale = tensor<float>(shape{layer.out()});
  for (index_t i = 0; i < layer.values.size(); ++i) {
    float& scale = layer.scale[layer.channel(i)];
    scale = std::max(scale, std::abs(layer.values[i]) / 127.0f);
  }
  for (float& scale : layer.scale)
    if (scale < weights::least_scale) scale = 1.0f;  // a channel of zeros
  rounder.round(layer);
}

/// Loads a quantised model with its int8 products in floating point: see simulated_weight.
class int8_simulation : public layer_hook {
public:
  void load(layer_weight& layer) override { layer.simulated = true; }
};

/// Quantises a model of fp32 weights as it is loaded, and keeps what `write` puts into a file.
class model_quantizer : public layer_hook {
public:
  /// `ranges` may be null for a scheme that quantises weights alone, `rounder` to round to the
  /// nearest.
  model_quantizer(scheme chosen, const activation_ranges* ranges,
                  const weight_rounder* rounder = nullptr)
      : scheme_(std::move(chosen)), ranges_(ranges), rounder_(rounder ? *rounder : nearest_) {}

  model_quantizer(const model_quantizer&) = delete;

  void load(layer_weight& layer) override {
    if (layer.quantized())
      fail("quantize: ", layer.name, " is in 8 bits already; quantise the fp32 model");
    precision wanted = scheme_.choose(layer_place(layer.name));
    if (wanted == precision::int8 && layer.folded) wanted = precision::int8_weights;
    if (wanted == precision::int8) {
      if (!ranges_)
        fail("quantize: ", layer.name, " is to be int8, which needs ranges (see calibrate)");
      const auto range = ranges_->layers.find(layer.name);
      if (range == ranges_->layers.end())
        wanted = precision::int8_weights;  // no case came through here
      else
        take_range(range->second, layer);
    }
    if (wanted == precision::int8 || wanted == precision::int8_weights)
      quantize_weight(layer, wanted, rounder_);
    else
      layer.inputs = wanted;
    if (wanted == precision::bf16)  // as the file will have them
      for (float& v : layer.values) v = bit_cast<float>(std::uint32_t{bf16_bits(v)} << 16);
    layers_.push_back(layer);
    layers_.back().observer = nullptr;
  }

  const std::vector<layer_weight>& layers() const { return layers_; }
  const scheme& chosen() const { return scheme_; }

  /// Writes the model that was loaded from `file`: its tensors, those of the layers as they have
  /// become.
  void write(const safetensors& file, const std::filesystem::path& path) const {
    scheme_.check_all_used();
    // By the name under which a weight lies in the file, compressed or not.
    std::map<std::string, const layer_weight*> changed;
    for (const layer_weight& layer : layers_) {
      const std::string stored = layer.name + ".weight";
      changed[file.compressed(stored) ? stored + "_values" : stored] = &layer;
    }
    safetensors_writer out;
    for (const auto& [key, text] : file.metadata()) out.metadata(key, text);
    out.metadata("scheme", scheme_.text());
    out.metadata("precision", "mixed");
    for (const auto& [name, entry] : file.tensors()) {
      const auto layer = changed.find(name);
      if (name.ends_with("_mask") && changed.contains(name.substr(0, name.size() - 4) + "values"))
        continue;  // it goes with the values
      if (layer == changed.end())
        out.add(name, entry.dtype, entry.extents, file.stored(entry));
      else
        add(out, *layer->second, file);
    }
    out.write(path);
  }

private:
  static void take_range(const layer_range& found, layer_weight& layer) {
    const auto in = static_cast<std::size_t>(layer.in());
    if (found.ranges.size() != 1 && !(layer.depthwise && found.ranges.size() == in))
      fail("quantize: there are ", found.ranges.size(), " ranges for ", layer.name, ", expected 1",
           layer.depthwise ? " or " + std::to_string(in) : "");
    for (const value_range& range : found.ranges) layer.input.push_back(range.levels());
    if (found.factor.empty()) return;
    if (layer.depthwise || found.factor.size() != in)
      fail("quantize: there are ", found.factor.size(), " factors for ", layer.name, ", expected ",
           layer.depthwise ? 0 : in);
    layer.factor = tensor<float>(shape{layer.in()});
    std::copy(found.factor.begin(), found.factor.end(), layer.factor.begin());
  }

  static void add(safetensors_writer& out, const layer_weight& layer, const safetensors& file) {
    const std::string name = layer.name + ".weight";
    if (layer.quantized()) {
      std::vector<std::int8_t> whole(layer.values.begin(), layer.values.end());
      out.add_weight(name, "I8", layer.values.extents(), std::as_bytes(std::span(whole)));
      out.add(name + "_scale", layer.scale);
      if (layer.inputs != precision::int8) return;
      const shape inputs{static_cast<index_t>(layer.input.size())};
      tensor<float> scale(inputs), zero_point(inputs);
      for (index_t i = 0; i < scale.size(); ++i) {
        const quantization& input = layer.input[static_cast<std::size_t>(i)];
        scale[i] = input.scale;
        zero_point[i] = static_cast<float>(input.zero_point);
      }
      out.add(layer.name + ".input_scale", scale);
      out.add(layer.name + ".input_zero_point", zero_point);
      if (!layer.factor.empty()) out.add(layer.name + ".input_factor", layer.factor);
    } else if (layer.inputs == precision::bf16) {
      std::vector<std::uint16_t> halves;
      for (const float v : layer.values) halves.push_back(bf16_bits(v));
      out.add_weight(name, "BF16", layer.values.extents(), std::as_bytes(std::span(halves)));
    } else {
      for (const std::string& part : {name, name + "_values", name + "_mask"})
        if (const auto entry = file.tensors().find(part); entry != file.tensors().end())
          out.add(part, entry->second.dtype, entry->second.extents, file.stored(entry->second));
    }
  }

  scheme scheme_;
  const activation_ranges* ranges_;
  const weight_rounder nearest_;
  const weight_rounder& rounder_;
  std::vector<layer_weight> layers_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
