#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include <microtome/imaging/metrics.hpp>
#include <microtome/io/case.hpp>

#include "cases.hpp"
#include "commands.hpp"
#include "eval_coco.hpp"

namespace microtome::app {

namespace {

namespace fs = std::filesystem;

struct eval_options {
  std::string segs, truths, output;
  double tolerance = 2.0;
  coco_options coco;
};

struct row {
  std::string name;
  int label = 0;
  index_t truth_voxels = 0, seg_voxels = 0;
  double dice = 0, nsd = 0;
};

struct pair_of_files {
  fs::path segs, truth;
};

/// The files to compare: one pair, or every ground truth of a folder with the file of the same
/// name.
std::vector<pair_of_files> find_pairs(const eval_options& options) {
  for (const std::string& path : {options.segs, options.truths})
    if (!fs::exists(path)) throw usage_error(path + ": no such file or folder");
  if (!fs::is_directory(options.truths)) {
    const fs::path truth = options.truths;
    const bool folder = fs::is_directory(options.segs);
    return {{folder ? fs::path(options.segs) / truth.filename() : fs::path(options.segs), truth}};
  }
  if (!fs::is_directory(options.segs))
    throw usage_error(options.segs + ": expected a folder, as " + options.truths + " is one");
  std::vector<pair_of_files> pairs;
  for (const fs::path& truth : find_cases(options.truths))
    pairs.push_back({fs::path(options.segs) / truth.filename(), truth});
  return pairs;
}

/// 1 where `labels` is `label`, as (D, H, W).
tensor<std::uint8_t> mask_of(const label_map& labels, std::uint16_t label) {
  const shape& s = labels.extents();
  tensor<std::uint8_t> mask(s.rank() == 3 ? s : shape{1, s[0], s[1]});
  for (index_t i = 0; i < labels.size(); ++i) mask[i] = labels[i] == label;
  return mask;
}

index_t voxels(const tensor<std::uint8_t>& mask) {
  return std::count(mask.begin(), mask.end(), std::uint8_t{1});
}

/// A row for each label of the ground truth. Labels that only the segmentation has are told of, and
/// count nowhere, as in the challenges.
std::vector<row> compare(const pair_of_files& files, double tolerance) {
  const label_map truth = io::read_labels(files.truth, "gts");
  const label_map segs = io::read_labels(files.segs, "segs");
  const auto spacing = io::read_spacing(files.truth);
  if (!(truth.extents() == segs.extents()))
    fail(files.segs.string(), ": segs has shape ", to_string(segs.extents()), ", expected ",
         to_string(truth.extents()), " as gts of ", files.truth.string());
  std::set<std::uint16_t> expected(truth.begin(), truth.end()), found(segs.begin(), segs.end());
  expected.erase(0);
  found.erase(0);
  const std::string name = files.truth.filename().string();
  for (const std::uint16_t label : found)
    if (!expected.contains(label))
      std::fprintf(stderr, "%s: label %d is in segs but not in gts; left out\n", name.c_str(),
                   label);
  if (expected.empty()) std::fprintf(stderr, "%s: gts holds no label\n", name.c_str());
  if (!spacing)
    std::fprintf(stderr, "%s: no spacing, so the surface distance's %g mm are %g pixels\n",
                 name.c_str(), tolerance, tolerance);

  constexpr std::array<double, 3> unit{1, 1, 1};
  std::vector<row> rows;
  for (const std::uint16_t label : expected) {
    const tensor<std::uint8_t> a = mask_of(truth, label), b = mask_of(segs, label);
    rows.push_back({name, label, voxels(a), voxels(b), dice(a, b),
                    normalised_surface_distance(a, b, spacing.value_or(unit), tolerance)});
  }
  return rows;
}

void write_table(const std::string& path, const std::vector<row>& rows) {
  std::string text = "case,label,gts_voxels,segs_voxels,dice,nsd\n";
  char line[128];
  for (const row& r : rows) {
    std::snprintf(line, sizeof line, ",%d,%td,%td,%.6f,%.6f\n", r.label, r.truth_voxels,
                  r.seg_voxels, r.dice, r.nsd);
    text += r.name + line;
  }
  replace_file(path, std::as_bytes(std::span(text)));
}

int run_eval(const eval_options& options) {
  std::vector<row> all;
  std::size_t failed = 0, cases = 0;
  double dice_sum = 0, nsd_sum = 0;  // of the cases' means over their labels
  std::printf("%-32s %6s %6s %6s\n", "case", "labels", "dice", "nsd");
  for (const pair_of_files& files : find_pairs(options)) {
    try {
      const std::vector<row> rows = compare(files, options.tolerance);
      all.insert(all.end(), rows.begin(), rows.end());
      if (rows.empty()) continue;
      double dice_mean = 0, nsd_mean = 0;
      for (const row& r : rows) {
        dice_mean += r.dice / static_cast<double>(rows.size());
        nsd_mean += r.nsd / static_cast<double>(rows.size());
      }
      std::printf("%-32s %6zu %6.4f %6.4f\n", rows[0].name.c_str(), rows.size(), dice_mean,
                  nsd_mean);
      dice_sum += dice_mean;
      nsd_sum += nsd_mean;
      ++cases;
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s FAILED: %s\n", files.truth.filename().string().c_str(),
                   reason_of(e));
      ++failed;
    }
  }
  if (cases)
    std::printf("%-32s %6zu %6.4f %6.4f\n", "mean", all.size(),
                dice_sum / static_cast<double>(cases), nsd_sum / static_cast<double>(cases));
  if (!options.output.empty()) write_table(options.output, all);
  return failed ? 1 : 0;
}

}  // namespace

command add_eval(CLI::App& app) {
  const auto options = std::make_shared<eval_options>();
  CLI::Option* segs =
      app.add_option("-s,--segs", options->segs, ".npz file with segs, or a folder of them");
  CLI::Option* truths =
      app.add_option("-g,--gts", options->truths,
                     ".npz file with gts (and spacing, mm along x, y, z), or a folder of them");
  app.add_option("-o,--output", options->output,
                 "CSV file, a row for each label of each case; with --coco for each object, or for "
                 "each number of the average precision");
  CLI::Option* tolerance =
      app.add_option("--tolerance", options->tolerance,
                     "of the surface distance, mm; pixels where a file has no spacing")
          ->check(CLI::Range(0.0, 1000.0))
          ->capture_default_str();
  add_coco_options(app, options->coco);
  for (CLI::Option* other : {segs, truths, tolerance}) other->excludes("--coco");
  return [options] {
    options->coco.output = options->output;
    if (!options->coco.annotations.empty()) return run_eval_coco(options->coco);
    for (const auto& [name, value] :
         {std::pair("--segs", &options->segs), std::pair("--gts", &options->truths)})
      if (value->empty()) throw usage_error(std::string(name) + " is required, or --coco");
    return run_eval(*options);
  };
}

}  // namespace microtome::app
