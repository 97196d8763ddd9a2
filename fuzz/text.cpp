// Ranges (JSON) and schemes, told apart by an input's first byte.
#include <microtome/quantization/quantize.hpp>

#include "support.hpp"

namespace microtome::fuzz {

inline void read(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 1, bytes.size() - 1);
  if (std::to_integer<int>(bytes[0]) % 2) {
    static_cast<void>(activation_ranges::parse(text, "ranges.json"));
    return;
  }
  scheme rules(text);
  for (const char* layer :
       {"image_encoder.layers.0.blocks.0.conv2.c", "image_encoder.neck.2",
        "image_encoder.layers.1.blocks.3.attn.qkv", "mask_decoder.transformer.layers.0.mlp.lin1"})
    static_cast<void>(rules.choose(layer_place(layer)));
}

}  // namespace microtome::fuzz
