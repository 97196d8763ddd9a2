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
#include <microtome/ops/convolution.hpp>
#include <microtome/ops/inverted_bottleneck.hpp>
#include <microtome/ops/mlp.hpp>
#include <microtome/ops/window_attention.hpp>

namespace microtome {

/// What the model file says of a TinyViT.
struct tiny_vit_config {
  /// One resolution: blocks, then (but for the last stage) patch merging.
  struct stage {
    bool attends = false;  ///< blocks of windowed attention, or of MBConv
    index_t dim = 0;
    index_t depth = 0;
    index_t expand = 4;     ///< MBConv: hidden channels over dim
    index_t heads = 0;      ///< attention
    index_t window = 0;     ///< attention: tokens along a window's side
    index_t mlp_ratio = 4;  ///< attention: hidden channels of the MLP over dim
    index_t stride = 1;     ///< of the patch merging after the stage
  };

  index_t image_size = 0;
  index_t pixel_channels = 3;
  bool strided_stem = false;  ///< two 3x3 convolutions of stride 2, or two 1x1
  std::vector<stage> stages;
  index_t embed_dim = 0;  ///< of the neck's output

  /// The map that the first stage takes.
  map_size stem_size() const {
    const map_size image{image_size, image_size};
    return strided_stem ? image.strided(2).strided(2) : image;
  }

  /// Reads and checks it. Throws `error` where a value is missing or out of range.
  static tiny_vit_config from(const config_reader& json);

private:
  static stage read_stage(const config_reader& json, bool last);
};

/// A TinyViT block: x = x + attention(x); x = local_conv(x); x = x + mlp(x). The last two run fused
/// by rows of the map.
class tiny_vit_block {
public:
  tiny_vit_block(const weights& file, const std::string& name, map_size size,
                 const tiny_vit_config::stage& stage, padding mode)
      : attention(file, name + ".attn", size, stage.dim, stage.heads, stage.window, mode),
        local_conv(file, name + ".local_conv.c", stage.dim, 1),
        feed_forward(file, name + ".mlp", stage.dim, stage.dim * stage.mlp_ratio),
        name_(name),
        size_(size) {}

  /// x (tokens, dim), which is lost, to result (tokens, dim).
  void operator()(workspace& ws, view<float> x, view<float> result) const {
    attention(ws, x);
    if (ws.trace) record_parts(ws, x);
    ws.parallel((size_.height + rows() - 1) / rows(), [&](index_t task, scratch memory) {
      const index_t y = task * rows();
      const index_t count = std::min(rows(), size_.height - y);
      float* filtered = memory.take<float>(rows() * size_.width * local_conv.channels());
      local_conv.rows(size_, x, y, count, filtered, memory);
      feed_forward.rows(count * size_.width, filtered, result.row(y * size_.width), memory);
    });
    ws.record(name_, result, layout::tokens);
  }

  std::size_t scratch_bytes() const {
    const index_t tokens = rows() * size_.width;
    return std::max(attention.scratch_bytes(),
                    scratch::bytes_of<float>(tokens * local_conv.channels()) +
                        std::max(scratch::bytes_of<float>(local_conv.ring_floats(size_.width)),
                                 feed_forward.scratch_bytes(tokens)));
  }

  window_attention attention;
  depthwise_convolution local_conv;
  mlp feed_forward;

private:
  /// Rows of the map that a task takes.
  index_t rows() const { return std::max<index_t>(1, max_rows / size_.width); }

  /// The parts one by one: for traces only.
  void record_parts(workspace& ws, view<const float> x) const {
    const std::string conv = name_ + ".local_conv", rest = name_ + ".mlp";
    if (!ws.tracing(conv) && !ws.tracing(rest)) return;
    tensor<float> filtered(x.extents()), out(x.extents());
    local_conv(size_, x, filtered);
    ws.record(conv, filtered, layout::pixels, size_.width);
    ws.parallel(size_.height, [&](index_t y, scratch memory) {
      const index_t token = y * size_.width;
      feed_forward.rows(size_.width, filtered.row(token), out.row(token), memory, false);
    });
    ws.record(rest, out, layout::tokens);
  }

