#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <microtome/model_file/config.hpp>
#include <microtome/ops/bicubic.hpp>
#include <microtome/ops/convolution.hpp>
#include <microtome/ops/fused_bottleneck.hpp>
#include <microtome/ops/inverted_bottleneck.hpp>
#include <microtome/ops/layer_norm.hpp>
#include <microtome/ops/linear_attention.hpp>
#include <microtome/ops/padding.hpp>

namespace microtome {

/// What the model file says of an EfficientViT.
struct efficientvit_config {
  enum class kind { residual, fused, inverted, attention };
  /// One resolution: a block of stride 2, then blocks of one kind that are added to their input.
  struct stage {
    kind blocks = kind::residual;
    bool fused_merge = false;  ///< the first block: fused or inverted bottleneck
    index_t dim = 0;
    index_t depth = 0;         ///< blocks after the first
    index_t expand = 1;        ///< hidden channels over dim
    index_t merge_expand = 1;  ///< of the first block: hidden channels over the dim before
  };

  index_t image_size = 0;
  std::vector<stage> stages;
  index_t head_dim = 0;        ///< channels of an attention head
  index_t attention_side = 0;  ///< of the depthwise convolutions in attention: 3 or 5
  index_t neck_depth = 0;
  index_t neck_expand = 0;
  index_t embed_dim = 0;

  /// Reads and checks it. Throws `error` where a value is missing or out of range.
  static efficientvit_config from(const config_reader& json);
};

/// Two 3x3 convolutions with GELU between, added to their input: EfficientViT's first stage.
class residual_block {
public:
  /// Reads `<name>.conv1.conv` and `<name>.conv2.conv` (BatchNorm folded).
  residual_block(const weights& file, const std::string& name, index_t dim)
      : name_(name),
        conv1(file, name + ".conv1.conv", dim, dim, 1, true),
        conv2(file, name + ".conv2.conv", dim, dim, 1, true) {}

  /// x (size.tokens(), dim) becomes x + block(x); `hidden` is like it.
  void operator()(workspace& ws, map_size size, view<float> x, view<float> hidden) const {
    conv1(ws, size, x, hidden, activation::gelu_tanh);
    ws.record(name_ + ".conv1", hidden, layout::pixels, size.width);
    conv2(ws, size, hidden, x, activation::none, x.data());
  }

  index_t memory(map_size size) const { return std::max(conv1.memory(size), conv2.memory(size)); }
  std::size_t scratch_bytes(map_size size) const {
    return std::max(conv1.scratch_bytes(size), conv2.scratch_bytes(size));
  }
  index_t macs(map_size size) const { return size.tokens() * (conv1.macs() + conv2.macs()); }

private:
  std::string name_;

public:
  convolution3x3 conv1, conv2;
};

/// One resolution of EfficientViT.
class efficientvit_stage {
public:
  /// `in` is the dim of the stage before, 0 for the first, whose map the stem has made.
  efficientvit_stage(const weights& file, const std::string& name, map_size size, index_t in,
                     const efficientvit_config::stage& stage, const efficientvit_config& config)
      : name_(name), in_size_(size), size_(in ? size.strided(2) : size), dim_(stage.dim) {
    using enum efficientvit_config::kind;
    const auto block = [&](index_t i) { return name + ".op_list." + std::to_string(i); };
    if (in && stage.fused_merge)
      fused_merge.emplace(file, block(0) + ".main", in, in * stage.merge_expand, dim_, 2, false);
    else if (in)
      merge.emplace(file, block(0) + ".main", in, in * stage.merge_expand, dim_, 2, false, form);
    for (index_t i = 1; i <= stage.depth; ++i) {
      const index_t hidden = dim_ * stage.expand;
      if (stage.blocks == residual) residuals.emplace_back(file, block(i) + ".main", dim_);
      if (stage.blocks == fused)
        bottlenecks.emplace_back(file, block(i) + ".main", dim_, hidden, dim_, 1, true);
      if (stage.blocks == attention)
        attentions.emplace_back(file, block(i) + ".context_module.main", dim_, config.head_dim,
                                config.attention_side);
      if (stage.blocks == inverted || stage.blocks == attention)
        inverteds.emplace_back(
            file, block(i) + (stage.blocks == attention ? ".local_module.main" : ".main"), dim_,
            hidden, dim_, 1, true, form);
    }
  }

