/// The subcommands of the program. Each adds its options to the parser and returns what runs it;
/// that returns the exit code: 0 all done, 1 something failed, 2 wrong usage.
#pragma once

#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include <CLI/CLI.hpp>

#include <microtome/weights.hpp>

namespace microtome::app {

using command = std::function<int()>;

command add_segment(CLI::App& app);
command add_trace(CLI::App& app);
command add_bench(CLI::App& app);
command add_eval(CLI::App& app);
command add_info(CLI::App& app);

/// Adds the option --precision.
inline void add_precision(CLI::App& app, precision& inputs) {
  const std::map<std::string, precision> names{{"fp32", precision::fp32},
                                               {"bf16", precision::bf16}};
  app.add_option("--precision", inputs, "fp32, or bf16: factors of products rounded to 16 bits")
      ->transform(CLI::CheckedTransformer(names).description("{fp32,bf16}"))
      ->default_str("fp32");
}

inline const char* name_of(precision inputs) {
  return inputs == precision::bf16 ? "bf16" : "fp32";
}

/// What the user asked for makes no sense, though the parser could read it.
class usage_error : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

}  // namespace microtome::app
