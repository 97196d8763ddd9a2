#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include <kernels/active.hpp>
#include <microtome/microtome.hpp>

#include "commands.hpp"

namespace microtome::app {

namespace {

/// The layers of a model and what they are computed in.
struct layer_list : layer_hook {
  struct row {
    std::string place;
    precision inputs;
    index_t size;
    layer_sparsity zeros;
  };
  void load(layer_weight& layer) override {
    found.push_back(
        {layer_place(layer.name).text(), layer.inputs, layer.values.size(), layer_sparsity(layer)});
  }
  std::vector<row> found;
};

/// Layers that are not dense fp32, and why they are sparse or not; then the others' number.
void show_layers(const layer_list& layers, sparsity mode) {
  index_t plain = 0;
  for (const auto& [place, inputs, size, zeros] : layers.found) {
    const double percent = 100.0 * static_cast<double>(zeros.zeros) / static_cast<double>(size);
    if (inputs == precision::fp32 && percent < 1) {
      ++plain;
      continue;
    }
    std::printf("%-13s %-28s", name_of(inputs), place.c_str());
    if (percent >= 1) {
      std::printf(" %5.1f %% zeros, %s: ", percent, zeros.pays(mode) ? "sparse" : "dense");
      if (zeros.why)
        std::printf("%s", zeros.why);
      else
        std::printf("sparse takes %.2f of the dense time", double{zeros.relative_time});
    }
    std::printf("\n");
  }
  std::printf("%-13s %td layers, dense\n\n", "fp32", plain);
}

/// What happens to an image before it is encoded.
std::string words(const input_policy& policy) {
  std::ostringstream text;
  text << (policy.resize == input_policy::interpolation::area ? "area" : "antialiased linear")
       << " interpolation, "
       << (policy.normalize ? "fixed mean and deviation" : "minimum to maximum") << "; prompts in "
       << policy.frame << " x " << policy.frame;
  return text.str();
}

void show_model(const std::string& path, sparsity mode) {
  const safetensors file(path);
  index_t parameters = 0;
  for (const auto& [name, entry] : file.tensors())
    if (!name.ends_with("_mask")) parameters += entry.extents.size();
  std::printf("\nfile          %s\n", path.c_str());
  for (const auto& [key, value] : file.metadata())
    if (key != "config") std::printf("%-13s %s\n", key.c_str(), value.c_str());
  std::printf("parameters    %.2f M stored in %zu tensors\n", static_cast<double>(parameters) / 1e6,
              file.tensors().size());
  layer_list layers;
  const sam model(file, {.hook = &layers, .zeros = mode});
  const image_encoder& encoder = model.encoder;
  std::printf("input         %td x %td x 3, %s\n", encoder.image_size(), encoder.image_size(),
              words(model.config.input).c_str());
  std::printf("encoder       %s, %.2f GMAC without padding\n", encoder.kind().c_str(),
              static_cast<double>(encoder.macs()) / 1e9);
  for (const std::string& part : encoder.parts()) std::printf("  %s\n", part.c_str());
  std::printf("\n");
  show_layers(layers, mode);
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
  const auto zeros = std::make_shared<sparsity>(sparsity::automatic);
  app.add_option("-m,--model", *model, "model file");
  add_sparse(app, *zeros);
  return [model, zeros] {
    std::printf("version       %s\n", MICROTOME_VERSION);
    show_targets();
    std::printf("threads       %d\n", default_threads());
    if (!model->empty()) show_model(*model, *zeros);
    return 0;
  };
}

}  // namespace microtome::app
