#include <array>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>

#include <microtome/microtome.hpp>

#include "commands.hpp"
#include "moments.hpp"

namespace microtome::app {

namespace {

struct quantize_options {
  std::string model, ranges, moments, output;
  std::string scheme = "recommended";
};

int run_quantize(const quantize_options& options) {
  const safetensors file(options.model);
  std::optional<activation_ranges> ranges;
  if (!options.ranges.empty()) {
    ranges = activation_ranges::read(options.ranges);
    if (ranges->model != file.fingerprint())
      fail(options.ranges, ": the ranges are of another model (", ranges->model, ", but ",
           options.model, " is ", file.fingerprint(), ")");
  }
  if (std::filesystem::exists(options.output) &&
      std::filesystem::equivalent(options.output, options.model))
    throw usage_error(options.output + ": would replace the model that is read");
  const moments_file moments(options.moments, options.model, file.fingerprint());
  model_quantizer quantizer(scheme(options.scheme), ranges ? &*ranges : nullptr, moments.rounder());
  static_cast<void>(sam(file, {.hook = &quantizer}));
  quantizer.write(file, options.output);

  std::array<int, 4> layers{};
  for (const layer_weight& layer : quantizer.layers())
    ++layers[static_cast<std::size_t>(layer.inputs)];
  for (std::size_t i = 0; i < layers.size(); ++i)
    if (layers[i]) std::printf("%d layers in %s\n", layers[i], precision_names[i]);
  const auto megabytes = [](const std::string& path) {
    return static_cast<double>(std::filesystem::file_size(path)) / 1e6;
  };
  std::printf("%s: %.2f MB, was %.2f MB\n", options.output.c_str(), megabytes(options.output),
              megabytes(options.model));
  return 0;
}

}  // namespace

command add_quantize(CLI::App& app) {
  const auto options = std::make_shared<quantize_options>();
  app.add_option("-m,--model", options->model, "model file, in fp32")->required();
  app.add_option("-r,--ranges", options->ranges, "what `calibrate` wrote for this model");
  app.add_option("--moments", options->moments,
                 "what `calibrate --moments` wrote for this model, to round weights by");
  app.add_option("-o,--output", options->output, "model file to write")->required();
  app.add_option("--scheme", options->scheme,
                 "which layers become what: recommended, full, mix-dwsc, mix-mbc-neck, encoder, "
                 "weights-only, or "
                 "rules like 'full, 0:*:conv2|conv3=fp32, !neck:*:*=bf16'")
      ->capture_default_str();
  return [options] { return run_quantize(*options); };
}

}  // namespace microtome::app