  std::string name_;
  map_size size_;
};

/// One resolution of TinyViT: MBConv or attention blocks, then patch merging.
class tiny_vit_stage {
public:
  /// `next_dim` is the next stage's dim, 0 for the last stage, which does not merge.
  tiny_vit_stage(const weights& file, const std::string& name, map_size size,
                 const tiny_vit_config::stage& stage, index_t next_dim, padding mode)
      : name_(name), size_(size), dim_(stage.dim) {
    for (index_t i = 0; i < stage.depth; ++i) {
      const std::string block = name + ".blocks." + std::to_string(i);
      if (!stage.attends)
        mbconv.emplace_back(file, block, dim_, dim_ * stage.expand, dim_, 1, true);
      else
        blocks.emplace_back(file, block, size, stage, mode);
    }
    if (next_dim)
      downsample.emplace(file, name + ".downsample", dim_, next_dim, next_dim, stage.stride, false);
  }

  map_size size() const { return size_; }
  index_t dim() const { return dim_; }
  map_size out_size() const { return downsample ? size_.strided(downsample->stride()) : size_; }
  index_t out_dim() const { return downsample ? downsample->out() : dim_; }

  /// x (size().tokens(), dim()) in `maps[0]` becomes (out_size().tokens(), out_dim()) in `maps[0]`;
  /// both pointers have room for either, and may be swapped.
  void operator()(workspace& ws, std::array<float*, 2>& maps) const {
    const shape tokens{size_.tokens(), dim_};
    for (const inverted_bottleneck& block : mbconv) {
      block(ws, size_, view<float>(maps[0], tokens), view<float>(maps[1], tokens));
      std::swap(maps[0], maps[1]);
      ws.record(block.name(), {maps[0], tokens}, layout::pixels, size_.width);
    }
    for (const tiny_vit_block& block : blocks) {
      block(ws, view<float>(maps[0], tokens), view<float>(maps[1], tokens));
      std::swap(maps[0], maps[1]);
    }
    if (downsample) {
      const shape merged{out_size().tokens(), out_dim()};
      (*downsample)(ws, size_, view<float>(maps[0], tokens), view<float>(maps[1], merged));
      std::swap(maps[0], maps[1]);
      ws.record(downsample->name(), {maps[0], merged}, layout::tokens);
    }
  }

  std::size_t scratch_bytes() const {
    std::size_t bytes = downsample ? downsample->scratch_bytes(size_) : 0;
    for (const inverted_bottleneck& block : mbconv)
      bytes = std::max(bytes, block.scratch_bytes(size_));
    for (const tiny_vit_block& block : blocks) bytes = std::max(bytes, block.scratch_bytes());
    return bytes;
  }

  std::vector<inverted_bottleneck> mbconv;
  std::vector<tiny_vit_block> blocks;
  std::optional<inverted_bottleneck> downsample;

private:
  std::string name_;
  map_size size_;
  index_t dim_;
};

/// What makes the first tokens of pixels: two convolutions, GELU between them.
class tiny_vit_stem {
public:
  /// Reads `<name>.seq.0.c` and `<name>.seq.2.c` (BatchNorm folded). The first is in fp32 always:
  /// 16 bits would lose some of the pixels' own 8.
  tiny_vit_stem(const weights& file, const std::string& name, const tiny_vit_config& config)
      : name_(name), image_{config.image_size, config.image_size}, size_(config.stem_size()) {
    const index_t in = config.pixel_channels, dim = config.stages[0].dim;
    const std::string first = name + ".seq.0.c", second = name + ".seq.2.c";
    if (config.strided_stem) {
      strided_ = {convolution3x3(file.kept(), first, in, dim / 2, 2, true),
                  convolution3x3(file, second, dim / 2, dim, 2, true)};
    } else {
      pointwise_ = {linear::pointwise(file.kept(), first, in, dim / 2),
                    linear::pointwise(file, second, dim / 2, dim)};
    }
  }

