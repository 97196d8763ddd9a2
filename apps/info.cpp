#include <cstdio>
#include <string>
#include <vector>

#include <kernels/active.hpp>
#include <microtome/macs.hpp>
#include <microtome/microtome.hpp>

#include "commands.hpp"

namespace microtome::app {

namespace {

/// The layers of a model and what they are computed in.
struct layer_list : layer_hook {
  void load(layer_weight& layer) override {
    found.push_back(layer);
    found.back().values = {};
  }
  std::vector<layer_weight> found;
  index_t kept = 0;
};

void show_model(const std::string& path) {
  const safetensors file(path);
  const lite_medsam_config config = lite_medsam_config::from(file);
  index_t parameters = 0;
  for (const auto& [name, entry] : file.tensors()) parameters += entry.extents.size();
  std::printf("\nfile          %s\n", path.c_str());
  for (const auto& [key, value] : file.metadata())
    if (key != "config") std::printf("%-13s %s\n", key.c_str(), value.c_str());
  std::printf("parameters    %.2f M in %zu tensors\n", static_cast<double>(parameters) / 1e6,
              file.tensors().size());
  std::printf("input         %td x %td x %td\n", config.image_size, config.image_size,
              config.pixel_channels);
  std::printf("encoder       %.2f GMAC without padding\n",
              static_cast<double>(encoder_macs(config)) / 1e9);
  for (std::size_t i = 0; i < config.stages.size(); ++i) {
    const stage_config& s = config.stages[i];
    if (s.blocks == stage_config::kind::conv)
      std::printf("  layers.%zu    %td MBConv, %td channels, expanded %td times\n", i, s.depth,
                  s.dim, s.expand);
    else
      std::printf("  layers.%zu    %td blocks, %td channels, %td heads, windows %td x %td\n", i,
                  s.depth, s.dim, s.heads, s.window, s.window);
  }
  std::printf("\n");
  layer_list layers;
  static_cast<void>(lite_medsam(file, {.hook = &layers}));
  for (const layer_weight& layer : layers.found)
    if (layer.inputs != precision::fp32)
      std::printf("%-13s %s\n", name_of(layer.inputs), layer_place(layer.name).text().c_str());
    else
      ++layers.kept;
  std::printf("%-13s %td layers\n\n", "fp32", layers.kept);
  for (const auto& [name, entry] : file.tensors())
    std::printf("%-5s %-20s %s\n", entry.dtype.c_str(), to_string(entry.extents).c_str(),
                name.c_str());
}

void show_targets() {
  const kernels::table& k = kernels::active();
  std::printf("target        %s: %s\n", k.name, k.description);
  for (const kernels::compiled_target& t : kernels::compiled_targets()) {
    const char* state = t.kernels == &k ? "chosen" : "supported";
    std::printf("  %-18s  %s%s\n", t.kernels->name, t.missing.empty() ? state : "this CPU lacks ",
                t.missing.c_str());
  }
  std::printf("CPU           %s\n", kernels::cpu_features().c_str());
  std::printf("bf16          %s\n", k.native_bf16 ? "dot products" : "emulated, same results");
}

}  // namespace

command add_info(CLI::App& app) {
  const auto model = std::make_shared<std::string>();
  app.add_option("-m,--model", *model, "model file");
  return [model] {
    std::printf("version       %s\n", MICROTOME_VERSION);
    show_targets();
    std::printf("threads       %d\n", default_threads());
    if (!model->empty()) show_model(*model);
    return 0;
  };
}

}  // namespace microtome::app
