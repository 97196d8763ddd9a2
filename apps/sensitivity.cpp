#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <microtome/metrics.hpp>
#include <microtome/microtome.hpp>
#include <microtome/quantize.hpp>

#include "cases.hpp"
#include "commands.hpp"
#include "plot.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;

enum class grain { layer, block, stage };

struct sensitivity_options {
  std::string model, ranges, input, output, plot;
  grain unit = grain::block;
  double budget = 0.005;
  int threads = 0;
};

struct labelled_case {
  fs::path path;
  io::segmentation_case input;
  label_map truth;
  label_map fp32;  // what the model finds before anything is quantised
};

/// How a model does on the cases.
struct score {
  double dice = 0;       ///< against ground truth, mean over the labels of all cases
  double dice_fp32 = 1;  ///< against the fp32 model
  double iou_fp32 = 1;
  double ms = 0;  ///< median time of a case
};

/// Calls f with the Dice coefficient of each label that either map has.
template <class Function>
void for_labels(const label_map& a, const label_map& b, Function&& f) {
  std::map<std::uint16_t, std::array<index_t, 3>> counts;  // of a, of b, of both
  for (index_t i = 0; i < a.size(); ++i) {
    ++counts[a[i]][0];
    ++counts[b[i]][1];
    if (a[i] == b[i]) ++counts[a[i]][2];
  }
  counts.erase(0);
  for (const auto& [label, n] : counts)
    f(2.0 * static_cast<double>(n[2]) / static_cast<double>(n[0] + n[1]));
}

class analysis {
public:
  analysis(const sensitivity_options& options)
      : options_(options), file_(options.model), ranges_(activation_ranges::read(options.ranges)) {
    if (ranges_.model != file_.fingerprint())
      fail(options.ranges, ": the ranges are of another model than ", options.model);
    read_cases();
  }

  int run() {
    model_quantizer nothing(scheme("fp32"), &ranges_);
    const score whole = measure(nothing, true);
    std::printf("fp32: Dice %.4f, %.0f ms a case\n", whole.dice, whole.ms);
    for (const layer_weight& layer : nothing.layers()) {
      unit& u = units_[unit_of(layer_place(layer.name))];
      u.bytes += 3 * layer.values.size();  // a byte for four
    }
    std::printf("%-44s %9s %9s %9s %9s %8s\n", "unit", "loss", "dice32", "iou32", "kB saved",
                "ms saved");
    for (auto& [pattern, u] : units_) {
      model_quantizer one(scheme(pattern + "=int8"), &ranges_);
      u.found = measure(one, false);
      u.loss = whole.dice - u.found.dice;
      u.ms_saved = whole.ms - u.found.ms;
      std::printf("%-44s %9.5f %9.5f %9.5f %9.1f %8.1f\n", pattern.c_str(), u.loss,
                  u.found.dice_fp32, u.found.iou_fp32, static_cast<double>(u.bytes) / 1e3,
                  u.ms_saved);
      std::fflush(stdout);
    }
    write_table();
    if (!options_.plot.empty()) draw();
    propose(whole);
    return 0;
  }

private:
  struct unit {
    index_t bytes = 0;
    score found;
    double loss = 0, ms_saved = 0;
  };

  std::string unit_of(const layer_place& place) const {
    const auto& f = place.fields;
    if (options_.unit == grain::stage) return f[0] + ":*:*";
    if (options_.unit == grain::block) return f[0] + ":" + f[1] + ":*";
    return place.text();
  }

  void read_cases() {
    for (const fs::path& path : find_cases(options_.input))
      cases_.push_back({path, io::read_case(path), io::read_labels(path, "gts"), {}});
  }