  /// image (image_size^2, pixel_channels) -> maps[0] (size().tokens(), dim); both have floats().
  void operator()(workspace& ws, view<const float> image, const std::array<float*, 2>& maps) const {
    const view<float> result(maps[0], {size_.tokens(), out()});
    if (strided()) {
      const map_size half = image_.strided(2);
      const view<float> hidden(maps[1], {half.tokens(), strided_[0].out()});
      if (ws.tracing(name_ + ".seq.0")) {
        tensor<float> plain(hidden.extents());
        strided_[0](ws, image_, image, plain);
        ws.record(name_ + ".seq.0", plain, layout::pixels, half.width);
      }
      strided_[0](ws, image_, image, hidden, activation::gelu);
      strided_[1](ws, half, hidden, result);
    } else {
      embed_pixels(ws, image, result);
    }
    ws.record(name_, result, layout::pixels, size_.width);
  }

  /// Floats of its largest map.
  index_t floats() const {
    return std::max(size_.tokens() * out(),
                    strided() ? image_.strided(2).tokens() * strided_[0].out() : 0);
  }
  std::size_t scratch_bytes() const {
    return strided() ? 0 : scratch::bytes_of<float>(token_block * pointwise_[0].out());
  }
  index_t macs() const {
    if (strided())
      return image_.strided(2).tokens() * strided_[0].macs() + size_.tokens() * strided_[1].macs();
    return size_.tokens() * pointwise_[0].out() * (pointwise_[0].in() + out());
  }

private:
  bool strided() const { return strided_[0].out() > 0; }
  index_t out() const { return strided() ? strided_[1].out() : pointwise_[1].out(); }

  /// Both convolutions of a block of pixels while it is in cache.
  void embed_pixels(workspace& ws, view<const float> image, view<float> x) const {
    const linear &first = pointwise_[0], &second = pointwise_[1];
    ws.parallel(block_count(size_.tokens()), [&](index_t block, scratch memory) {
      float* hidden = memory.take<float>(token_block * first.out());
      const index_t row = block * token_block;
      const index_t count = std::min(token_block, size_.tokens() - row);
      const row_pointers<const float> pixels(image.row(row), first.in(), count);
      const row_pointers<float> middle(hidden, first.out(), count);
      const row_pointers<float> out(x.row(row), second.out(), count);
      first.rows(count, pixels.data(), middle.data(), activation::gelu);
      second.rows(count, middle.data(), out.data());
    });
  }

  std::string name_;
  map_size image_, size_;
  std::array<linear, 2> pointwise_;
  std::array<convolution3x3, 2> strided_;
};

/// The image encoder of MobileSAM and LiteMedSAM: TinyViT (Wu et al., 2022), and SAM's neck.
///
///                                                   LiteMedSAM             MobileSAM
///     image                                         (256 x 256, 3)         (1024 x 1024, 3)
///       patch_embed   two convolutions              1x1                    3x3 of stride 2
///       layers.0      2 MBConv, merge               (256 x 256, 64)        (256 x 256, 64)
///       layers.1      2 blocks of 7 x 7 windows     (128 x 128, 128)       the same
///       layers.2      6 blocks of 14 x 14 windows   (64 x 64, 160)
///       layers.3      2 blocks of 7 x 7 windows     (64 x 64, 320)
///       neck          1x1, norm, 3x3, norm          (64 x 64, 256)
class tiny_vit {
  inline static const std::string name_ = "image_encoder";

public:
  static constexpr const char* kind = "tiny_vit";

