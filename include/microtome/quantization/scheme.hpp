#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include <microtome/model_file/weights.hpp>

namespace microtome {

/// Where a layer stands: stage, block and layer, as schemes name it.
///
///     image_encoder.layers.1.blocks.0.attn.qkv      1:0:attn.qkv
///     image_encoder.layers.0.downsample.conv1.c     0:downsample:conv1
///     image_encoder.neck.2                          neck:-:2
///     image_encoder.backbone.stages.3.op_list.1.main.depth_conv.conv
///                                                   3:1:depth_conv
///     image_encoder.backbone.stages.4.op_list.2.context_module.main.qkv.conv
///                                                   4:2:qkv
///     image_encoder.neck.middle.op_list.0.main.spatial_conv.conv
///                                                   neck:0:spatial_conv
///     mask_decoder.transformer.layers.0.mlp.lin1    decoder:0:mlp.lin1
///     mask_decoder.output_upscaling.0               decoder:output_upscaling:0
struct layer_place {
  std::array<std::string, 3> fields;

  /// Of a module path.
  explicit layer_place(std::string_view path) {
    const auto starts = [&](std::string_view prefix) {
      if (!path.starts_with(prefix)) return false;
      path.remove_prefix(prefix.size());
      return true;
    };
    const auto component = [&] {
      const std::string first(path.substr(0, path.find('.')));
      path.remove_prefix(std::min(path.size(), first.size() + 1));
      return first;
    };
    // A convolution and its folded BatchNorm.
    if (path.ends_with(".c")) path.remove_suffix(2);
    if (path.ends_with(".conv")) path.remove_suffix(5);
    if (starts("image_encoder.")) {
      const bool stage = starts("layers.") || starts("backbone.stages.");
      fields[0] = component();
      starts("middle.");
      fields[1] = stage || path.starts_with("op_list.") || path.find("_ops.") != path.npos
                      ? (starts("blocks."), starts("op_list."), component())
                      : "-";
      if (!starts("context_module.")) starts("local_module.");
      starts("main.");
      if (path.empty()) path = "conv";  // EfficientViT's first layer is a block of its own
    } else {
      fields[0] = starts("mask_decoder.") ? "decoder" : "prompt";
      starts("prompt_encoder.");
      if (starts("transformer.")) starts("layers.");
      fields[1] = component();
    }
    fields[2] = path;
  }

  std::string text() const { return fields[0] + ":" + fields[1] + ":" + fields[2]; }
};

inline constexpr std::array<const char*, 4> precision_names{"fp32", "bf16", "int8", "int8-weights"};
inline const char* name_of(precision p) {
  return precision_names[static_cast<std::size_t>(p)];
}

/// Which layers are computed in what. A scheme is a list of rules, separated by commas, of which
/// the last that matches a layer decides:
///
///     scheme    rule, rule, ...
///     rule      PRECISION | NAME | stage:block:layer=PRECISION
///     PRECISION fp32, bf16, int8, or int8-weights (products in fp32)
///     NAME      one of `named` below, which stands for its rules
///
/// A field of stage:block:layer (see layer_place) is a pattern, where * stands for any text, or a
/// list of them with | between; ! before it says "none of these". So
///
///     int8, 0:*:*=fp32, *:*:conv2|local_conv=bf16, !neck:*:proj=int8-weights
///
/// Layers that no rule matches are fp32.
class scheme {
public:
  static constexpr std::array<std::array<const char*, 2>, 6> named{{
      {"recommended",
       "*:*:*=int8, patch_embed:*:*=fp32, 0:0:conv1|conv=fp32, 0:downsample:conv1=fp32"},
      {"full", "*:*:*=int8"},
      {"mix-dwsc", "*:*:*=int8, *:*:conv2|local_conv|depth_conv|aggreg.0.0=fp32"},
      {"mix-mbc-neck", "*:*:*=int8, 0|neck|patch_embed:*:*=fp32"},
      {"encoder", "!decoder|prompt:*:*=int8"},
      {"weights-only", "*:*:*=int8-weights"},
  }};

  /// Throws `error` where the text is no scheme.
  explicit scheme(std::string_view text) : text_(text) { add_rules(text); }

  const std::string& text() const { return text_; }