  /// Loads the model as `hook` makes it and segments all cases; `first` keeps what it finds.
  score measure(model_quantizer& hook, bool first) {
    const lite_medsam model(file_, {.hook = &hook});
    session s(model, {.threads = options_.threads});
    std::vector<double> times, dice, dice_fp32, iou_fp32;
    for (labelled_case& c : cases_) {
      const auto start = std::chrono::steady_clock::now();
      label_map found = segment_case(s, c.input);
      const std::chrono::duration<double, std::milli> took =
          std::chrono::steady_clock::now() - start;
      times.push_back(took.count());
      for_labels(c.truth, found, [&](double d) { dice.push_back(d); });
      if (first) {
        c.fp32 = std::move(found);
        continue;
      }
      for_labels(c.fp32, found, [&](double d) {
        dice_fp32.push_back(d);
        iou_fp32.push_back(d / (2 - d));
      });
    }
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2),
                     times.end());
    score out{mean(dice), 1, 1, times[times.size() / 2]};
    if (!first) {
      out.dice_fp32 = mean(dice_fp32);
      out.iou_fp32 = mean(iou_fp32);
    }
    return out;
  }

  static double mean(const std::vector<double>& values) {
    double sum = 0;
    for (const double v : values) sum += v;
    return values.empty() ? 1.0 : sum / static_cast<double>(values.size());
  }

  /// Units, those that cost most first.
  std::vector<std::pair<std::string, const unit*>> by_loss() const {
    std::vector<std::pair<std::string, const unit*>> sorted;
    for (const auto& [pattern, u] : units_) sorted.emplace_back(pattern, &u);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const auto& a, const auto& b) { return a.second->loss > b.second->loss; });
    return sorted;
  }

  void write_table() const {
    std::string text = "unit,dice,dice_loss,dice_to_fp32,miou_to_fp32,bytes_saved,ms_saved\n";
    char line[160];
    for (const auto& [pattern, u] : units_) {
      std::snprintf(line, sizeof line, ",%.6f,%.6f,%.6f,%.6f,%td,%.2f\n", u.found.dice, u.loss,
                    u.found.dice_fp32, u.found.iou_fp32, u.bytes, u.ms_saved);
      text += pattern + line;
    }
    io::replace_file(options_.output, std::as_bytes(std::span(text)));
  }

  void draw() const {
    std::vector<std::pair<std::string, double>> bars;
    for (const auto& [pattern, u] : by_loss()) bars.emplace_back(pattern, 1 - u->found.dice_fp32);
    std::stable_sort(bars.begin(), bars.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    draw_bars(options_.plot, "1 - Dice against fp32, with this alone in int8", bars);
  }

  /// All in int8 but for the units that cost most, as few as keep the loss within the budget.
  /// Losses are not quite additive, so that each proposal is measured.
  void propose(const score& whole) {
    std::string text = "full";
    const auto worst = by_loss();
    for (std::size_t kept = 0;; ++kept) {
      model_quantizer proposal{scheme(text), &ranges_};
      const score found = measure(proposal, false);
      const double loss = whole.dice - found.dice;
      std::printf("%s: loss %.5f, %.0f ms a case\n", text.c_str(), loss, found.ms);
      if (loss <= options_.budget) {
        std::printf("scheme within %.4f: %s\n", options_.budget, text.c_str());
        return;
      }
      if (kept == worst.size()) break;
      text += ", " + worst[kept].first + "=fp32";
    }
    std::printf("no scheme keeps the loss within %.4f\n", options_.budget);
  }

  const sensitivity_options& options_;
  const safetensors file_;
  const activation_ranges ranges_;
  std::vector<labelled_case> cases_;
  std::map<std::string, unit> units_;
};

}  // namespace

command add_sensitivity(CLI::App& app) {
  const auto options = std::make_shared<sensitivity_options>();
  app.add_option("-m,--model", options->model, "model file, in fp32")->required();
  app.add_option("-r,--ranges", options->ranges, "what `calibrate` wrote for this model")
      ->required();
  app.add_option("-i,--input", options->input, "folder of .npz cases with boxes and gts")
      ->required();
  app.add_option("-o,--output", options->output, "CSV file, a row for each unit")->required();
  app.add_option("--plot", options->plot, "SVG file for a bar plot");
  const std::map<std::string, grain> names{
      {"layer", grain::layer}, {"block", grain::block}, {"stage", grain::stage}};
  app.add_option("--by", options->unit, "what is quantised alone")
      ->transform(CLI::CheckedTransformer(names).description("{layer,block,stage}"))
      ->default_str("block");
  app.add_option("--budget", options->budget, "Dice that the proposed scheme may lose")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--threads", options->threads, "threads; 0: every CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  return [options] { return analysis(*options).run(); };
}

}  // namespace microtome::app
