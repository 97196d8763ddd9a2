#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <microtome/calibration.hpp>
#include <microtome/microtome.hpp>

#include "cases.hpp"
#include "commands.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;

struct calibrate_options {
  std::string model, input, output;
  observer_kind observer = observer_kind::mse;
  int threads = 0;
};

int run_calibrate(const calibrate_options& options) {
  const std::vector<fs::path> cases = find_cases(options.input);
  const safetensors file(options.model);
  calibrator watching;
  const lite_medsam model(file, {.hook = &watching});
  session s(model, {.threads = options.threads});
  for (const fs::path& path : cases) {
    segment_case(s, io::read_case(path));
    watching.end_case();
  }
  watching.begin_histograms();
  for (const fs::path& path : cases) segment_case(s, io::read_case(path));
  const activation_ranges ranges = watching.ranges(options.observer, file.fingerprint());
  ranges.write(options.output);
  std::printf("%-28s %12s %12s\n", "layer", "low", "high");
  for (const auto& [name, range] : ranges.layers)
    std::printf("%-28s %12.5g %12.5g\n", layer_place(name).text().c_str(), double{range.low},
                double{range.high});
  std::printf("%zu layers, %td cases, observer %s: %s\n", ranges.layers.size(), ranges.cases,
              ranges.observer.c_str(), options.output.c_str());
  return 0;
}

}  // namespace

command add_calibrate(CLI::App& app) {
  const auto options = std::make_shared<calibrate_options>();
  app.add_option("-m,--model", options->model, "model file, in fp32")->required();
  app.add_option("-i,--input", options->input, "folder of .npz cases like those to come")
      ->required();
  app.add_option("-o,--output", options->output, "JSON file for the ranges")->required();
  std::map<std::string, observer_kind> names;
  for (std::size_t i = 0; i < observer_names.size(); ++i)
    names[observer_names[i]] = static_cast<observer_kind>(i);
  app.add_option("--observer", options->observer, "how a range is made of what was seen")
      ->transform(
          CLI::CheckedTransformer(names).description("{min-max,average,percentile,mse,entropy}"))
      ->default_str("mse");
  app.add_option("--threads", options->threads, "threads; 0: every CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  return [options] { return run_calibrate(*options); };
}

}  // namespace microtome::app
