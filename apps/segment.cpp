#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <future>
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
  std::vector<std::string> boxes;
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
};

bool is_png(const fs::path& path) {
  return has_extension(path, ".png");
}

pixel_box parse_box(const std::string& text) {
  pixel_box b;
  long x0 = 0, y0 = 0, x1 = 0, y1 = 0;
  char rest = 0;
  if (std::sscanf(text.c_str(), "%ld,%ld,%ld,%ld%c", &x0, &y0, &x1, &y1, &rest) != 4)
    throw usage_error("--box " + text + ": expected four whole numbers x0,y0,x1,y1");
  b = {x0, y0, x1, y1};
  return b;
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
      return has_extension(path, ".npz") || (is_png(path) && !options.boxes.empty());
    });
    if (found.empty())
      throw usage_error(input + ": no .npz cases in this folder" +
                        (options.boxes.empty() ? " (PNG images need a --box)" : ""));
    files.insert(files.end(), found.begin(), found.end());
  }
  std::set<fs::path> inputs;
  for (const fs::path& file : files) inputs.insert(fs::weakly_canonical(file));
  std::map<fs::path, fs::path> claims;  // what is written, and for which input
  const auto claim = [&](const fs::path& target, const fs::path& file) {
    const fs::path place = fs::weakly_canonical(target);
    if (inputs.contains(place)) throw usage_error(target.string() + ": would replace an input");
    if (const auto [other, added] = claims.emplace(place, file); !added)
      throw usage_error(target.string() + ": would be written for both " + file.string() + " and " +
                        other->second.string());
  };
  std::vector<job> jobs;
  std::vector<std::pair<fs::path, fs::path>> slices;  // of pictures of what may be a volume
  for (const fs::path& file : files) {
    if (!is_png(file) && !has_extension(file, ".npz"))
      throw usage_error(file.string() + ": expected .npz or .png");
    if (is_png(file) && options.boxes.empty())
      throw usage_error(file.string() + ": an image needs at least one --box x0,y0,x1,y1");
    const fs::path output = fs::path(options.output) / file.filename();
    claim(output, file);
    if (!options.overlay.empty()) {
      const fs::path picture = fs::path(options.overlay) / file.stem();
      claim(fs::path(picture).concat(".png"), file);
      if (!is_png(file)) slices.emplace_back(picture, file);
    }
    jobs.push_back({file, output, file.filename().string()});
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
  if (!options.boxes.empty() &&
      std::none_of(files.begin(), files.end(), [](const fs::path& f) { return is_png(f); }))
    throw usage_error("--box is for PNG images; .npz cases bring their own boxes");
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

void write_overlay(const fs::path& path, view<const std::uint8_t> image,
                   view<const std::uint16_t> labels, const std::vector<io::labelled_box>& boxes) {
  io::write_png(path, io::make_overlay(image, labels, boxes));
}

void write_overlays(const fs::path& folder, const std::string& stem, const io::image_case& c,
                    const label_map& labels) {
  std::vector<io::labelled_box> boxes;
  for (const pixel_box& b : c.boxes) boxes.push_back({b, static_cast<int>(boxes.size()) + 1});
  write_overlay(folder / (stem + ".png"), c.image, labels, boxes);
}

/// One picture for each slice that is the middle of an object.
void write_overlays(const fs::path& folder, const std::string& stem, const io::volume_case& c,
                    const label_map& labels) {
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
    write_overlay(folder / (stem + name), {c.volume.row(z), {height, width, 1}},
                  {labels.row(z), {height, width}}, boxes);
  }
}

using clock = std::chrono::steady_clock;

io::segmentation_case read_input(const job& j, const std::vector<pixel_box>& boxes) {
  if (!is_png(j.input)) return io::read_case(j.input);
  io::image_case read{{}, boxes, {}};
  read.image = io::read_png(j.input, &read.note);
  return read;
}

std::string note_of(const io::image_case& c) {
  return c.note.empty() ? "" : "; " + c.note;
}
std::string note_of(const io::volume_case&) {
  return "";
}

/// Writes what was found in a case; returns a description of it.
std::string write_result(const job& j, const segment_options& options,
                         const io::segmentation_case& input, const label_map& labels,
                         clock::time_point start) {
  is_png(j.input) ? io::write_label_png(j.output, labels) : io::write_segs(j.output, labels);
  return std::visit(
      [&](const auto& c) {
        if (!options.overlay.empty())
          write_overlays(options.overlay, j.input.stem().string(), c, labels);
        const index_t slices = labels.extents().rank() == 3 ? labels.extent(0) : 1;
        const std::chrono::duration<double> took = clock::now() - start;
        char text[96];
        std::snprintf(text, sizeof text, "%td slice%s, %zu box%s, %.2f s", slices,
                      slices == 1 ? "" : "s", c.boxes.size(), c.boxes.size() == 1 ? "" : "es",
                      took.count());
        return text + note_of(c);
      },
      input);
}

std::size_t number_of_boxes(const io::segmentation_case& input) {
  return std::visit([](const auto& c) { return c.boxes.size(); }, input);
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
  pipeline(const segment_options& options, std::vector<job> jobs, std::vector<pixel_box> boxes)
      : options_(options),
        jobs_(std::move(jobs)),
        boxes_(std::move(boxes)),
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
            &jobs_[i], std::async(policy(), [this, i] { return read_input(jobs_[i], boxes_); })};
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
        std::vector<std::string> complaints;
        label_map labels = segment_case(
            *s, input,
            [&](index_t done, index_t total) {
              if (interrupted()) throw interruption();
              report_.step(worker, done, total);
            },
            [&](std::size_t, const std::string& complaint) { complaints.push_back(complaint); });
        if (!complaints.empty() && complaints.size() == number_of_boxes(input))
          fail("none of its boxes can be segmented: ", complaints[0]);
        for (const std::string& complaint : complaints) report_.box_failed(j.name, complaint);
        if (writing.valid()) writing.get();
        writing = std::async(policy(), [this, worker, &j, input = std::move(input),
                                        labels = std::move(labels), start] {
          attempt(worker, j, [&] {
            report_.finished(worker, j.name, write_result(j, options_, input, labels, start));
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
  const std::vector<pixel_box> boxes_;
  const std::size_t workers_;
  const int threads_;
  progress report_;
  std::atomic<std::size_t> next_ = 0, written_ = 0;
};

int run_segment(const segment_options& options) {
  std::vector<job> jobs = find_jobs(options);
  std::vector<pixel_box> boxes;
  for (const std::string& text : options.boxes) boxes.push_back(parse_box(text));
  make_folder(options.output);
  if (!options.overlay.empty()) make_folder(options.overlay);
  catch_interrupts();
  return pipeline(options, std::move(jobs), std::move(boxes)).run();
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
