#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <microtome/io/case.hpp>
#include <microtome/io/overlay.hpp>
#include <microtome/microtome.hpp>

#include "cases.hpp"
#include "commands.hpp"
#include "interrupt.hpp"
#include "progress.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;

struct segment_options {
  std::string model;
  std::vector<std::string> inputs;
  std::string output;
  std::string overlay;
  std::string logits;
  std::vector<std::string> boxes, points;
  std::string masks;
  bool multimask = false;
  padding windows = padding::exact;
  int threads = 0;
  int workers = 1;
  precision factors = precision::fp32;
  sparsity zeros = sparsity::automatic;
  bool winograd = true;
};

struct job {
  fs::path input, output;
  std::string name;  ///< in messages
  fs::path masks;    ///< file with what points out its objects, too; empty: none
};

bool is_png(const fs::path& path) {
  return has_extension(path, ".png");
}

/// The numbers of an option's value, separated by commas.
std::vector<double> parse_numbers(const std::string& option, const std::string& text,
                                  std::size_t least, std::size_t most, const char* expected) {
  std::vector<double> numbers;
  for (const char* at = text.c_str(); numbers.size() <= most; ++at) {
    char* end = nullptr;
    const double number = std::strtod(at, &end);
    if (end == at || !std::isfinite(number)) break;
    numbers.push_back(number);
    at = end;
    if (*at == '\0' && numbers.size() >= least && numbers.size() <= most) return numbers;
    if (*at != ',') break;
  }
  throw usage_error(option + " " + text + ": expected " + expected);
}

/// What --box and --point say of the objects of every PNG image.
std::vector<image_prompt> parse_prompts(const segment_options& options) {
  std::vector<image_prompt> prompts;
  for (const std::string& text : options.boxes) {
    const std::vector<double> b =
        parse_numbers("--box", text, 4, 4, "four whole numbers x0,y0,x1,y1");
    if (std::any_of(b.begin(), b.end(), [](double v) { return v != std::floor(v); }))
      throw usage_error("--box " + text + ": expected four whole numbers x0,y0,x1,y1");
    prompts.emplace_back(image_box(b[0], b[1], b[2], b[3]));
  }
  const std::size_t boxes = prompts.size(), most = boxes + options.points.size();
  for (const std::string& text : options.points) {
    const char* expected = "x,y,label or x,y,label,object, label 1 inside the object, 0 outside";
    const std::vector<double> p = parse_numbers("--point", text, 3, 4, expected);
    if (p[2] != 0 && p[2] != 1) throw usage_error("--point " + text + ": expected " + expected);
    if (p.size() == 3 && boxes > 1)
      throw usage_error(
          "--point " + text + ": which of the " + std::to_string(boxes) +
          " boxes is it for? Expected x,y,label,object with the box's number, from 1");
    const double object = p.size() == 4 ? p[3] : 1;
    if (!(object >= 1 && object <= static_cast<double>(most)) || object != std::floor(object))
      throw usage_error("--point " + text + ": expected an object from 1 to " +
                        std::to_string(most));
    prompts.resize(std::max(prompts.size(), static_cast<std::size_t>(object)));
    prompts[static_cast<std::size_t>(object) - 1].points.push_back(
        {p[0], p[1], static_cast<int>(p[2])});
  }
  for (std::size_t i = 0; i < prompts.size(); ++i)
    if (!prompts[i].box && prompts[i].points.empty())
      throw usage_error("--point: there are points for object " + std::to_string(prompts.size()) +
                        ", but nothing for object " + std::to_string(i + 1));
  return prompts;
}

/// Whether the command line says where objects are, which PNG images need.
bool has_prompts(const segment_options& options) {
  return !options.boxes.empty() || !options.points.empty() || !options.masks.empty();
}