  map_size size() const { return size_; }
  index_t dim() const { return dim_; }

  /// How often the two pointers to maps are swapped.
  index_t swaps() const {
    return (fused_merge || merge ? 1 : 0) +
           static_cast<index_t>(bottlenecks.size() + inverteds.size());
  }

  /// The map in `maps[0]` becomes that of this stage, (size().tokens(), dim()), in `maps[0]`. The
  /// pointers are swapped with each block that writes its result elsewhere.
  void operator()(workspace& ws, std::array<float*, 2>& maps) const {
    const shape tokens{size_.tokens(), dim_};
    const auto apply = [&](const auto& block, map_size size, index_t channels) {
      block(ws, size, view<const float>(maps[0], {size.tokens(), channels}),
            view<float>(maps[1], tokens));
      std::swap(maps[0], maps[1]);
    };
    const auto record = [&](std::size_t i) {
      ws.record(name_ + ".op_list." + std::to_string(i), {maps[0], tokens}, layout::pixels,
                size_.width);
    };
    if (fused_merge) apply(*fused_merge, in_size_, fused_merge->spatial.in());
    if (merge) apply(*merge, in_size_, merge->in());
    record(0);
    for (std::size_t i = 0; i < residuals.size(); ++i) {
      residuals[i](ws, size_, {maps[0], tokens}, {maps[1], tokens});
      record(i + 1);
    }
    for (std::size_t i = 0; i < bottlenecks.size(); ++i) {
      apply(bottlenecks[i], size_, dim_);
      record(i + 1);
    }
    for (std::size_t i = 0; i < inverteds.size(); ++i) {
      if (!attentions.empty()) {
        attentions[i](ws, size_, {maps[0], tokens});
        ws.record(name_ + ".op_list." + std::to_string(i + 1) + ".context_module",
                  {maps[0], tokens}, layout::pixels, size_.width);
      }
      apply(inverteds[i], size_, dim_);
      record(i + 1);
    }
  }

  /// Arena floats.
  index_t memory() const {
    index_t floats = fused_merge ? fused_merge->memory(in_size_) : 0;
    if (merge) floats = std::max(floats, merge->memory(in_size_));
    for (const auto& block : residuals) floats = std::max(floats, block.memory(size_));
    for (const auto& block : bottlenecks) floats = std::max(floats, block.memory(size_));
    for (const auto& block : attentions) floats = std::max(floats, block.memory(size_));
    for (const auto& block : inverteds) floats = std::max(floats, block.memory(size_));
    return floats;
  }
  std::size_t scratch_bytes() const {
    std::size_t bytes = fused_merge ? fused_merge->scratch_bytes(in_size_) : 0;
    if (merge) bytes = std::max(bytes, merge->scratch_bytes(in_size_));
    for (const auto& block : residuals) bytes = std::max(bytes, block.scratch_bytes(size_));
    for (const auto& block : bottlenecks) bytes = std::max(bytes, block.scratch_bytes(size_));
    for (const auto& block : attentions) bytes = std::max(bytes, block.scratch_bytes(size_));
    for (const auto& block : inverteds) bytes = std::max(bytes, block.scratch_bytes(size_));
    return bytes;
  }
  index_t macs() const {
    index_t total = fused_merge ? fused_merge->macs(in_size_) : 0;
    if (merge) total += merge->macs(in_size_);
    for (const auto& block : residuals) total += block.macs(size_);
    for (const auto& block : bottlenecks) total += block.macs(size_);
    for (const auto& block : attentions) total += block.macs(size_);
    for (const auto& block : inverteds) total += block.macs(size_);
    return total;
  }

