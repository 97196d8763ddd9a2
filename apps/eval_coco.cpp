#include "eval_coco.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <microtome/imaging/average_precision.hpp>
#include <microtome/imaging/pipeline.hpp>
#include <microtome/io/coco.hpp>
#include <microtome/io/picture.hpp>

#include "interrupt.hpp"
#include "progress.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;
using clock = std::chrono::steady_clock;

/// A box to segment, and what the mask is for: an object of the ground truth, or a detection.
struct asked_object {
  image_box box;
  std::int64_t category = 0;
  const io::coco_annotation* truth = nullptr;
  double score = 0;
};

/// By image.
using asked_objects = std::map<std::int64_t, std::vector<asked_object>>;

/// What was found for one of them, if anything was.
struct found_object {
  run_lengths mask;
  double predicted_iou = 0;
  bool found = false;
};

/// A row of the table of objects.
struct measured_object {
  std::string image;
  const io::coco_annotation* truth;
  double iou;
};

void write_text(const std::string& path, const std::string& text) {
  replace_file(path, std::as_bytes(std::span(text)));
}

/// Text as a field of a CSV file.
std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == text.npos) return text;
  std::string quoted;
  for (const char c : text) quoted.append(c == '"' ? 2 : 1, c);
  return quoted.insert(0, 1, '"').append(1, '"');
}

