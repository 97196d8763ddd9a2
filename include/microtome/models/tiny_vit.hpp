#pragma once

#include <kernels/macros_off.hpp>

#include <cstring>
#include <string>
#include <vector>

#include <microtome/model_file/config.hpp>
#include <microtome/ops/convolution.hpp>
#include <microtome/ops/inverted_bottleneck.hpp>
#include <microtome/ops/mlp.hpp>
#include <microtome/ops/window_attention.hpp>

namespace microtome {

/// A TinyViT block: x = x + attention(x); x = local_conv(x); x = x + mlp(x). The last two run fused
/// by rows of the map.
class tiny_vit_block {
public:
  tiny_vit_block(const weights& file, const std::string& name, map_size size,
                 const stage_config& stage, padding mode)
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
  depthwise3x3 local_conv;
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
                 const stage_config& stage, index_t next_dim, padding mode)
      : name_(name), size_(size), dim_(stage.dim) {
    for (index_t i = 0; i < stage.depth; ++i) {
      const std::string block = name + ".blocks." + std::to_string(i);
      if (stage.blocks == stage_config::kind::conv)
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

/// LiteMedSAM's image encoder: TinyViT (Wu et al., 2022) without its stride-4 stem, and SAM's neck.
///
///     image (256 x 256, 3)
///       patch_embed   two 1x1 convolutions           (256 x 256, 64)
///       layers.0      2 MBConv, merge                 (128 x 128, 128)
///       layers.1      2 blocks of 7 x 7 windows       (64 x 64, 160)
///       layers.2      6 blocks of 14 x 14 windows     (64 x 64, 320)
///       layers.3      2 blocks of 7 x 7 windows       (64 x 64, 320)
///       neck          1x1, norm, 3x3, norm            (64 x 64, 256)
class tiny_vit {
  inline static const std::string name_ = "image_encoder";

public:
  tiny_vit(const weights& file, const lite_medsam_config& config, padding mode)
      : embed_hidden(linear::pointwise(file.kept(), name_ + ".patch_embed.seq.0.c",
                                       config.pixel_channels, config.stages[0].dim / 2)),
        embed(linear::pointwise(file, name_ + ".patch_embed.seq.2.c", config.stages[0].dim / 2,
                                config.stages[0].dim)),
        image_{config.image_size, config.image_size} {
    map_size size = image_;
    for (std::size_t i = 0; i < config.stages.size(); ++i) {
      const index_t next = i + 1 < config.stages.size() ? config.stages[i + 1].dim : 0;
      const std::string stage = name_ + ".layers." + std::to_string(i);
      stages.emplace_back(file, stage, size, config.stages[i], next, mode);
      size = stages.back().out_size();
    }
    const index_t dim = stages.back().out_dim();
    neck_project = linear::pointwise(file, name_ + ".neck.0", dim, config.embed_dim, false);
    neck_norm1 = layer_norm(file, name_ + ".neck.1", config.embed_dim, norm2d_epsilon);
    neck_conv = convolution3x3(file, name_ + ".neck.2", config.embed_dim, config.embed_dim);
    neck_norm2 = layer_norm(file, name_ + ".neck.3", config.embed_dim, norm2d_epsilon);
  }

  map_size embedding_size() const { return stages.back().out_size(); }

  /// image (image_size^2, 3) in [0, 1] -> embedding (embedding_size().tokens(), embed_dim).
  void operator()(workspace& ws, view<const float> image, view<float> embedding) const {
    frame memory(ws.memory());
    std::array<float*, 2> maps{memory.take({map_floats()}).data(),
                               memory.take({map_floats()}).data()};
    embed_patches(ws, image, {maps[0], {image_.tokens(), embed.out()}});
    for (const tiny_vit_stage& stage : stages) stage(ws, maps);
    const map_size size = embedding_size();
    neck(ws, {maps[0], {size.tokens(), stages.back().out_dim()}},
         {maps[1], {size.tokens(), neck_project.out()}}, embedding);
    ws.record("image_embedding", embedding, layout::pixels, size.width);
  }

  index_t memory() const { return 2 * arena::rounded(map_floats()); }
  std::size_t scratch_bytes() const {
    std::size_t bytes = scratch::bytes_of<float>(token_block * embed_hidden.out());
    for (const tiny_vit_stage& stage : stages) bytes = std::max(bytes, stage.scratch_bytes());
    return bytes;
  }

  static constexpr float norm2d_epsilon = 1e-6f;  // SAM's LayerNorm2d

  linear embed_hidden;  // fp32: 16 bits would lose some of the pixels' own 8
  linear embed;
  std::vector<tiny_vit_stage> stages;
  linear neck_project;
  layer_norm neck_norm1;
  convolution3x3 neck_conv;
  layer_norm neck_norm2;

private:
  /// Floats of the largest map between two layers.
  index_t map_floats() const {
    index_t floats = image_.tokens() * embed.out();
    for (const tiny_vit_stage& stage : stages)
      floats =
          std::max({floats, stage.size().tokens() * stage.dim(),
                    stage.out_size().tokens() * std::max(stage.out_dim(), neck_project.out())});
    return floats;
  }

  void embed_patches(workspace& ws, view<const float> image, view<float> x) const {
    ws.parallel(block_count(image_.tokens()), [&](index_t block, scratch memory) {
      float* hidden = memory.take<float>(token_block * embed_hidden.out());
      const index_t row = block * token_block;
      const index_t count = std::min(token_block, image_.tokens() - row);
      const row_pointers<const float> pixels(image.row(row), embed_hidden.in(), count);
      const row_pointers<float> middle(hidden, embed_hidden.out(), count);
      const row_pointers<float> out(x.row(row), embed.out(), count);
      embed_hidden.rows(count, pixels.data(), middle.data(), activation::gelu);
      embed.rows(count, middle.data(), out.data());
    });
    ws.record("image_encoder.patch_embed", x, layout::pixels, image_.width);
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

  map_size image_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