  /// What a layer is to be computed in.
  precision choose(const layer_place& place) {
    precision chosen = precision::fp32;
    for (rule& r : rules_) {
      if (!matches(r, place)) continue;
      chosen = r.chosen;
      r.used = true;
    }
    return chosen;
  }

  /// Throws `error` where a rule has matched no layer so far: it was meant to. Those of named
  /// schemes are for several models.
  void check_all_used() const {
    for (const rule& r : rules_)
      if (!r.used && !r.named) fail("scheme: rule '", r.text, "' matches no layer of this model");
  }

private:
  struct rule {
    std::string text;
    std::array<std::string, 3> fields;
    precision chosen;
    bool used = false;
    bool named = false;
  };

  static std::string_view trimmed(std::string_view text) {
    while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
    while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
    return text;
  }

  /// The parts of `text` between separators, without blanks around them.
  static std::vector<std::string> split(std::string_view text, char separator) {
    std::vector<std::string> parts;
    for (;;) {
      const std::size_t end = text.find(separator);
      parts.emplace_back(trimmed(text.substr(0, end)));
      if (end == std::string_view::npos) return parts;
      text.remove_prefix(end + 1);
    }
  }

  void add_rules(std::string_view text) {
    for (const std::string& part : split(text, ',')) {
      const auto name =
          std::find_if(named.begin(), named.end(), [&](const auto& n) { return part == n[0]; });
      const std::size_t equals = part.find('=');
      if (name != named.end()) {
        const std::size_t first = rules_.size();
        add_rules((*name)[1]);
        for (std::size_t i = first; i < rules_.size(); ++i) rules_[i].named = true;
      } else if (equals == std::string::npos) {
        rules_.push_back({part, {"*", "*", "*"}, parse_precision(part, part)});
      } else {
        add_rule(part, trimmed(std::string_view(part).substr(0, equals)),
                 std::string(trimmed(std::string_view(part).substr(equals + 1))));
      }
    }
  }

  void add_rule(const std::string& text, std::string_view pattern, const std::string& chosen) {
    const std::vector<std::string> fields = split(pattern, ':');
    if (fields.size() != 3 ||
        std::any_of(fields.begin(), fields.end(), [](const std::string& f) { return f.empty(); }))
      fail("scheme: '", text, "': expected stage:block:layer=PRECISION");
    rules_.push_back({text, {fields[0], fields[1], fields[2]}, parse_precision(chosen, text)});
  }

  static precision parse_precision(const std::string& word, const std::string& rule_text) {
    for (std::size_t i = 0; i < precision_names.size(); ++i)
      if (word == precision_names[i]) return static_cast<precision>(i);
    std::string known;
    for (const auto& n : named) known += std::string(n[0]) + ", ";
    fail("scheme: '", rule_text, "': '", word, "' is neither a precision (fp32, bf16, int8, ",
         "int8-weights) nor a named scheme (", known, "or a rule stage:block:layer=PRECISION)");
  }

  static bool matches(const rule& r, const layer_place& place) {
    for (std::size_t i = 0; i < 3; ++i)
      if (!matches_field(r.fields[i], place.fields[i])) return false;
    return true;
  }

  static bool matches_field(std::string_view list, std::string_view text) {
    const bool negated = list.starts_with('!');
    if (negated) list.remove_prefix(1);
    const std::vector<std::string> patterns = split(list, '|');
    return negated != std::any_of(patterns.begin(), patterns.end(),
                                  [&](const std::string& p) { return matches_glob(p, text); });
  }

  /// Linear in practice and never exponential: a star is only ever retried from the last one.
  static bool matches_glob(std::string_view pattern, std::string_view text) {
    std::size_t p = 0, t = 0, star = std::string_view::npos, retry = 0;
    while (t < text.size()) {
      if (p < pattern.size() && pattern[p] == '*') {
        star = p++;
        retry = t;
      } else if (p < pattern.size() && pattern[p] == text[t]) {
        ++p;
        ++t;
      } else if (star != std::string_view::npos) {
        p = star + 1;
        t = ++retry;
      } else {
        return false;
      }
    }
    while (p < pattern.size() && pattern[p] == '*') ++p;
    return p == pattern.size();
  }

  std::string text_;
  std::vector<rule> rules_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
