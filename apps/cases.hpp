/// Cases from a folder, as the commands that go through one take them.
#pragma once

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include <microtome/io/case.hpp>
#include <microtome/pipeline.hpp>

#include "commands.hpp"

namespace microtome::app {

/// The .npz files of a folder, by name, or the one file that `input` is.
inline std::vector<std::filesystem::path> find_cases(const std::string& input) {
  namespace fs = std::filesystem;
  if (!fs::exists(input)) throw usage_error(input + ": no such file or folder");
  if (!fs::is_directory(input)) return {input};
  std::vector<fs::path> cases;
  for (const fs::directory_entry& entry : fs::directory_iterator(input))
    if (entry.path().extension() == ".npz") cases.push_back(entry.path());
  if (cases.empty()) throw usage_error(input + ": no .npz cases in this folder");
  std::sort(cases.begin(), cases.end());
  return cases;
}

inline label_map segment_case(session& s, const io::segmentation_case& input,
                              const progress_callback& step = {}) {
  if (const auto* image = std::get_if<io::image_case>(&input))
    return segment(s, image->image, image->boxes);
  const auto& volume = std::get<io::volume_case>(input);
  return segment(s, volume.volume, volume.boxes, step);
}

}  // namespace microtome::app