/// The files to segment, folders replaced by the cases in them, and where each goes.
std::vector<job> find_jobs(const segment_options& options) {
  std::vector<fs::path> files;
  for (const std::string& input : options.inputs) {
    if (!fs::exists(input)) throw usage_error(input + ": no such file or folder");
    if (!fs::is_directory(input)) {
      files.emplace_back(input);
      continue;
    }
    const std::vector<fs::path> found = list_folder(input, [&](const fs::path& path) {
      return has_extension(path, ".npz") || (is_png(path) && has_prompts(options));
    });
    if (found.empty())
      throw usage_error(input + ": no .npz cases in this folder" +
                        (has_prompts(options) ? "" : " (PNG images need a --box or --point)"));
    files.insert(files.end(), found.begin(), found.end());
  }
  std::set<fs::path> inputs;
  for (const fs::path& file : files) inputs.insert(fs::weakly_canonical(file));
  std::map<fs::path, fs::path> claims;  // what is written, and for which input
  const auto claim = [&](const fs::path& target, const fs::path& file) {
    const fs::path place = fs::weakly_canonical(target);
    if (inputs.contains(place)) throw usage_error(target.string() + ": would replace an input");
    if (const auto [other, added] = claims.emplace(place, file); !added)
      throw usage_error(target.string() + ": would be written " +
                        (other->second == file
                             ? "twice for " + file.string()
                             : "for both " + file.string() + " and " + other->second.string()));
  };
  std::vector<job> jobs;
  std::vector<std::pair<fs::path, fs::path>> slices;  // of pictures of what may be a volume
  for (const fs::path& file : files) {
    if (!is_png(file) && !has_extension(file, ".npz"))
      throw usage_error(file.string() + ": expected .npz or .png");
    if (is_png(file) && !has_prompts(options))
      throw usage_error(file.string() +
                        ": an image needs at least one --box x0,y0,x1,y1 or --point x,y,label");
    const fs::path output = fs::path(options.output) / file.filename();
    claim(output, file);
    if (!options.overlay.empty()) {
      const fs::path picture = fs::path(options.overlay) / file.stem();
      claim(fs::path(picture).concat(".png"), file);
      if (!is_png(file)) slices.emplace_back(picture, file);
    }
    const fs::path archive = fs::path(file.filename()).replace_extension(".npz");
    if (!options.logits.empty()) claim(fs::path(options.logits) / archive, file);
    fs::path masks = options.masks;
    if (fs::is_directory(masks)) masks /= archive;
    jobs.push_back({file, output, file.filename().string(), masks});
  }
  // Of a volume x there are pictures x_z012.png: another file may not have that name.
  for (const auto& [picture, file] : slices)
    for (const auto& [target, other] : claims) {
      const fs::path place = fs::weakly_canonical(picture);
      const std::string name = target.stem().string(), stem = place.filename().string() + "_z";
      if (other != file && target.parent_path() == place.parent_path() && name.starts_with(stem) &&
          name.size() > stem.size() &&
          name.find_first_not_of("0123456789", stem.size()) == name.npos)
        throw usage_error(target.string() + ": would be written for " + other.string() +
                          ", and for a slice of " + file.string() + ", should that be a volume");
    }
  if ((!options.boxes.empty() || !options.points.empty()) &&
      std::none_of(files.begin(), files.end(), is_png))
    throw usage_error(std::string(options.boxes.empty() ? "--point" : "--box") +
                      " is for PNG images; .npz cases bring their own boxes and points");
  if (!options.masks.empty()) {
    if (!fs::exists(options.masks)) throw usage_error(options.masks + ": no such file or folder");
    if (!fs::is_directory(options.masks) && jobs.size() > 1)
      throw usage_error(options.masks + ": expected a folder, as there are " +
                        std::to_string(jobs.size()) + " images");
  }
  return jobs;
}

/// Makes a folder that files can be written to, or says at once why that cannot be.
void make_folder(const fs::path& folder) {
  std::error_code failed;
  fs::create_directories(folder, failed);
  if (failed) fail(folder.string(), ": cannot be created: ", failed.message());
#if __has_include(<unistd.h>)
  if (::access(folder.c_str(), W_OK) != 0)
    fail(folder.string(), ": cannot be written to: ", std::strerror(errno));
#endif
}

