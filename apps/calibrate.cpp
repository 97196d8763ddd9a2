#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <microtome/calibration.hpp>
#include <microtome/io/case.hpp>
#include <microtome/microtome.hpp>

#include "commands.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;

struct calibrate_options {
  std::string model, input, output;
  observer_kind observer = observer_kind::mse;
  int threads = 0;
};

std::vector<fs::path> find_cases(const std::string& input) {
  if (!fs::exists(input)) throw usage_error(input + ": no such file or folder");
  if (!fs::is_directory(input)) return {input};
  std::vector<fs::path> cases;
  for (const fs::directory_entry& entry : fs::directory_iterator(input))
    if (entry.path().extension() == ".npz") cases.push_back(entry.path());
  if (cases.empty()) throw usage_error(input + ": no .npz cases in this folder");
  std::sort(cases.begin(), cases.end());
  return cases;
}

void segment_case(session& s, const fs::path& path) {
  const io::segmentation_case input = io::read_case(path);
  if (const auto* image = std::get_if<io::image_case>(&input))
    segment(s, image->image, image->boxes);
  else
    segment(s, std::get<io::volume_case>(input).volume, std::get<io::volume_case>(input).boxes);
}

int run_calibrate(const calibrate_options& options) {
  const std::vector<fs::path> cases = find_cases(options.input);
  const safetensors file(options.model);
  calibrator watching;
  const lite_medsam model(file, {.hook = &watching});
  session s(model, {.threads = options.threads});
  for (const fs::path& path : cases) {
    segment_case(s, path);
    watching.end_case();
  }
  watching.begin_histograms();
  for (const fs::path& path : cases) segment_case(s, path);
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