  // The first block, but for the first stage, then those of one kind.
  std::optional<fused_bottleneck> fused_merge;
  std::optional<inverted_bottleneck> merge;
  std::vector<residual_block> residuals;
  std::vector<fused_bottleneck> bottlenecks;
  std::vector<linear_attention> attentions;  // each before the inverted bottleneck of its number
  std::vector<inverted_bottleneck> inverteds;

private:
  static constexpr bottleneck_form form{".inverted_conv.conv", ".depth_conv.conv",
                                        ".point_conv.conv",    activation::gelu_tanh,
                                        activation::none,      true};

  std::string name_;
  map_size in_size_, size_;
  index_t dim_;
};

/// The image encoder of EfficientViT-SAM (Zhang, Cai and Han, 2024): EfficientViT (Cai et al.,
/// 2023) and a neck that sums its last three resolutions.
///
///                                               L0 to L2                XL0, XL1
///     image                                     (512 x 512, 3)          (1024 x 1024, 3)
///       stages.0   3x3 of stride 2, residuals   (256 x 256, 32)         (512 x 512, 32)
///       stages.1   fused bottlenecks            (128 x 128, 64)         (256 x 256, 64)
///       stages.2   fused bottlenecks            (64 x 64, 128) --.      (128 x 128, 128)
///       stages.3   inverted; fused              (32 x 32, 256) --|      (64 x 64, 256) ---.
///       stages.4   attention                    (16 x 16, 512) --|      (32 x 32, 512) ---|
///       stages.5   attention                                     |      (16 x 16, 1024) --|
///       neck       1x1 of each, bicubic to 64 x 64, sum, fused bottlenecks, 1x1, norm
///                                               (64 x 64, 256)          (64 x 64, 256)
class efficientvit {
  inline static const std::string name_ = "image_encoder";

  efficientvit_config config_;

public:
  static constexpr const char* kind = "efficientvit";

  efficientvit(const weights& file, const config_reader& json, padding)
      : config_(efficientvit_config::from(json)) {
    const std::string backbone = name_ + ".backbone.stages.", neck = name_ + ".neck.";
    // fp32: 16 bits would lose some of the pixels' own 8.
    stem = convolution3x3(file.kept(), backbone + "0.op_list.0.conv", 3, config_.stages[0].dim, 2,
                          true);
    map_size size = image().strided(2);
    index_t in = 0;
    for (std::size_t i = 0; i < config_.stages.size(); ++i) {
      stages.emplace_back(file, backbone + std::to_string(i), size, in, config_.stages[i], config_);
      size = stages.back().size();
      in = stages.back().dim();
    }
    const index_t dim = config_.embed_dim;
    for (std::size_t i = 0; i < inputs.size(); ++i)
      inputs[i] =
          linear::pointwise(file, neck + "input_ops." + std::to_string(i) + ".op_list.0.conv",
                            stages[stages.size() - 1 - i].dim(), dim);
    for (index_t i = 0; i < config_.neck_depth; ++i)
      middle.emplace_back(file, neck + "middle.op_list." + std::to_string(i) + ".main", dim,
                          dim * config_.neck_expand, dim, 1, true);
    output = linear::pointwise(file, neck + "output_ops.0.op_list.0.conv", dim, dim);
    norm = layer_norm(file, name_ + ".norm", dim, 1e-6f);
  }

  index_t image_size() const { return config_.image_size; }
  index_t embed_dim() const { return config_.embed_dim; }
  /// That of the third stage from the end.
  map_size embedding_size() const { return stages[stages.size() - inputs.size()].size(); }