/// `bad` are the numbers of the objects that could not be segmented.
void write_overlays(const fs::path& folder, const std::string& stem, const io::image_case& c,
                    const label_map& labels, const std::set<std::size_t>& bad) {
  std::vector<io::labelled_box> boxes;
  std::vector<io::labelled_point> points;
  for (std::size_t i = 0; i < c.prompts.size(); ++i) {
    const image_prompt& prompt = c.prompts[i];
    const int label = static_cast<int>(i) + 1;
    if (bad.contains(i)) continue;
    if (const std::optional<image_box>& b = prompt.box)
      boxes.push_back(
          {{std::lround(b->x0), std::lround(b->y0), std::lround(b->x1), std::lround(b->y1)},
           label});
    for (const image_point& p : prompt.points) points.push_back({p, label});
  }
  io::write_png(folder / (stem + ".png"), io::make_overlay(c.image, labels, boxes, points));
}

/// One picture for each slice that is the middle of an object.
void write_overlays(const fs::path& folder, const std::string& stem, const io::volume_case& c,
                    const label_map& labels, const std::set<std::size_t>&) {
  const index_t height = c.volume.extent(1), width = c.volume.extent(2);
  std::set<index_t> slices;
  for (const voxel_box& b : c.boxes) slices.insert(middle_slice(b));
  for (const index_t z : slices) {
    std::vector<io::labelled_box> boxes;
    for (std::size_t i = 0; i < c.boxes.size(); ++i)
      if (const voxel_box& b = c.boxes[i]; b.z0 <= z && z <= b.z1)
        boxes.push_back({{b.x0, b.y0, b.x1, b.y1}, static_cast<int>(i) + 1});
    char name[32];
    std::snprintf(name, sizeof name, "_z%03td.png", z);
    const view<const std::uint8_t> slice{c.volume.row(z), {height, width, 1}};
    io::write_png(folder / (stem + name),
                  io::make_overlay(slice, {labels.row(z), {height, width}}, boxes));
  }
}

using clock = std::chrono::steady_clock;

io::segmentation_case read_input(const job& j, const std::vector<image_prompt>& prompts) {
  io::segmentation_case input;
  if (is_png(j.input)) {
    io::image_case read{{}, prompts, {}};
    read.image = io::read_png(j.input, &read.note);
    input = std::move(read);
  } else {
    input = io::read_case(j.input);
  }
  if (j.masks.empty()) return input;
  auto* image = std::get_if<io::image_case>(&input);
  if (!image) fail("--mask is for images, and this is a volume");
  io::read_logits(j.masks, image->prompts);
  return input;
}

/// What was found in a case.
struct answer {
  label_map labels;
  io::object_logits logits;   ///< where they are wanted, of images
  std::set<std::size_t> bad;  ///< numbers of objects that could not be segmented
};

std::string note_of(const io::image_case& c) {
  return c.note.empty() ? "" : "; " + c.note;
}
std::string note_of(const io::volume_case&) {
  return "";
}

std::size_t number_of_objects(const io::segmentation_case& input) {
  const auto* image = std::get_if<io::image_case>(&input);
  return image ? image->prompts.size() : std::get<io::volume_case>(input).boxes.size();
}

/// How many there are, of the kind that points them out.
std::string describe_objects(const io::segmentation_case& input) {
  const auto* image = std::get_if<io::image_case>(&input);
  const bool boxes = !image || std::all_of(image->prompts.begin(), image->prompts.end(),
                                           [](const image_prompt& p) { return p.box.has_value(); });
  const std::size_t count = number_of_objects(input);
  return std::to_string(count) +
         (boxes ? (count == 1 ? " box" : " boxes") : (count == 1 ? " object" : " objects"));
}

