/// What `calibrate --moments` wrote, for the commands that round weights by it.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "rounding.hpp"

namespace microtome::app {

/// Second moments, where the user has given some.
class moments_file {
public:
  moments_file(const std::string& path, const std::string& model_path,
               const std::string& fingerprint) {
    if (path.empty()) return;
    file_.emplace(std::filesystem::path(path));
    rounder_.emplace(*file_);
    if (rounder_->model() != fingerprint)
      fail(path, ": the moments are of another model (", rounder_->model(), ", but ", model_path,
           " is ", fingerprint, ")");
  }
  const weight_rounder* rounder() const { return rounder_ ? &*rounder_ : nullptr; }

private:
  std::optional<safetensors> file_;
  std::optional<moment_rounder> rounder_;
};

}  // namespace microtome::app