  /// image (image_size^2, 3) -> embedding (embedding_size().tokens(), embed_dim).
  void operator()(workspace& ws, view<const float> image_pixels, view<float> embedding) const {
    frame memory(ws.memory());
    const std::array<index_t, 2> floats = map_floats();
    std::array<float*, 2> maps{memory.take({floats[0]}).data(), memory.take({floats[1]}).data()};
    std::array<view<float>, 3> into_neck;  // deepest first
    for (std::size_t i = 0; i + 1 < inputs.size(); ++i)
      into_neck[i] = memory.take({stage_for(i).size().tokens(), embed_dim()});
    into_neck.back() = embedding;

    stem(ws, image(), image_pixels, {maps[0], {image().strided(2).tokens(), stem.out()}},
         activation::gelu_tanh);
    for (std::size_t i = 0; i < stages.size(); ++i) {
      stages[i](ws, maps);
      if (const std::size_t deep = stages.size() - 1 - i; deep < inputs.size()) {
        inputs[deep](ws, {maps[0], {stages[i].size().tokens(), stages[i].dim()}}, into_neck[deep]);
        ws.record(name_ + ".neck.input_ops." + std::to_string(deep) + ".op_list.0", into_neck[deep],
                  layout::pixels, stages[i].size().width);
      }
    }
    fuse(ws, into_neck, maps, embedding);
  }

  /// Arena floats.
  index_t memory() const {
    index_t floats = 0;
    for (const efficientvit_stage& stage : stages) floats = std::max(floats, stage.memory());
    for (const fused_bottleneck& block : middle)
      floats = std::max(floats, block.memory(embedding_size()));
    for (const index_t map : map_floats()) floats += arena::rounded(map);
    for (std::size_t i = 0; i + 1 < inputs.size(); ++i)
      floats += arena::rounded(stage_for(i).size().tokens() * embed_dim());
    return floats;
  }
  std::size_t scratch_bytes() const {
    std::size_t bytes = 0;
    for (const efficientvit_stage& stage : stages) bytes = std::max(bytes, stage.scratch_bytes());
    for (const fused_bottleneck& block : middle)
      bytes = std::max(bytes, block.scratch_bytes(embedding_size()));
    for (std::size_t i = 0; i + 1 < inputs.size(); ++i)
      bytes = std::max(bytes, bicubic_scratch_bytes(stage_for(i).size(), embed_dim()));
    return bytes;
  }

  index_t macs() const;
  std::vector<std::string> parts() const;

  convolution3x3 stem;
  std::vector<efficientvit_stage> stages;
  std::array<linear, 3> inputs;  // of the neck: the last stage's, the one before, ...
  std::vector<fused_bottleneck> middle;
  linear output;
  layer_norm norm;

private:
  map_size image() const { return {config_.image_size, config_.image_size}; }
  /// The stage that input `i` of the neck takes.
  const efficientvit_stage& stage_for(std::size_t i) const { return stages[stages.size() - 1 - i]; }

  /// Floats of the largest map in each of the two places that maps between blocks take in turns.
  std::array<index_t, 2> map_floats() const {
    const index_t neck = embedding_size().tokens() * embed_dim();
    std::array<index_t, 2> floats{std::max(neck, image().strided(2).tokens() * stem.out()), neck};
    std::size_t at = 0;
    for (const efficientvit_stage& stage : stages) {
      const index_t map = stage.size().tokens() * stage.dim();
      for (index_t i = 0; i < stage.swaps(); ++i) {
        at = 1 - at;
        floats[at] = std::max(floats[at], map);
      }
      if (!stage.residuals.empty()) floats[1 - at] = std::max(floats[1 - at], map);
    }
    return floats;
  }

