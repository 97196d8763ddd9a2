// One target's kernels for the library microtome::dispatch: CMake compiles this file once per
// target with its flags. A CPU that lacks the target reads the address below and runs nothing of
// it.
#include <string_view>

#include <kernels/table.hpp>

static_assert(std::string_view(microtome::kernels::MICROTOME_TARGET_NAMESPACE::target::name) ==
                  MICROTOME_EXPECTED_TARGET,
              "the flags in the target's file make another target");

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

extern const table* const compiled;
const table* const compiled = &kernel_table;

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