  tiny_vit(const weights& file, const config_reader& json, padding mode)
      : config_(tiny_vit_config::from(json)), stem(file, name_ + ".patch_embed", config_) {
    map_size size = config_.stem_size();
    for (std::size_t i = 0; i < config_.stages.size(); ++i) {
      const index_t next = i + 1 < config_.stages.size() ? config_.stages[i + 1].dim : 0;
      const std::string stage = name_ + ".layers." + std::to_string(i);
      stages.emplace_back(file, stage, size, config_.stages[i], next, mode);
      size = stages.back().out_size();
    }
    const index_t dim = stages.back().out_dim(), embed_dim = config_.embed_dim;
    neck_project = linear::pointwise(file, name_ + ".neck.0", dim, embed_dim, false);
    neck_norm1 = layer_norm(file, name_ + ".neck.1", embed_dim, norm2d_epsilon);
    neck_conv = convolution3x3(file, name_ + ".neck.2", embed_dim, embed_dim);
    neck_norm2 = layer_norm(file, name_ + ".neck.3", embed_dim, norm2d_epsilon);
  }

  index_t image_size() const { return config_.image_size; }
  index_t embed_dim() const { return config_.embed_dim; }
  map_size embedding_size() const { return stages.back().out_size(); }

  /// image (image_size^2, 3) -> embedding (embedding_size().tokens(), embed_dim).
  void operator()(workspace& ws, view<const float> image, view<float> embedding) const {
    frame memory(ws.memory());
    std::array<float*, 2> maps{memory.take({map_floats()}).data(),
                               memory.take({map_floats()}).data()};
    stem(ws, image, maps);
    for (const tiny_vit_stage& stage : stages) stage(ws, maps);
    const map_size size = embedding_size();
    neck(ws, {maps[0], {size.tokens(), stages.back().out_dim()}},
         {maps[1], {size.tokens(), neck_project.out()}}, embedding);
  }

  index_t memory() const {
    return 2 * arena::rounded(map_floats()) + neck_conv.memory(embedding_size());
  }
  std::size_t scratch_bytes() const {
    std::size_t bytes = std::max(stem.scratch_bytes(), neck_conv.scratch_bytes(embedding_size()));
    for (const tiny_vit_stage& stage : stages) bytes = std::max(bytes, stage.scratch_bytes());
    return bytes;
  }

  index_t macs() const;
  std::vector<std::string> parts() const;

  static constexpr float norm2d_epsilon = 1e-6f;  // SAM's LayerNorm2d

private:
  tiny_vit_config config_;

public:
  tiny_vit_stem stem;
  std::vector<tiny_vit_stage> stages;
  linear neck_project;
  layer_norm neck_norm1;
  convolution3x3 neck_conv;
  layer_norm neck_norm2;

private:
  /// Floats of the largest map between two layers.
  index_t map_floats() const {
    index_t floats = stem.floats();
    for (const tiny_vit_stage& stage : stages)
      floats =
          std::max({floats, stage.size().tokens() * stage.dim(),
                    stage.out_size().tokens() * std::max(stage.out_dim(), neck_project.out())});
    return floats;
  }