  /// The sum of the neck's inputs, the last of which is `embedding`, through its blocks.
  void fuse(workspace& ws, const std::array<view<float>, 3>& into_neck, std::array<float*, 2>& maps,
            view<float> embedding) const {
    const map_size size = embedding_size();
    const shape tokens = embedding.extents();
    for (std::size_t i = inputs.size(); i-- > 0;) {
      const map_size own = stage_for(i).size();
      const std::string name = name_ + ".neck.input_ops." + std::to_string(i);
      if (ws.tracing(name)) {
        tensor<float> enlarged(tokens);
        add_bicubic(ws, own, into_neck[i], size, enlarged);
        ws.record(name, enlarged, layout::pixels, size.width);
      }
      if (i + 1 < inputs.size()) add_bicubic(ws, own, into_neck[i], size, embedding);
    }
    ws.record(name_ + ".neck.sum", embedding, layout::pixels, size.width);
    view<const float> x = embedding;
    for (std::size_t i = 0; i < middle.size(); ++i) {
      const view<float> y(maps[i % 2], tokens);
      middle[i](ws, size, x, y);
      ws.record(name_ + ".neck.middle.op_list." + std::to_string(i), y, layout::pixels, size.width);
      x = y;
    }
    output(ws, x, embedding);
    ws.record(name_ + ".neck.output_ops.0", embedding, layout::pixels, size.width);
    norm(ws, embedding, embedding);
  }
};

inline efficientvit_config efficientvit_config::from(const config_reader& json) {
  efficientvit_config config;
  config.image_size = json.number("image_size", 16, 4096);
  config.head_dim = json.number("head_dim", 1, 256);
  config.attention_side = json.number("attention_side", 3, 5);
  if (config.attention_side == 4) json.refuse("attention_side is 4, expected 3 or 5");
  config.neck_depth = json.number("neck_depth", 1, 64);
  config.neck_expand = json.number("neck_expand", 1, 16);
  config.embed_dim = json.number("embed_dim", 8, 4096);
  for (const config_reader& part : json.objects("stages", 3, 8)) {
    stage stage;
    stage.blocks = static_cast<enum kind>(
        part.one_of("blocks", {"residual", "fused", "inverted", "attention"}));
    stage.dim = part.number("dim", 1, 4096);
    stage.depth = part.number("depth", 0, 64);
    stage.expand = part.number("expand", 1, 32);
    if (!config.stages.empty()) {
      stage.fused_merge = part.one_of("merge", {"fused", "inverted"}) == 0;
      stage.merge_expand = part.number("merge_expand", 1, 64);
    }
    if (stage.blocks == kind::attention && stage.dim % config.head_dim != 0)
      part.refuse("dim is ", stage.dim, ", not a multiple of the heads' ", config.head_dim);
    config.stages.push_back(stage);
  }
  if (const index_t strides = index_t{1} << config.stages.size(); config.image_size % strides != 0)
    json.refuse("image_size is ", config.image_size, ", not a multiple of the strides' ", strides);
  return config;
}

/// Multiply-adds. Twice as many FLOPs.
inline index_t efficientvit::macs() const {
  index_t total = image().strided(2).tokens() * stem.macs();
  for (const efficientvit_stage& stage : stages) total += stage.macs();
  for (std::size_t i = 0; i < inputs.size(); ++i)
    total += stage_for(i).size().tokens() * inputs[i].in() * embed_dim();
  for (const fused_bottleneck& block : middle) total += block.macs(embedding_size());
  return total + embedding_size().tokens() * embed_dim() * embed_dim();
}

inline std::vector<std::string> efficientvit::parts() const {
  constexpr const char* names[] = {"residual blocks", "fused bottlenecks", "inverted bottlenecks",
                                   "blocks of linear attention"};
  std::vector<std::string> lines;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const efficientvit_config::stage& s = config_.stages[i];
    std::ostringstream line;
    line << "stages." << i << "    " << s.depth << ' ' << names[static_cast<int>(s.blocks)] << ", "
         << s.dim << " channels at " << stages[i].size().height << " x " << stages[i].size().width;
    lines.push_back(line.str());
  }
  lines.push_back("neck        " + std::to_string(config_.neck_depth) + " fused bottlenecks");
  return lines;
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
