// The library microtome::dispatch: chooses among the targets that targets/compiled.cpp was compiled
// for. This file is compiled with the compiler's own flags, since it runs before anything is known
// of the CPU.
#include <iterator>
#include <set>
#include <sstream>

#include <kernels/active.hpp>
#include <kernels/cpu.hpp>

#include <microtome/core/error.hpp>  // its type alone comes from above the kernels

namespace microtome::kernels {

#define MICROTOME_TARGET(target)      \
  namespace target {                  \
  extern const table* const compiled; \
  }
#include <microtome_compiled_targets.inc>
#undef MICROTOME_TARGET

namespace {

/// The words of `needs` that are not among those of `has`.
std::string words_missing(const char* needs, const std::string& has) {
  std::istringstream needed(needs), there(has);
  const std::set<std::string> words{std::istream_iterator<std::string>(there), {}};
  std::string missing;
  for (std::string word; needed >> word;)
    if (!words.contains(word)) missing.append(missing.empty() ? "" : " ").append(word);
  return missing;
}

const table& choose() {
  if (const std::string complaint = target_complaint(); !complaint.empty()) fail(complaint);
  const char* asked = std::getenv("MICROTOME_TARGET");
  for (const compiled_target& t : compiled_targets())
    if (asked && *asked ? asked == std::string(t.kernels->name) : t.missing.empty())
      return *t.kernels;
  fail("this CPU runs none of the targets that are compiled in; it has: ", cpu_features());
}

}  // namespace

std::string cpu_features() {
  return detail::find_cpu_features();
}

std::vector<compiled_target> compiled_targets() {
  const table* const all[] = {
#define MICROTOME_TARGET(target) target::compiled,
#include <microtome_compiled_targets.inc>
#undef MICROTOME_TARGET
  };
  const std::string has = cpu_features();
  std::vector<compiled_target> targets;
  for (const table* kernels : all) targets.push_back({kernels, words_missing(kernels->needs, has)});
  return targets;
}

const table& active() {
  static const table& chosen = choose();
  return chosen;
}

}  // namespace microtome::kernels
