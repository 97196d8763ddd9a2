/// `eval --coco`: mean IoU and average precision on images annotated in COCO's format.
#pragma once

#include <string>

#include <microtome/ops/window_attention.hpp>

#include "commands.hpp"

namespace microtome::app {

struct coco_options {
  std::string annotations;  ///< empty: the command is about other files
  std::string images, model, detections, results;
  std::string output, masks;
  bool multimask = false, crowds = false;
  int threads = 0;
  precision factors = precision::fp32;
  sparsity zeros = sparsity::automatic;
  bool winograd = true;
};

/// Adds the options that need --coco, and that one; `output` of coco_options is the command's own.
void add_coco_options(CLI::App& app, coco_options& options);

/// Returns the program's exit code.
int run_eval_coco(const coco_options& options);

}  // namespace microtome::app