  void neck(workspace& ws, view<const float> x, view<float> hidden, view<float> embedding) const {
    const map_size size = embedding_size();
    neck_project(ws, x, hidden);
    ws.record("image_encoder.neck.0", hidden, layout::pixels, size.width);
    neck_norm1(ws, hidden, hidden);
    ws.record("image_encoder.neck.1", hidden, layout::pixels, size.width);
    neck_conv(ws, size, hidden, embedding);
    ws.record("image_encoder.neck.2", embedding, layout::pixels, size.width);
    neck_norm2(ws, embedding, embedding);
    ws.record("image_encoder.neck.3", embedding, layout::pixels, size.width);
  }
};

inline tiny_vit_config::stage tiny_vit_config::read_stage(const config_reader& json, bool last) {
  stage stage;
  stage.attends = json.one_of("kind", {"conv", "attention"}) == 1;
  stage.dim = json.number("dim", 1, 4096);
  stage.depth = json.number("depth", 1, 256);
  if (stage.attends) {
    stage.heads = json.number("heads", 1, 256);
    stage.window = json.number("window", 1, 32);
    stage.mlp_ratio = json.number("mlp_ratio", 1, 16);
    if (stage.dim % stage.heads != 0)
      json.refuse("dim is ", stage.dim, ", not a multiple of its ", stage.heads, " heads");
  } else {
    stage.expand = json.number("expand", 1, 16);
  }
  if (!last) stage.stride = json.number("stride", 1, 2);
  return stage;
}

inline tiny_vit_config tiny_vit_config::from(const config_reader& json) {
  tiny_vit_config config;
  config.image_size = json.number("image_size", 8, 1024);
  config.pixel_channels = json.number("pixel_channels", 3, 3);
  config.strided_stem = json.one_of("stem", {"pointwise", "strided"}) == 1;
  config.embed_dim = json.number("embed_dim", 8, 4096);
  const std::vector<config_reader> stages = json.objects("stages", 1, 16);
  index_t strides = config.strided_stem ? 4 : 1;
  for (const config_reader& stage : stages) {
    config.stages.push_back(read_stage(stage, config.stages.size() + 1 == stages.size()));
    strides *= config.stages.back().stride;
  }
  if (config.image_size % strides != 0)
    json.refuse("image_size is ", config.image_size, ", not a multiple of the strides' ", strides);
  return config;
}

namespace detail {

/// Multiply-adds of queries with keys and of weights with values over all windows of a map whose
/// windows at the right and bottom borders are partial.
inline index_t window_attention_macs(map_size size, index_t window, index_t dim) {
  const auto pairs = [&](index_t extent) {  // sum over windows of their extent squared, on an axis
    index_t sum = 0;
    for (index_t start = 0; start < extent; start += window) {
      const index_t n = std::min(window, extent - start);
      sum += n * n;
    }
    return sum;
  };
  return 2 * pairs(size.height) * pairs(size.width) * dim;
}

}  // namespace detail

/// Multiply-adds that have to be done: convolutions, linear layers and attention on the tokens that
/// exist, without padding. Twice as many FLOPs.
inline index_t tiny_vit::macs() const {
  index_t total = stem.macs();
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const tiny_vit_config::stage& stage = config_.stages[i];
    const map_size size = stages[i].size();
    const index_t tokens = size.tokens(), dim = stage.dim;
    if (stage.attends) {
      const index_t linear = 4 * dim * dim + 2 * dim * dim * stage.mlp_ratio;
      total += stage.depth * (tokens * (linear + 9 * dim) +
                              detail::window_attention_macs(size, stage.window, dim));
    } else {
      const index_t hidden = dim * stage.expand;
      total += stage.depth * tokens * (2 * dim * hidden + 9 * hidden);
    }
    if (stages[i].downsample) {
      const index_t next = stages[i].out_dim();
      total += tokens * dim * next + stages[i].out_size().tokens() * (9 * next + next * next);
    }
  }
  const index_t embed = config_.embed_dim;
  return total + embedding_size().tokens() * (stages.back().dim() * embed + 9 * embed * embed);
}

inline std::vector<std::string> tiny_vit::parts() const {
  std::vector<std::string> lines;
  for (std::size_t i = 0; i < stages.size(); ++i) {
    const tiny_vit_config::stage& s = config_.stages[i];
    std::ostringstream line;
    line << "layers." << i << "    " << s.depth << (s.attends ? " blocks, " : " MBConv, ") << s.dim
         << " channels, ";
    if (s.attends)
      line << s.heads << " heads, windows " << s.window << " x " << s.window;
    else
      line << "expanded " << s.expand << " times";
    lines.push_back(line.str());
  }
  return lines;
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