/// Segments a case, with its logits if `keep_logits`.
answer find_objects(session& s, const io::segmentation_case& input, bool multimask,
                    bool keep_logits, const progress_callback& step,
                    const bad_box_callback& bad_box) {
  if (!keep_logits) return {segment_case(s, input, step, bad_box, multimask), {}, {}};
  if (!std::holds_alternative<io::image_case>(input))
    fail("--logits is for images, and this is a volume");
  const auto objects = static_cast<index_t>(number_of_objects(input));
  answer found{
      {},
      {tensor<float>(shape{objects, s.mask_side(), s.mask_side()}), tensor<float>(shape{objects})},
      {}};
  std::fill(found.logits.iou_predictions.begin(), found.logits.iou_predictions.end(),
            std::numeric_limits<float>::quiet_NaN());
  found.labels =
      segment_case(s, input, step, bad_box, multimask,
                   [&](std::size_t number, view<const float> logits, float predicted_iou) {
                     const auto i = static_cast<index_t>(number);
                     std::copy(logits.begin(), logits.end(), found.logits.low_res_masks.row(i));
                     found.logits.iou_predictions[i] = predicted_iou;
                   });
  return found;
}

/// Writes what was found in a case; returns a description of it.
std::string write_result(const job& j, const segment_options& options,
                         const io::segmentation_case& input, const answer& found,
                         clock::time_point start) {
  const label_map& labels = found.labels;
  is_png(j.input) ? io::write_label_png(j.output, labels) : io::write_segs(j.output, labels);
  const std::string stem = j.input.stem().string();
  if (!options.logits.empty())
    io::write_logits(fs::path(options.logits) / (stem + ".npz"), found.logits);
  return std::visit(
      [&](const auto& c) {
        if (!options.overlay.empty()) write_overlays(options.overlay, stem, c, labels, found.bad);
        const index_t slices = labels.extents().rank() == 3 ? labels.extent(0) : 1;
        const std::chrono::duration<double> took = clock::now() - start;
        char text[96];
        std::snprintf(text, sizeof text, "%td slice%s, %s, %.2f s", slices, slices == 1 ? "" : "s",
                      describe_objects(input).c_str(), took.count());
        return text + note_of(c);
      },
      input);
}

/// A case that is being read.
struct coming_case {
  const job* j;
  std::future<io::segmentation_case> input;
};

/// Takes cases through reading, segmenting and writing. The next case is read and the one before is
/// written while one is segmented: inflating and deflating keep a core busy for as long as a slice.
class pipeline {
public:
  pipeline(const segment_options& options, std::vector<job> jobs, std::vector<image_prompt> prompts)
      : options_(options),
        jobs_(std::move(jobs)),
        prompts_(std::move(prompts)),
        workers_(std::min(static_cast<std::size_t>(options.workers), jobs_.size())),
        threads_(options.threads > 0 ? options.threads : default_threads()),
        report_(jobs_.size(), workers_) {}

  /// Returns the program's exit code.
  int run() {
    std::optional<coming_case> first = take(0);  // read while the model is loaded
    const sam model = sam::load(options_.model, {.windows = options_.windows,
                                                 .inputs = options_.factors,
                                                 .zeros = options_.zeros,
                                                 .winograd = options_.winograd});
    std::vector<std::future<void>> others;  // which wait for their threads, whatever happens
    for (std::size_t worker = 1; worker < workers_; ++worker)
      others.push_back(
          std::async(std::launch::async, [&, worker] { work(worker, model, take(worker)); }));
    work(0, model, std::move(first));
    for (std::future<void>& other : others) other.get();
    if (interrupted() && written_ < jobs_.size()) {
      report_.say("interrupted: " + std::to_string(written_) + " of " +
                  std::to_string(jobs_.size()) + " cases are written");
      return exit_interrupted;
    }
    return report_.failures() ? 1 : 0;
  }

private:
  /// With one thread in all, what is asked for later is done later.
  std::launch policy() const { return threads_ > 1 ? std::launch::async : std::launch::deferred; }

  std::optional<coming_case> take(std::size_t worker) {
    std::optional<coming_case> coming;
    for (std::size_t i; !coming && !interrupted() && (i = next_++) < jobs_.size();)
      attempt(worker, jobs_[i], [&] {
        coming = coming_case{
            &jobs_[i], std::async(policy(), [this, i] { return read_input(jobs_[i], prompts_); })};
      });
    return coming;
  }

