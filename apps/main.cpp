#include <cstdio>
#include <utility>
#include <vector>

#include <kernels/active.hpp>

#include "commands.hpp"

int main(int argc, char** argv) {
  using namespace microtome::app;
  CLI::App app{"microtome: promptable segmentation of medical images on the CPU."};
  app.require_subcommand(1);
  app.set_version_flag("--version", MICROTOME_VERSION);

  std::vector<std::pair<CLI::App*, command>> commands;
  const auto add = [&](const char* name, const char* what, command (*make)(CLI::App&)) {
    CLI::App* parser = app.add_subcommand(name, what);
    commands.emplace_back(parser, make(*parser));
  };
  add("segment", "segment .npz cases and PNG images", add_segment);
  add("trace", "write every intermediate result of one case", add_trace);
  add("bench", "measure latency, GFLOP/s and the share of the machine's peak", add_bench);
  add("eval", "compare segmentations with ground truth", add_eval);
  add("calibrate", "record the ranges of a model's activations over a folder of cases",
      add_calibrate);
  add("quantize", "write a model with layers in 8 bits", add_quantize);
  add("sensitivity", "find which layers may be in 8 bits", add_sensitivity);
  add("info", "show the CPU target and what a model file holds", add_info);

  try {
    app.parse(argc, argv);
    if (const std::string complaint = microtome::kernels::target_complaint(); !complaint.empty())
      throw usage_error(complaint);
    for (const auto& [parser, run] : commands)
      if (parser->parsed()) return run();
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  } catch (const usage_error& e) {
    std::fprintf(stderr, "microtome: %s\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "microtome: %s\n", e.what());
    return 1;
  }
  return 2;
}
