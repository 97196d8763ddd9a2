#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include <microtome/imaging/metrics.hpp>
#include <microtome/microtome.hpp>
#include <microtome/quantization/quantize.hpp>

#include "cases.hpp"
#include "commands.hpp"
#include "moments.hpp"
#include "plot.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;

enum class grain { layer, block, stage };

struct sensitivity_options {
  std::string model, ranges, moments, input, output, plot;
  grain unit = grain::block;
  double budget = 0.025;
  int threads = 0;
};

struct labelled_case {
  fs::path path;
  io::segmentation_case input;
  label_map truth;
};

/// How a model does on the cases.
struct score {
  double dice = 0;       ///< against ground truth, mean over the labels of all cases
  double dice_fp32 = 1;  ///< against the fp32 model
  double iou_fp32 = 1;
  double time = 1;  ///< of a case, over fp32's just before: the median
};

/// What has been measured so far, in a file beside the table, so that a run of hours that ends
/// early is gone on with: a line that tells what was measured, then one for each scheme.
class measurements {
public:
  /// `of` tells model, ranges and cases: what others have left there is not used.
  measurements(std::string path, std::string of) : path_(std::move(path)), text_(of + '\n') {
    if (!fs::exists(path_)) return;
    const whole_file file(path_);
    const std::span<const std::byte> bytes = file.bytes();
    std::istringstream lines(
        std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
    std::string line;
    if (!std::getline(lines, line) || line != of) {
      std::fprintf(stderr, "%s: is of another model, ranges or cases; begun anew\n", path_.c_str());
      return;
    }
    while (std::getline(lines, line)) {
      score found;
      int scheme = 0;
      if (std::sscanf(line.c_str(), "%lf,%lf,%lf,%lf,%n", &found.dice, &found.dice_fp32,
                      &found.iou_fp32, &found.time, &scheme) != 4 ||
          scheme == 0)
        break;
      found_.emplace(line.substr(static_cast<std::size_t>(scheme)), found);
      text_ += line + '\n';
    }
    std::printf("%s: goes on after %zu measurements\n", path_.c_str(), found_.size());
  }

  /// What was measured of a scheme; nothing if it was not.
  const score* of(const std::string& scheme) const {
    const auto found = found_.find(scheme);
    return found == found_.end() ? nullptr : &found->second;
  }

  void add(const std::string& scheme, const score& found) {
    char numbers[128];
    std::snprintf(numbers, sizeof numbers, "%.17g,%.17g,%.17g,%.17g,", found.dice, found.dice_fp32,
                  found.iou_fp32, found.time);
    text_ += numbers + scheme + '\n';
    replace_file(path_, std::as_bytes(std::span(text_)));
  }

  /// All is measured: nobody needs the file any more.
  void finish() const {
    std::error_code absent;
    fs::remove(path_, absent);
  }

private:
  std::string path_, text_;
  std::map<std::string, score> found_;
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
      : options_(options),
        file_(options.model),
        ranges_(activation_ranges::read(options.ranges)),
        moments_(options.moments, options.model, file_.fingerprint()),
        fp32_(file_, {}) {
    if (ranges_.model != file_.fingerprint())
      fail(options.ranges, ": the ranges are of another model than ", options.model);
    read_cases();
    measured_.emplace(options.output + ".progress", inputs());
  }

  int run() {
    model_quantizer nothing(scheme("fp32"), &ranges_);
    static_cast<void>(sam(file_, {.hook = &nothing}));  // tells it of the layers
    const score whole = measure("fp32");
    std::printf("fp32: Dice %.4f\n", whole.dice);
    for (const layer_weight& layer : nothing.layers()) {
      unit& u = units_[unit_of(layer_place(layer.name))];
      u.bytes += 3 * layer.values.size();  // a byte for four
    }
    std::printf("%-44s %9s %9s %9s %9s %9s\n", "unit", "dice32", "iou32", "dice", "kB saved",
                "time");
    for (auto& [pattern, u] : units_) {
      u.found = measure(pattern + "=int8");
      std::printf("%-44s %9.5f %9.5f %9.5f %9.1f %9.3f\n", pattern.c_str(), u.found.dice_fp32,
                  u.found.iou_fp32, u.found.dice, static_cast<double>(u.bytes) / 1e3, u.found.time);
      std::fflush(stdout);
    }
    write_table(whole);
    if (!options_.plot.empty()) draw();
    propose();
    measured_->finish();
    return 0;
  }

private:
  struct unit {
    index_t bytes = 0;
    score found;
  };

  std::string unit_of(const layer_place& place) const {
    const auto& f = place.fields;
    if (options_.unit == grain::stage) return f[0] + ":*:*";
    if (options_.unit == grain::block) return f[0] + ":" + f[1] + ":*";
    return place.text();
  }

  void read_cases() {
    for (const fs::path& path : find_cases(options_.input))
      cases_.push_back({path, io::read_case(path), io::read_labels(path, "gts")});
  }

  static void mix(std::uint64_t& hash, std::span<const std::byte> bytes) {
    for (const std::byte b : bytes)
      hash = (hash ^ std::to_integer<std::uint64_t>(b)) * 0x100000001b3;
  }

  /// What a measurement depends on besides its scheme.
  std::string inputs() const {
    std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
    for (const std::string& path : {options_.ranges, options_.moments})
      if (!path.empty()) mix(hash, whole_file(path).bytes());
    for (const labelled_case& c : cases_) {
      const std::string text = c.path.string() + ' ' + std::to_string(fs::file_size(c.path));
      mix(hash, std::as_bytes(std::span(text)));
    }
    return "microtome " MICROTOME_VERSION ", model " + file_.fingerprint() +
           ", ranges, moments and cases " + std::to_string(hash);
  }

  /// Loads the model with layers as the scheme says and segments all cases, each in fp32 first: a
  /// machine that gets busier or hotter slows both down.
  score measure(const std::string& text) {
    if (const score* before = measured_->of(text)) return *before;
    model_quantizer hook(scheme(text), &ranges_, moments_.rounder());
    const sam model(file_, {.hook = &hook});
    session fp32(fp32_, {.threads = options_.threads}), s(model, {.threads = options_.threads});
    std::vector<double> times, dice, dice_fp32, iou_fp32;
    for (const labelled_case& c : cases_) {
      const auto timed = [&](session& on, label_map& found) {
        const auto start = std::chrono::steady_clock::now();
        found = segment_case(on, c.input);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      };
      label_map exact, found;
      const double before = timed(fp32, exact);
      times.push_back(timed(s, found) / before);
      for_labels(c.truth, found, [&](double d) { dice.push_back(d); });
      for_labels(exact, found, [&](double d) {
        dice_fp32.push_back(d);
        iou_fp32.push_back(d / (2 - d));
      });
    }
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2),
                     times.end());
    const score found{mean(dice), mean(dice_fp32), mean(iou_fp32), times[times.size() / 2]};
    measured_->add(text, found);
    return found;
  }

  static double mean(const std::vector<double>& values) {
    double sum = 0;
    for (const double v : values) sum += v;
    return values.empty() ? 1.0 : sum / static_cast<double>(values.size());
  }

  /// Units, those that change most of fp32's masks first.
  std::vector<std::pair<std::string, const unit*>> by_loss() const {
    std::vector<std::pair<std::string, const unit*>> sorted;
    for (const auto& [pattern, u] : units_) sorted.emplace_back(pattern, &u);
    std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
      return a.second->found.dice_fp32 < b.second->found.dice_fp32;
    });
    return sorted;
  }

  void write_table(const score& whole) const {
    std::string text = "unit,dice,dice_loss,dice_to_fp32,miou_to_fp32,bytes_saved,time\n";
    char line[160];
    for (const auto& [pattern, u] : units_) {
      std::snprintf(line, sizeof line, ",%.6f,%.6f,%.6f,%.6f,%td,%.4f\n", u.found.dice,
                    whole.dice - u.found.dice, u.found.dice_fp32, u.found.iou_fp32, u.bytes,
                    u.found.time);
      text += pattern + line;
    }
    replace_file(options_.output, std::as_bytes(std::span(text)));
  }

  void draw() const {
    std::vector<std::pair<std::string, double>> bars;
    for (const auto& [pattern, u] : by_loss()) bars.emplace_back(pattern, 1 - u->found.dice_fp32);
    draw_bars(options_.plot, "1 - Dice against fp32, with this alone in int8", bars);
  }

  /// All in int8 but for the units that cost most, as few as keep what is lost of fp32's masks
  /// within the budget. (Dice against labels would hide it: where fp32 errs, noise may help.)
  /// Losses are not quite additive, so that each proposal is measured.
  void propose() {
    std::string text = "full";
    const auto worst = by_loss();
    for (std::size_t kept = 0;; ++kept) {
      const score found = measure(text);
      const double loss = 1 - found.dice_fp32;
      std::printf("%s: loss %.5f, Dice %.4f, time %.3f\n", text.c_str(), loss, found.dice,
                  found.time);
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
  const moments_file moments_;
  const sam fp32_;
  std::vector<labelled_case> cases_;
  std::optional<measurements> measured_;
  std::map<std::string, unit> units_;
};

}  // namespace

command add_sensitivity(CLI::App& app) {
  const auto options = std::make_shared<sensitivity_options>();
  app.add_option("-m,--model", options->model, "model file, in fp32")->required();
  app.add_option("-r,--ranges", options->ranges, "what `calibrate` wrote for this model")
      ->required();
  app.add_option("--moments", options->moments,
                 "what `calibrate --moments` wrote for this model, to round weights by");
  app.add_option("-i,--input", options->input, "folder of .npz cases with boxes and gts")
      ->required();
  app.add_option(
         "-o,--output", options->output,
         "CSV file, a row for each unit; a run that was interrupted goes on from OUTPUT.progress")
      ->required();
  app.add_option("--plot", options->plot, "SVG file for a bar plot");
  const std::map<std::string, grain> names{
      {"layer", grain::layer}, {"block", grain::block}, {"stage", grain::stage}};
  app.add_option("--by", options->unit, "what is quantised alone")
      ->transform(CLI::CheckedTransformer(names).description("{layer,block,stage}"))
      ->default_str("block");
  app.add_option("--budget", options->budget,
                 "Dice with fp32's masks that the proposed scheme may lose")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--threads", options->threads, "threads; 0: every CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  return [options] { return analysis(*options).run(); };
}

}  // namespace microtome::app
