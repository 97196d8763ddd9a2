// Runs the tests on the target that kernels::active() gives: see MICROTOME_TARGET in HACKING.md.
#define DOCTEST_CONFIG_IMPLEMENT
#include <cstdio>

#include <doctest/doctest.h>

#include <kernels/active.hpp>

int main(int argc, char** argv) {
  using namespace microtome::kernels;
  if (const std::string complaint = target_complaint(); !complaint.empty()) {
    const std::string asked = std::getenv("MICROTOME_TARGET");
    for (const compiled_target& t : compiled_targets())
      if (t.kernels->name == asked) {
        std::printf("skipped: this CPU lacks %s, which %s needs\n", t.missing.c_str(),
                    t.kernels->name);
        return 0;
      }
    std::fprintf(stderr, "%s\n", complaint.c_str());
    return 1;
  }
  std::printf("target %s: %s\n", active().name, active().description);
  return doctest::Context(argc, argv).run();
}