std::string count_text(std::size_t count, const char* what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

/// Mean IoU by ranges of areas; unlike those of the average precision they share no border.
void print_mean_iou(const std::vector<measured_object>& measured) {
  const auto line = [&](const char* name, auto&& holds) {
    double sum = 0;
    std::size_t count = 0;
    for (const measured_object& m : measured)
      if (holds(m.truth->area)) {
        sum += m.iou;
        ++count;
      }
    std::printf("%-8s %8zu ", name, count);
    count ? std::printf("%8.6f\n", sum / static_cast<double>(count)) : std::printf("%8s\n", "-");
  };
  constexpr double medium = 32 * 32, large = 96 * 96;
  std::printf("%-8s %8s %8s\n", "area", "objects", "mIoU");
  line("all", [](double) { return true; });
  line("small", [](double area) { return area < medium; });
  line("medium", [](double area) { return area >= medium && area <= large; });
  line("large", [](double area) { return area > large; });
}

/// COCO's twelve numbers, as pycocotools names them.
void print_precision(const std::array<precision_measure, 12>& measures) {
  for (const precision_measure& m : measures) {
    char thresholds[16];
    if (m.low_iou == m.high_iou)
      std::snprintf(thresholds, sizeof thresholds, "%.2f", m.low_iou);
    else
      std::snprintf(thresholds, sizeof thresholds, "%.2f:%.2f", m.low_iou, m.high_iou);
    std::printf(" Average %s (%s) @[ IoU=%-9s | area=%6s | maxDets=%3d ] = %.4f\n",
                m.recall ? "Recall   " : "Precision", m.recall ? "AR" : "AP", thresholds,
                coco_areas[m.area].name, m.detections, m.value);
  }
}

void write_precision(const std::string& path, const std::array<precision_measure, 12>& measures) {
  std::string text = "measure,low_iou,high_iou,area,max_detections,value\n";
  char line[128];
  for (const precision_measure& m : measures) {
    std::snprintf(line, sizeof line, "%s,%.2f,%.2f,%s,%d,%.17g\n", m.recall ? "AR" : "AP",
                  m.low_iou, m.high_iou, coco_areas[m.area].name, m.detections, m.value);
    text += line;
  }
  write_text(path, text);
}

void write_objects(const std::string& path, const io::coco_instances& instances,
                   const std::vector<measured_object>& measured) {
  std::string text = "image,annotation,category,area,iou\n";
  for (const measured_object& m : measured) {
    char numbers[96];
    std::snprintf(numbers, sizeof numbers, "%.10g,%.9f\n", m.truth->area, m.iou);
    text.append(csv_field(m.image)).append(",").append(std::to_string(m.truth->id)).append(",");
    text.append(csv_field(instances.categories.at(m.truth->category))).append(",").append(numbers);
  }
  write_text(path, text);
}

std::vector<true_object> truth_of(const io::coco_instances& instances, std::int64_t image) {
  std::vector<true_object> truth;
  if (const auto found = instances.annotations.find(image); found != instances.annotations.end())
    for (const io::coco_annotation& a : found->second)
      truth.push_back({a.category, a.area, a.crowd, a.mask});
  return truth;
}

/// Counts what was wrong with the files, and tells of it.
class complaints {
public:
  io::complaint_callback tell() {
    return [this](const std::string& complaint) {
      std::fprintf(stderr, "FAILED: %s\n", complaint.c_str());
      ++count_;
    };
  }
  std::size_t count() const { return count_; }

private:
  std::size_t count_ = 0;
};

void finish_precision(const coco_options& options, const average_precision& precision) {
  const std::array<precision_measure, 12> measures = precision.measures();
  print_precision(measures);
  if (!options.output.empty()) write_precision(options.output, measures);
}

/// Masks that somebody has found already.
int evaluate_results(const coco_options& options, const io::coco_instances& instances,
                     complaints& bad) {
  io::coco_results results =
      io::read_coco_results(options.results, instances, io::coco_result_part::masks, bad.tell());
  average_precision precision;
  for (const auto& [id, image] : instances.images) {
    std::vector<detected_object> found;
    for (io::coco_result& r : results[id])
      found.push_back({r.category, r.score, std::move(r.mask)});
    precision.add_image(truth_of(instances, id), found);
  }
  finish_precision(options, precision);
  return bad.count() ? 1 : 0;
}

/// Runs the model over the images, every box a prompt of its own.
class coco_run {
public:
  coco_run(const coco_options& options, const io::coco_instances& instances,
           const asked_objects& asked)
      : options_(options),
        instances_(instances),
        asked_(asked),
        model_(sam::load(options.model, {.windows = padding::exact,
                                         .inputs = options.factors,
                                         .zeros = options.zeros,
                                         .winograd = options.winograd})),
        session_(model_, {.threads = options.threads}),
        input_(shape{model_.encoder.image_size() * model_.encoder.image_size(), 3}),
        report_(asked.size(), 1) {}

  /// Segments every image, by rising id, and hands it to measure(image id, objects, found), which
  /// returns what to say of it. Images in which nothing is asked for are handed over, too. Returns
  /// how much has failed, or nothing where it was interrupted.
  template <class Measure>
  std::optional<std::size_t> run(Measure&& measure) {
    std::size_t done = 0;
    for (const auto& [id, image] : instances_.images) {
      if (interrupted()) {
        report_.say("interrupted: " + std::to_string(done) + " of " +
                    std::to_string(asked_.size()) + " images are segmented, nothing is written");
        return {};
      }
      const auto asked = asked_.find(id);
      if (asked == asked_.end()) {
        static_cast<void>(measure(id, std::span<const asked_object>(), std::span<found_object>()));
        continue;
      }
      try {
        const clock::time_point start = clock::now();
        std::vector<found_object> found = segment_image(image, asked->second);
        std::string what = measure(id, std::span(asked->second), std::span(found));
        char took[32];
        std::snprintf(took, sizeof took, ", %.2f s",
                      std::chrono::duration<double>(clock::now() - start).count());
        report_.finished(0, image.file_name, what.append(took));
        ++done;
      } catch (const std::exception& e) {
        report_.failed(0, image.file_name, reason_of(e));
      }
    }
    return report_.failures();
  }

private:
  std::vector<found_object> segment_image(const io::coco_image& image,
                                          std::span<const asked_object> objects) {
    std::string note;
    const tensor<std::uint8_t> pixels =
        io::read_picture(fs::path(options_.images) / image.file_name, &note);
    if (pixels.extent(0) != image.height || pixels.extent(1) != image.width)
      fail("is ", pixels.extent(1), " x ", pixels.extent(0), " pixels, expected ", image.width,
           " x ", image.height, " as ", options_.annotations, " says");
    if (!note.empty()) report_.say(image.file_name + ": " + note);
    const image_fit fit = preprocess(pixels, model_, input_);
    session_.encode(input_);
    std::vector<image_prompt> prompts;
    for (const asked_object& o : objects) prompts.emplace_back(o.box);
    std::vector<found_object> found(objects.size());
    decode_prompts(
        session_, fit, prompts, options_.multimask,
        [&](std::size_t i, view<const float> logits, float predicted_iou) {
          found[i] = {runs_of(full_mask(session_, logits, fit)), predicted_iou, true};
        },
        [&](std::size_t i, const std::string& complaint) {
          const io::coco_annotation* truth = objects[i].truth;
          std::string what = truth ? "annotation " : "detection of category ";
          what.append(std::to_string(truth ? truth->id : objects[i].category));
          report_.box_failed(image.file_name, what.append(": ").append(complaint));
        });
    return found;
  }

  const coco_options& options_;
  const io::coco_instances& instances_;
  const asked_objects& asked_;
  const sam model_;
  session session_;
  tensor<float> input_;
  progress report_;
};

/// Boxes of the ground truth as prompts: how well each object is segmented.
int measure_iou(const coco_options& options, const io::coco_instances& instances, complaints& bad) {
  asked_objects asked;
  std::size_t tiny = 0;
  for (const auto& [id, annotations] : instances.annotations)
    for (const io::coco_annotation& a : annotations) {
      if (a.crowd && !options.crowds) continue;
      if (a.area < 1)
        ++tiny;
      else if (!a.box)
        bad.tell()(options.annotations + ": annotation " + std::to_string(a.id) +
                   ": 'bbox' is missing");
      else
        asked[id].push_back({*a.box, a.category, &a, 0});
    }
  std::vector<measured_object> measured;
  io::coco_results_writer masks;
  const auto measure = [&](std::int64_t id, std::span<const asked_object> objects,
                           std::span<found_object> found) {
    double sum = 0;
    std::size_t count = 0;
    for (std::size_t i = 0; i < objects.size(); ++i) {
      if (!found[i].found) continue;
      const io::coco_annotation& truth = *objects[i].truth;
      const double iou = intersection_over_union(found[i].mask, truth.mask);
      measured.push_back({instances.images.at(id).file_name, &truth, iou});
      if (!options.masks.empty())
        masks.add(id, truth.category, found[i].predicted_iou, found[i].mask);
      sum += iou;
      ++count;
    }
    char mean[32];
    std::snprintf(mean, sizeof mean, ", mean IoU %.4f",
                  sum / static_cast<double>(std::max<std::size_t>(count, 1)));
    return count_text(count, "object").append(mean);
  };
  const std::optional<std::size_t> failures = coco_run(options, instances, asked).run(measure);
  if (!failures) return exit_interrupted;
  print_mean_iou(measured);
  if (tiny) std::printf("%s of an area below 1 left out\n", count_text(tiny, "object").c_str());
  if (!options.output.empty()) write_objects(options.output, instances, measured);
  if (!options.masks.empty()) masks.write(options.masks);
  return bad.count() + *failures ? 1 : 0;
}

/// A detector's boxes as prompts: average precision of the masks.
int measure_precision(const coco_options& options, const io::coco_instances& instances,
                      complaints& bad) {
  asked_objects asked;
  for (const auto& [id, boxes] : io::read_coco_results(options.detections, instances,
                                                       io::coco_result_part::boxes, bad.tell()))
    for (const io::coco_result& r : boxes)
      asked[id].push_back({*r.box, r.category, nullptr, r.score});
  average_precision precision;
  io::coco_results_writer masks;
  const auto measure = [&](std::int64_t id, std::span<const asked_object> objects,
                           std::span<found_object> found) {
    std::vector<detected_object> detected;
    for (std::size_t i = 0; i < objects.size(); ++i) {
      if (!found[i].found) continue;
      const asked_object& o = objects[i];
      if (!options.masks.empty()) masks.add(id, o.category, o.score, found[i].mask);
      detected.push_back({o.category, o.score, std::move(found[i].mask)});
    }
    precision.add_image(truth_of(instances, id), detected);
    return count_text(detected.size(), "detection");
  };
  const std::optional<std::size_t> failures = coco_run(options, instances, asked).run(measure);
  if (!failures) return exit_interrupted;
  finish_precision(options, precision);
  if (!options.masks.empty()) masks.write(options.masks);
  return bad.count() + *failures ? 1 : 0;
}

/// Says at once what would otherwise be found out after hours.
void check_files(const coco_options& options) {
  for (const std::string& path : {options.annotations, options.detections, options.results})
    if (!path.empty() && !fs::exists(path)) throw usage_error(path + ": no such file");
  if (!options.images.empty() && !fs::is_directory(options.images))
    throw usage_error(options.images + ": no such folder");
  std::set<fs::path> taken;
  for (const std::string& path :
       {options.annotations, options.detections, options.results, options.model})
    if (!path.empty()) taken.insert(fs::weakly_canonical(path));
  for (const std::string& path : {options.output, options.masks}) {
    if (path.empty()) continue;
    if (!taken.insert(fs::weakly_canonical(path)).second)
      throw usage_error(path + ": would replace an input or the other output");
    const fs::path folder = fs::path(path).parent_path();
    if (!folder.empty() && !fs::is_directory(folder))
      throw usage_error(folder.string() + ": no such folder");
  }
}

}  // namespace

