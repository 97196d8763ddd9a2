#include <stdlib.h>  // unsetenv is POSIX's
#ifdef __linux__
#include <unistd.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <utility>
#include <vector>

#include <kernels/active.hpp>

#include "commands.hpp"

namespace {

// OpenMP's runtimes end the program, or overflow their threads' stacks, where these variables ask
// for what cannot be: more threads than can ever start, or hardly any stack. Returns whether there
// were such, which are then gone.
bool drop_impossible_variables_of_openmp() {
  const auto drop = [](const char* name, const char* possible, auto&& is_possible) {
    const char* const text = std::getenv(name);
    if (text == nullptr) return false;
    char* end = nullptr;
    const long long number = std::strtoll(text, &end, 10);
    while (*end == ' ') ++end;
    if (is_possible(number, *end)) return false;
    std::fprintf(stderr, "microtome: %s=%s is ignored; possible: %s\n", name, text, possible);
#ifdef _WIN32
    _putenv_s(name, "");
#else
    unsetenv(name);
#endif
    return true;
  };
  const bool threads = drop("OMP_NUM_THREADS", "1 to 1024", [](long long number, char next) {
    return number >= 1 && number <= 1024 && (next == 0 || next == ',');
  });
  const bool stack = drop("OMP_STACKSIZE", "1M to 4G", [](long long number, char unit) {
    constexpr double kilo = 1024;
    double bytes = static_cast<double>(number);
    switch (unit) {
      case 'B':
      case 'b':
        break;
      case 0:
      case 'K':
      case 'k':
        bytes *= kilo;
        break;
      case 'M':
      case 'm':
        bytes *= kilo * kilo;
        break;
      case 'G':
      case 'g':
        bytes *= kilo * kilo * kilo;
        break;
      default:
        return false;
    }
    return bytes >= kilo * kilo && bytes <= 4 * kilo * kilo * kilo;
  });
  return threads || stack;
}

// A full disk or a reader that has gone must not end a run whose other results can be written.
void let_writing_fail() {
#ifdef SIGPIPE
  std::signal(SIGPIPE, SIG_IGN);
#endif
#ifdef SIGXFSZ
  std::signal(SIGXFSZ, SIG_IGN);
#endif
}

// Where memory runs out within some functions of the C++ library (listing a folder, in GCC's), it
// ends the program rather than throw. That is told as other failures are.
[[noreturn]] void end_for_want_of_memory() {
  try {
    if (std::current_exception()) throw;
  } catch (const std::bad_alloc&) {
  } catch (...) {
    std::abort();
  }
  std::fputs("microtome: not enough memory\n", stderr);
  std::_Exit(1);
}

/// The exit code, unless what was printed could not be.
int checked(int code) {
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return code;
  std::fputs("microtome: not all of the standard output could be written\n", stderr);
  return code ? code : 1;
}

int run(int argc, char** argv) {
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
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  if (const std::string complaint = microtome::kernels::target_complaint(); !complaint.empty())
    throw usage_error(complaint);
  for (const auto& [parser, run_command] : commands)
    if (parser->parsed()) return checked(run_command());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  const bool dropped = drop_impossible_variables_of_openmp();
#ifdef __linux__
  // GCC's runtime has read the variables before this, and does so again.
  if (dropped) ::execv("/proc/self/exe", argv);
#else
  static_cast<void>(dropped);
#endif
#ifdef __GLIBC__
  // A weight is read, rearranged and packed: what is given back then returns to the system at once.
  // By itself glibc would, once it has seen such a block, keep the next ones in a heap full of
  // gaps.
  mallopt(M_MMAP_THRESHOLD, 1 << 18);
#endif
  let_writing_fail();
  std::set_terminate(end_for_want_of_memory);
  try {
    return run(argc, argv);
  } catch (const microtome::app::usage_error& e) {
    std::fprintf(stderr, "microtome: %s\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "microtome: %s\n", microtome::app::reason_of(e));
  }
  return 1;
}
