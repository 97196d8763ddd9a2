#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <microtome/microtome.hpp>
#include <microtome/model_file/safetensors_writer.hpp>
#include <microtome/quantization/calibration.hpp>

#include "cases.hpp"
#include "commands.hpp"
#include "plot.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;

struct calibrate_options {
  std::string model, input, output, moments, plot;
  observer_kind observer = observer_kind::mse;
  float headroom = 0.25f;
  int threads = 0;
};

value_range widest(const layer_range& found) {
  value_range all;
  for (const value_range& r : found.ranges)
    all = {std::min(all.low, r.low), std::max(all.high, r.high)};
  return all;
}

/// What moment_rounder reads.
void write_moments(const std::string& path, const activation_ranges& ranges, calibrator& watching) {
  safetensors_writer out;
  out.metadata("format", "microtome moments");
  out.metadata("model", ranges.model);
  for (const auto& [name, moments] : watching.moments()) out.add(name + ".moments", moments);
  out.write(path);
}

void draw(const std::string& path, const calibrator& watching, const activation_ranges& ranges) {
  constexpr index_t coarse = 32;  // bins of the histogram in a bar of the plot
  std::vector<histogram_plot> plots;
  for (const auto& [name, histogram] : watching.histograms()) {
    histogram_plot plot{layer_place(name).text(), {}, histogram.range.low,
                        histogram.range.high,     0,  0};
    for (index_t bin = 0; bin < value_histogram::bins; bin += coarse) {
      double count = 0;
      for (index_t i = bin; i < bin + coarse; ++i) count += static_cast<double>(histogram.count(i));
      plot.counts.push_back(count);
    }
    const value_range kept = widest(ranges.layers.at(name));
    plot.kept_low = kept.low;
    plot.kept_high = kept.high;
    plots.push_back(std::move(plot));
  }
  draw_histograms(path, plots);
}

int run_calibrate(const calibrate_options& options) {
  const std::vector<fs::path> cases = find_cases(options.input);
  const safetensors file(options.model);
  calibrator watching(!options.moments.empty());
  const sam model(file, {.hook = &watching});
  {
    // One thread, so that sums of floats are the same each time.
    session s(model, {.threads = options.moments.empty() ? options.threads : 1});
    for (const fs::path& path : cases) {
      segment_case(s, io::read_case(path));
      watching.end_case();
    }
  }
  watching.begin_histograms();
  const bool extremes =
      options.observer == observer_kind::min_max || options.observer == observer_kind::average;
  if (!extremes || !options.plot.empty()) {
    session s(model, {.threads = options.threads});
    for (const fs::path& path : cases) segment_case(s, io::read_case(path));
  }
  activation_ranges ranges = watching.ranges(options.observer, file.fingerprint(), options.threads);
  ranges.widen(options.headroom);
  ranges.write(options.output);
  if (!options.moments.empty()) write_moments(options.moments, ranges, watching);
  if (!options.plot.empty()) draw(options.plot, watching, ranges);
  std::printf("%-28s %12s %12s\n", "layer", "low", "high");
  for (const auto& [name, found] : ranges.layers) {
    const value_range all = widest(found);
    std::printf("%-28s %12.5g %12.5g", layer_place(name).text().c_str(), double{all.low},
                double{all.high});
    if (found.ranges.size() > 1)
      std::printf("   %zu channels, each with its own", found.ranges.size());
    if (!found.factor.empty()) std::printf("   by factors of %zu channels", found.factor.size());
    std::printf("\n");
  }
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
  app.add_option("--headroom", options->headroom,
                 "widens ranges by this part of them, for images that reach further than these")
      ->check(CLI::Range(0.0, 10.0))
      ->capture_default_str();
  app.add_option("--moments", options->moments,
                 "safetensors file for the second moments, for `quantize --moments`");
  app.add_option("--plot", options->plot, "SVG file for the histograms");
  app.add_option("--threads", options->threads, "threads; 0: every CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  return [options] { return run_calibrate(*options); };
}

}  // namespace microtome::app
