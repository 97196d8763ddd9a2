/// Which target's kernels run. Header-only, those of the compiler's own flags. With the library
/// microtome::dispatch, which defines MICROTOME_DISPATCH for who links it, the best of those
/// compiled into it that this CPU can run, or the one that the environment variable
/// MICROTOME_TARGET names; then nothing that is compiled for a CPU is in these headers.
#pragma once

#include "macros_off.hpp"

#include <cstdlib>
#include <string>
#include <vector>

#include "contract.hpp"
#ifndef MICROTOME_DISPATCH
#include "table.hpp"
#endif

namespace microtome::kernels {

/// A target that is compiled into this program.
struct compiled_target {
  const table* kernels;
  std::string missing;  ///< what this CPU lacks of kernels->needs; empty where it can run
};

#ifdef MICROTOME_DISPATCH

/// The kernels that the runtime calls, chosen by the first call. Throws microtome::error where
/// MICROTOME_TARGET names a target that is not compiled in, or that this CPU cannot run.
const table& active();

/// Best first.
std::vector<compiled_target> compiled_targets();

/// The features of this CPU, as far as targets ask for them, between spaces; of those that the
/// operating system lets programs use.
std::string cpu_features();

#else

inline const table& active() {
  return MICROTOME_TARGET_NAMESPACE::kernel_table;
}

inline std::vector<compiled_target> compiled_targets() {
  return {{&active(), ""}};
}

inline std::string cpu_features() {
  return active().needs;
}

#endif

/// What is wrong with MICROTOME_TARGET, or nothing. Programs ask before they start, since without
/// the library nothing else reads it.
inline std::string target_complaint() {
  const char* asked = std::getenv("MICROTOME_TARGET");
  if (!asked || !*asked) return "";
  std::string compiled, possible;
  for (const compiled_target& t : compiled_targets()) {
    compiled += std::string(" ") + t.kernels->name;
    if (t.missing.empty()) possible += std::string(" ") + t.kernels->name;
    if (asked != std::string(t.kernels->name)) continue;
    if (t.missing.empty()) return "";
    compiled += " (needs " + t.missing + ")";
  }
  return std::string("MICROTOME_TARGET is '") + asked + "'; compiled in:" + compiled +
         "; this CPU runs:" + possible;
}

}  // namespace microtome::kernels

#include "macros_on.hpp"
