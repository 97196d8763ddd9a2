/// The subcommands of the program. Each adds its options to the parser and returns what runs it;
/// that returns the exit code: 0 all done, 1 something failed, 2 wrong usage.
#pragma once

#include <functional>
#include <stdexcept>

#include <CLI/CLI.hpp>

namespace microtome::app {

using command = std::function<int()>;

command add_segment(CLI::App& app);
command add_trace(CLI::App& app);
command add_bench(CLI::App& app);
command add_eval(CLI::App& app);
command add_info(CLI::App& app);

/// What the user asked for makes no sense, though the parser could read it.
class usage_error : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

}  // namespace microtome::app
