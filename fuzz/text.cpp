// Ranges (JSON), schemes, and COCO's annotations and results (JSON), told apart by an input's first
// byte.
#include <microtome/io/coco.hpp>
#include <microtome/quantization/quantize.hpp>

#include "support.hpp"

namespace microtome::fuzz {

/// Two lines: annotations, and results for them. Every mask that is accepted has to have its size.
inline void read_coco(std::string_view text) {
  const std::size_t end = text.find('\n');
  const auto ignore = [](const std::string&) {};
  const auto check = [](const run_lengths& mask) {
    const run_lengths again = io::expanded_runs(io::compressed_runs(mask), mask.height, mask.width);
    if (again.counts != mask.counts || common_area(mask, mask) != area_of(mask)) std::abort();
  };
  const io::coco_instances instances =
      io::parse_coco_instances(text.substr(0, end), "annotations.json", ignore);
  for (const auto& [id, annotations] : instances.annotations)
    for (const io::coco_annotation& a : annotations) check(a.mask);
  if (end == text.npos) return;
  for (const auto part : {io::coco_result_part::masks, io::coco_result_part::boxes})
    for (const auto& [id, results] :
         io::parse_coco_results(text.substr(end + 1), "results.json", instances, part, ignore))
      for (const io::coco_result& r : results)
        if (part == io::coco_result_part::masks) check(r.mask);
}

inline void read(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 1, bytes.size() - 1);
  const int kind = std::to_integer<int>(bytes[0]) % 3;
  if (kind == 1) {
    const auto ranges = by_path(bytes) ? activation_ranges::read(file_of(bytes.subspan(1)).path())
                                       : activation_ranges::parse(text, "ranges.json");
    for (const auto& [name, layer] : ranges.layers)
      for (const value_range& range : layer.ranges) static_cast<void>(range.levels());
    return;
  }
  if (kind == 2) return read_coco(text);
  scheme rules(text);
  for (const char* layer :
       {"image_encoder.layers.0.blocks.0.conv2.c", "image_encoder.neck.2",
        "image_encoder.layers.1.blocks.3.attn.qkv", "mask_decoder.transformer.layers.0.mlp.lin1"})
    static_cast<void>(name_of(rules.choose(layer_place(layer))));
  rules.check_all_used();
}

}  // namespace microtome::fuzz
