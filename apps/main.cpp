#include <stdlib.h>  // unsetenv is POSIX's

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include <kernels/active.hpp>

#include "commands.hpp"

namespace {

// LLVM's OpenMP runtime ends the program when OMP_NUM_THREADS is no number, or one of more threads
// than it can ever start, and gives threads as small a stack as OMP_STACKSIZE says. It reads these
// when it is first used, which is after this.
void drop_impossible_variables_of_openmp() {
  const auto drop = [](const char* name, const char* possible, auto&& is_possible) {
    const char* const text = std::getenv(name);
    if (text == nullptr) return;
    char* end = nullptr;
    const long long number = std::strtoll(text, &end, 10);
    while (*end == ' ') ++end;
    if (is_possible(number, *end)) return;
    std::fprintf(stderr, "microtome: %s=%s is ignored; possible: %s\n", name, text, possible);
    unsetenv(name);
  };
  drop("OMP_NUM_THREADS", "1 to 1024", [](long long threads, char next) {
    return threads >= 1 && threads <= 1024 && (next == 0 || next == ',');
  });
  drop("OMP_STACKSIZE", "1M to 4G", [](long long size, char unit) {
    constexpr long long mega = 1 << 20;
    const long long bytes = unit == 'B' || unit == 'b'                ? 1
                            : unit == 0 || unit == 'K' || unit == 'k' ? 1 << 10
                            : unit == 'M' || unit == 'm'              ? mega
                            : unit == 'G' || unit == 'g'              ? 1 << 30
                                                                      : 0;
    return bytes > 0 && size >= mega / bytes + (bytes > mega) && size <= 4096 * mega / bytes;
  });
}

}  // namespace

int main(int argc, char** argv) {
  using namespace microtome::app;
  drop_impossible_variables_of_openmp();
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