void add_coco_options(CLI::App& app, coco_options& options) {
  CLI::Option* coco = app.add_option(
      "--coco", options.annotations,
      "annotations of instances in COCO's format (JSON): segments the boxes of the images' objects "
      "and gives the mean IoU, or with --detections or --masks-from the average precision");
  const auto with_coco = [&](CLI::Option* option) { return option->needs(coco); };
  CLI::Option* results =
      with_coco(app.add_option("--masks-from", options.results,
                               "results in COCO's format: the average precision of these masks"));
  const auto with_model = [&](CLI::Option* option) { return with_coco(option)->excludes(results); };
  with_model(app.add_option("-m,--model", options.model, "model file that segments"));
  with_model(app.add_option("--images", options.images,
                            "folder of the images that --coco names, PNG or JPEG"));
  with_model(app.add_option("--detections", options.detections,
                            "a detector's boxes, results in COCO's format, as prompts"));
  with_model(app.add_option("--masks", options.masks,
                            "file for what is segmented, results in COCO's format"));
  with_model(app.add_flag("--multimask", options.multimask,
                          "let the model propose three masks and take the one it expects most of"));
  with_model(app.add_flag("--crowds", options.crowds, "measure the IoU of crowds (iscrowd), too"));
  CLI::Option* threads =
      app.add_option("--threads", options.threads, "threads in all; 0: every CPU")
          ->check(CLI::Range(0, 1024))
          ->capture_default_str();
  with_model(threads);
  add_precision(app, options.factors);
  add_sparse(app, options.zeros);
  add_winograd(app, options.winograd);
  for (const char* name : {"--precision", "--sparse", "--winograd"})
    with_model(app.get_option(name));
}

int run_eval_coco(const coco_options& options) {
  if (options.results.empty() && (options.model.empty() || options.images.empty()))
    throw usage_error("--coco needs --model and --images, or --masks-from");
  if (options.crowds && !options.detections.empty())
    throw usage_error("--crowds is for the mean IoU: not with --detections");
  check_files(options);
  complaints bad;
  const io::coco_instances instances = io::read_coco_instances(options.annotations, bad.tell());
  if (!options.results.empty()) return evaluate_results(options, instances, bad);
  catch_interrupts();
  return options.detections.empty() ? measure_iou(options, instances, bad)
                                    : measure_precision(options, instances, bad);
}

}  // namespace microtome::app
