#include <algorithm>
#include <array>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#if __has_include(<sys/resource.h>)
#include <sys/resource.h>
#endif

#include <kernels/active.hpp>
#include <microtome/microtome.hpp>

#include "commands.hpp"

namespace microtome::app {

namespace {

using clock = std::chrono::steady_clock;

double milliseconds_since(clock::time_point start) {
  return std::chrono::duration<double, std::milli>(clock::now() - start).count();
}

/// Times in ms of repeated runs.
struct timings {
  std::vector<double> ms;

  double median() const {
    std::vector<double> sorted = ms;
    std::sort(sorted.begin(), sorted.end());
    const std::size_t n = sorted.size();
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
  }
  double min() const { return *std::min_element(ms.begin(), ms.end()); }
  double max() const { return *std::max_element(ms.begin(), ms.end()); }
  nlohmann::ordered_json json() const {
    return {{"min", min()}, {"median", median()}, {"max", max()}};
  }
};

/// Takes the time at the end of each stage of the encoder.
class stopwatch : public tracer {
public:
  bool wants(std::string_view name) const override { return !stage(name).empty(); }

  void record(std::string_view name, view<const float>, layout, index_t) override {
    const std::string current = stage(name);
    const auto now = clock::now();
    if (stages_.empty() || stages_.back().first != current) stages_.emplace_back(current, 0.0);
    stages_.back().second += std::chrono::duration<double, std::milli>(now - last_).count();
    last_ = now;
  }

  void start() { last_ = clock::now(); }
  const std::vector<std::pair<std::string, double>>& stages() const { return stages_; }

private:
  /// The stage that a record of `name` ends or is part of; empty for what must not be recorded,
  /// since it would cost work that inference does not do.
  static std::string stage(std::string_view name) {
    constexpr std::string_view encoder = "image_encoder.";
    if (name == "image_embedding") return "neck";
    if (!name.starts_with(encoder)) return "";
    name.remove_prefix(encoder.size());
    if (name == "patch_embed") return "patch_embed";
    // A block of a stage, such as layers.0.blocks.1 or backbone.stages.0.op_list.1.
    std::vector<std::size_t> numbers;  // where they end
    for (std::size_t i = 0; i < name.size(); ++i)
      if (std::isdigit(static_cast<unsigned char>(name[i])) &&
          (i + 1 == name.size() || name[i + 1] == '.'))
        numbers.push_back(i + 1);
    if (numbers.size() != 2 || numbers[1] != name.size() || name.starts_with("neck")) return "";
    return std::string(name.substr(0, numbers[0]));
  }

  clock::time_point last_{};
  std::vector<std::pair<std::string, double>> stages_;
};

/// FLOP/s of the FMA units with all threads busy: the best of a few tries.
double measure_peak(int threads) {
  const kernels::table& k = kernels::active();
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::vector<double> flops(static_cast<std::size_t>(threads));
    const auto start = clock::now();
    parallel_for(threads, threads, [&](index_t task, int) {
      flops[static_cast<std::size_t>(task)] = k.fma_peak(2'000'000);
    });
    double total = 0;
    for (const double f : flops) total += f;
    best = std::max(best, total / milliseconds_since(start) / 1e6);
  }
  return best;
}

/// Largest resident memory of this process so far; not a number where the system does not tell.
double peak_rss_mb() {
  // Linux counts a process's parent at the fork into ru_maxrss, but not into VmHWM.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) * 1024 / 1e6;
#if __has_include(<sys/resource.h>)
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  constexpr double unit = 1;
#else
  constexpr double unit = 1024;
#endif
  return static_cast<double>(usage.ru_maxrss) * unit / 1e6;
#else
  return std::nan("");
#endif
}

/// Boxes that are decoded together.
constexpr int batched_boxes = 16;

struct bench_options {
  std::string model;
  int threads = 0, runs = 10;
  bool json = false;
  padding windows = padding::exact;
  precision factors = precision::fp32;
  sparsity zeros = sparsity::automatic;
  bool winograd = true;
};

/// Counts layers by what they are computed in.
struct precision_count : layer_hook {
  void load(layer_weight& layer) override { ++layers[static_cast<std::size_t>(layer.inputs)]; }

  /// Such as "int8 (74 layers), fp32 (3 layers)", or "fp32" alone; what most layers have first.
  std::string text() const {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < layers.size(); ++i)
      if (layers[i]) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return layers[a] > layers[b]; });
    std::string found;
    for (const std::size_t i : order) {
      found += (found.empty() ? "" : ", ") + std::string(precision_names[i]);
      if (order.size() > 1) found += " (" + std::to_string(layers[i]) + " layers)";
    }
    return found;
  }

  std::array<index_t, precision_names.size()> layers{};
};