  void work(std::size_t worker, const sam& model, std::optional<coming_case> current) {
    std::optional<session> s;
    std::future<void> writing;
    while (current) {
      std::optional<coming_case> following = take(worker);
      const job& j = *current->j;
      attempt(worker, j, [&] {
        const clock::time_point start = clock::now();
        if (!s)
          s.emplace(model,
                    session_options{.threads = std::max(1, threads_ / static_cast<int>(workers_))});
        io::segmentation_case input = current->input.get();
        std::map<std::size_t, std::string> complaints;  // by the object's number
        answer found = find_objects(
            *s, input, options_.multimask, !options_.logits.empty(),
            [&](index_t done, index_t total) {
              if (interrupted()) throw interruption();
              report_.step(worker, done, total);
            },
            [&](std::size_t number, const std::string& complaint) {
              complaints[number] = complaint;
            });
        if (!complaints.empty() && complaints.size() == number_of_objects(input))
          fail("none of its boxes can be segmented: ", complaints.begin()->second);
        for (const auto& [number, complaint] : complaints) {
          report_.box_failed(j.name, complaint);
          found.bad.insert(number);
        }
        if (writing.valid()) writing.get();
        writing = std::async(policy(), [this, worker, &j, input = std::move(input),
                                        found = std::move(found), start] {
          attempt(worker, j, [&] {
            report_.finished(worker, j.name, write_result(j, options_, input, found, start));
            ++written_;
          });
        });
      });
      current = std::move(following);
    }
    if (writing.valid()) writing.get();
  }

  /// Runs f; where it throws, the case has failed.
  template <class Function>
  void attempt(std::size_t worker, const job& j, Function&& f) {
    try {
      f();
    } catch (const interruption&) {  // run() tells of it
    } catch (const std::exception& e) {
      report_.failed(worker, j.name, reason_of(e));
    }
  }

  const segment_options& options_;
  const std::vector<job> jobs_;
  const std::vector<image_prompt> prompts_;
  const std::size_t workers_;
  const int threads_;
  progress report_;
  std::atomic<std::size_t> next_ = 0, written_ = 0;
};

int run_segment(const segment_options& options) {
  std::vector<job> jobs = find_jobs(options);
  std::vector<image_prompt> prompts = parse_prompts(options);
  make_folder(options.output);
  for (const std::string& folder : {options.overlay, options.logits})
    if (!folder.empty()) make_folder(folder);
  catch_interrupts();
  return pipeline(options, std::move(jobs), std::move(prompts)).run();
}

}  // namespace

command add_segment(CLI::App& app) {
  const auto options = std::make_shared<segment_options>();
  app.add_option("-m,--model", options->model, "model file (converters/convert.py writes it)")
      ->required();
  app.add_option("-i,--input", options->inputs, ".npz cases, PNG images, or folders of them")
      ->required();
  app.add_option("-o,--output", options->output, "folder for the results, under the inputs' names")
      ->required();
  app.add_option("--overlay", options->overlay, "folder for pictures of the results");
  app.add_option("--box", options->boxes, "box x0,y0,x1,y1 in pixels, for PNG images; repeatable")
      ->take_all();
  app.add_option("--point", options->points,
                 "point x,y,label in pixels, for PNG images: label 1 is inside the object, 0 "
                 "outside; of several objects x,y,label,object, numbers from 1, those of boxes "
                 "first; repeatable")
      ->take_all();
  app.add_option("--mask", options->masks,
                 "what an earlier run has written with --logits, to go on from: the folder, or the "
                 "file of a single image");
  app.add_flag("--multimask", options->multimask,
               "let the model propose three masks and take the one it expects most of: for single "
               "points, which may mean a part or the whole");
  app.add_option("--logits", options->logits,
                 "folder for the low-resolution masks of images and what the model expects of "
                 "them, .npz files with low_res_masks and iou_predictions");
  add_padding(app, options->windows);
  app.add_option("--threads", options->threads, "threads in all; 0: every CPU")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--workers", options->workers, "cases side by side, which share the threads")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  add_precision(app, options->factors);
  add_sparse(app, options->zeros);
  add_winograd(app, options->winograd);
  return [options] { return run_segment(*options); };
}

}  // namespace microtome::app
