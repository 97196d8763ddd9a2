#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <microtome/io/case.hpp>
#include <microtome/microtome.hpp>

#include "commands.hpp"

namespace microtome::app {

namespace {

struct trace_options {
  std::string model, input, output, only;
  int threads = 0;
  precision factors = precision::fp32;
  sparsity zeros = sparsity::automatic;
  bool winograd = true;
};

/// Collects what is at or below a module path, in PyTorch's layout.
class collecting_tracer : public tracer {
public:
  explicit collecting_tracer(std::string only) : only_(std::move(only)) {}

  bool wants(std::string_view name) const override { return below(name, only_); }

  void record(std::string_view name, view<const float> value, layout order,
              index_t width) override {
    const index_t rows = value.extent(0), channels = value.extent(1);
    if (order == layout::tokens) {
      append(std::string(name), {value.data(), {1, rows, channels}});
      return;
    }
    tensor<float> channels_first(shape{1, channels, rows / width, width});
    for (index_t row = 0; row < rows; ++row)
      for (index_t c = 0; c < channels; ++c)
        channels_first[c * rows + row] = value[row * channels + c];
    arrays_.emplace_back(name, std::move(channels_first));
  }

  void add(const std::string& name, view<const float> value) {
    if (below(name, only_)) append(name, value);
  }

  std::size_t count() const { return arrays_.size(); }

  void write(const std::string& path) const {
    io::npz_writer file;
    for (const auto& [name, value] : arrays_) file.add<float>(name, value);
    file.write(path, io::npz_compression::none);
  }

private:
  /// Whether `name` is `prefix` or a path below it.
  static bool below(std::string_view name, std::string_view prefix) {
    return prefix.empty() || name == prefix ||
           (name.starts_with(prefix) && name[prefix.size()] == '.');
  }

  /// Adds an array, or its rows to those of that name: the decoder takes many prompts in several
  /// batches.
  void append(const std::string& name, view<const float> value) {
    const auto found = std::find_if(arrays_.begin(), arrays_.end(),
                                    [&](const auto& array) { return array.first == name; });
    if (found == arrays_.end()) {
      tensor<float> copy(value.extents());
      std::copy(value.begin(), value.end(), copy.begin());
      arrays_.emplace_back(name, std::move(copy));
      return;
    }
    tensor<float>& before = found->second;
    tensor<float> both(shape{1, before.extent(1) + value.extent(1), value.extent(2)});
    std::copy(value.begin(), value.end(), std::copy(before.begin(), before.end(), both.begin()));
    before = std::move(both);
  }

  std::string only_;
  std::vector<std::pair<std::string, tensor<float>>> arrays_;
};

int run_trace(const trace_options& options) {
  const io::segmentation_case input = io::read_case(options.input);
  const auto* image = std::get_if<io::image_case>(&input);
  if (!image) fail(options.input, ": is a volume; trace takes an image (H, W, 3)");
  const sam model =
      sam::load(options.model,
                {.inputs = options.factors, .zeros = options.zeros, .winograd = options.winograd});
  session s(model, {.threads = options.threads});
  collecting_tracer trace(options.only);
  s.set_tracer(&trace);

  const index_t side = model.encoder.image_size();
  tensor<float> pixels(shape{side * side, 3});
  const image_fit fit = preprocess(image->image, model, pixels);
  if (trace.wants("input")) trace.record("input", pixels, layout::pixels, side);
  s.encode(pixels);
  std::vector<box> boxes;
  for (std::size_t i = 0; i < image->prompts.size(); ++i) {
    const image_prompt& prompt = image->prompts[i];
    if (!prompt.box || !prompt.points.empty())
      fail(options.input, ": object ", i, " has points; trace takes boxes alone");
    if (const std::string bad = box_complaint(*prompt.box, i, fit.height, fit.width); !bad.empty())
      fail(options.input, ": ", bad);
    boxes.push_back(fit.to_frame(*prompt.box));
  }
  const decoded_masks masks = s.decode(boxes);
  trace.add("low_res_masks", masks.low_res_masks);
  trace.add("iou_predictions", masks.iou_predictions);
  if (trace.count() == 0)
    throw usage_error("--only " + options.only + ": no module has this path or one below it");
  trace.write(options.output);
  std::printf("%s: %zu arrays\n", options.output.c_str(), trace.count());
  return 0;
}

}  // namespace

command add_trace(CLI::App& app) {
  const auto options = std::make_shared<trace_options>();
  app.add_option("-m,--model", options->model, "model file")->required();
  app.add_option("-i,--input", options->input, ".npz case with an image (H, W, 3)")->required();
  app.add_option("-o,--output", options->output, ".npz file for the arrays")->required();
  app.add_option("--only", options->only, "module path; only what is at or below it is written");
  app.add_option("--threads", options->threads, "threads; 0: every CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  add_precision(app, options->factors);
  add_sparse(app, options->zeros);
  add_winograd(app, options->winograd);
  return [options] { return run_trace(*options); };
}

}  // namespace microtome::app