/// An image of noise: no kernel's time depends on the values.
tensor<float> make_image(index_t side) {
  tensor<float> image(shape{side * side, 3});
  std::uint32_t state = 1;
  for (float& value : image) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) / static_cast<float>(1 << 24);
  }
  return image;
}

int run_bench(const bench_options& options) {
  precision_count precisions;
  const sam model = sam::load(options.model, {.windows = options.windows,
                                              .inputs = options.factors,
                                              .hook = &precisions,
                                              .zeros = options.zeros,
                                              .winograd = options.winograd});
  session s(model, {.threads = options.threads});
  const index_t side = model.encoder.image_size();
  const tensor<float> image = make_image(side);
  const auto edge = static_cast<float>(model.config.input.frame);
  const std::vector<box> one{{edge / 4, edge / 4, edge * 3 / 4, edge * 3 / 4}};
  const std::vector<box> batch(batched_boxes, one[0]);

  timings encoder, decoder, batched;
  double peak = 0;
  s.encode(image);
  const double encoder_rss_mb = peak_rss_mb();
  static_cast<void>(s.decode(batch));
  for (int run = 0; run < options.runs; ++run) {
    auto start = clock::now();
    s.encode(image);
    encoder.ms.push_back(milliseconds_since(start));
    start = clock::now();
    static_cast<void>(s.decode(one));
    decoder.ms.push_back(milliseconds_since(start));
    start = clock::now();
    static_cast<void>(s.decode(batch));
    batched.ms.push_back(milliseconds_since(start) / batched_boxes);
    if (run == options.runs / 2) peak = measure_peak(s.threads());
  }
  const double gflops = 2e-6 * static_cast<double>(model.encoder.macs()) / encoder.median();

  if (options.json) {
    const nlohmann::ordered_json result = {{"model", options.model},
                                           {"precision", precisions.text()},
                                           {"target", kernels::active().name},
                                           {"threads", s.threads()},
                                           {"runs", options.runs},
                                           {"encoder_ms", encoder.json()},
                                           {"decoder_ms", decoder.json()},
                                           {"batched_box_ms", batched.json()},
                                           {"gflops", gflops},
                                           {"peak_gflops", peak},
                                           {"encoder_peak_rss_mb", encoder_rss_mb},
                                           {"peak_rss_mb", peak_rss_mb()}};
    std::printf("%s\n",
                result.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    return 0;
  }
  std::printf("%s, %d threads, %d runs, %s%s\n", kernels::active().description, s.threads(),
              options.runs, precisions.text().c_str(),
              precisions.layers[static_cast<std::size_t>(precision::bf16)] > 0 &&
                      !kernels::active().native_bf16
                  ? "; bf16 without instructions for it"
                  : "");
  std::printf("             median     min     max  ms\n");
  std::printf("encoder     %7.1f %7.1f %7.1f\n", encoder.median(), encoder.min(), encoder.max());
  std::printf("decoder     %7.1f %7.1f %7.1f    the first box on an image\n", decoder.median(),
              decoder.min(), decoder.max());
  std::printf("            %7.1f %7.1f %7.1f    each of %d more\n", batched.median(), batched.min(),
              batched.max(), batched_boxes);
  std::printf("encoder     %.1f GFLOP/s of useful work, %.0f %% of the measured peak of %.1f\n",
              gflops, 100 * gflops / peak, peak);
  std::printf("memory      %.0f MB at most until the first image is encoded, %.0f MB in all\n\n",
              encoder_rss_mb, peak_rss_mb());
  std::printf("stages of one run, ms\n");
  stopwatch watch;
  s.set_tracer(&watch);
  watch.start();
  s.encode(image);
  for (const auto& [name, ms] : watch.stages()) std::printf("%-11s %7.1f\n", name.c_str(), ms);
  return 0;
}

}  // namespace

command add_bench(CLI::App& app) {
  const auto options = std::make_shared<bench_options>();
  app.add_option("-m,--model", options->model, "model file")->required();
  app.add_option("--threads", options->threads, "threads; 0: every CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--runs", options->runs, "timed runs")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  app.add_flag("--json", options->json, "print one JSON object");
  add_padding(app, options->windows);
  add_precision(app, options->factors);
  add_sparse(app, options->zeros);
  add_winograd(app, options->winograd);
  return [options] { return run_bench(*options); };
}

}  // namespace microtome::app
