/// Cases from a folder, as the commands that go through one take them.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <microtome/imaging/pipeline.hpp>
#include <microtome/io/case.hpp>

#include "commands.hpp"

namespace microtome::app {

/// Whether a file's name ends so, in capitals or not: ".npz".
inline bool has_extension(const std::filesystem::path& path, const std::string& extension) {
  std::string found = path.extension().string();
  std::transform(found.begin(), found.end(), found.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return found == extension;
}

/// Whether a file is one that systems put beside others for themselves: `._name` of macOS,
/// .DS_Store.
inline bool is_hidden(const std::filesystem::path& path) {
  return path.filename().string().starts_with('.');
}

/// The files of a folder that `wanted` says yes to, by name. What else is there is told of.
inline std::vector<std::filesystem::path> list_folder(
    const std::filesystem::path& folder,
    const std::function<bool(const std::filesystem::path&)>& wanted) {
  namespace fs = std::filesystem;
  std::vector<fs::path> found;
  std::vector<std::string> others;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    std::error_code unknown;
    const bool is_folder = entry.is_directory(unknown);
    if (!is_folder && !is_hidden(entry.path()) && wanted(entry.path()))
      found.push_back(entry.path());
    else
      others.push_back(entry.path().filename().string() + (is_folder ? "/" : ""));
  }
  std::sort(found.begin(), found.end());
  std::sort(others.begin(), others.end());
  if (!others.empty()) {
    constexpr std::size_t most = 5;
    std::string text;
    for (std::size_t i = 0; i < std::min(most, others.size()); ++i)
      text += (i ? ", " : "") + others[i];
    if (others.size() > most) text += " and " + std::to_string(others.size() - most) + " more";
    std::fprintf(stderr, "%s: left out: %s\n", folder.string().c_str(), text.c_str());
  }
  return found;
}

/// The .npz files of a folder, by name, or the one file that `input` is.
inline std::vector<std::filesystem::path> find_cases(const std::string& input) {
  namespace fs = std::filesystem;
  if (!fs::exists(input)) throw usage_error(input + ": no such file or folder");
  if (!fs::is_directory(input)) return {input};
  std::vector<fs::path> cases =
      list_folder(input, [](const fs::path& path) { return has_extension(path, ".npz"); });
  if (cases.empty()) throw usage_error(input + ": no .npz cases in this folder");
  return cases;
}

inline label_map segment_case(session& s, const io::segmentation_case& input,
                              const progress_callback& step = {},
                              const bad_box_callback& bad_box = {}, bool multimask = false,
                              const mask_callback& found = {}) {
  if (const auto* image = std::get_if<io::image_case>(&input))
    return segment(s, image->image, image->prompts, multimask, bad_box, found);
  const auto& volume = std::get<io::volume_case>(input);
  return segment(s, volume.volume, volume.boxes, step, bad_box, multimask);
}

}  // namespace microtome::app
