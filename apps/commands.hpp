/// The subcommands of the program. Each adds its options to the parser and returns what runs it;
/// that returns the exit code: 0 all done, 1 something failed, 2 wrong usage.
#pragma once

#include <functional>
#include <map>
#include <new>
#include <stdexcept>
#include <string>

#include <CLI/CLI.hpp>

#include <microtome/ops/window_attention.hpp>
#include <microtome/quantization/scheme.hpp>

namespace microtome::app {

using command = std::function<int()>;

command add_segment(CLI::App& app);
command add_trace(CLI::App& app);
command add_bench(CLI::App& app);
command add_eval(CLI::App& app);
command add_info(CLI::App& app);
command add_calibrate(CLI::App& app);
command add_quantize(CLI::App& app);
command add_sensitivity(CLI::App& app);

/// Adds the option --precision.
inline void add_precision(CLI::App& app, precision& inputs) {
  const std::map<std::string, precision> names{{"fp32", precision::fp32},
                                               {"bf16", precision::bf16}};
  app.add_option("--precision", inputs, "fp32, or bf16: factors of products rounded to 16 bits")
      ->transform(CLI::CheckedTransformer(names).description("{fp32,bf16}"))
      ->default_str("fp32");
}

/// Adds the option --sparse.
inline void add_sparse(CLI::App& app, sparsity& zeros) {
  const std::map<std::string, sparsity> names{
      {"auto", sparsity::automatic}, {"on", sparsity::on}, {"off", sparsity::off}};
  app.add_option("--sparse", zeros,
                 "skip the zeros of pruned weights: auto where it is faster, on wherever there are "
                 "any, off; the results are those of plain sums, see --winograd")
      ->transform(CLI::CheckedTransformer(names).description("{auto,on,off}"))
      ->default_str("auto");
}

/// Adds the option --winograd.
inline void add_winograd(CLI::App& app, bool& winograd) {
  const std::map<std::string, bool> names{{"on", true}, {"off", false}};
  app.add_option(
         "--winograd", winograd,
         "3x3 convolutions in fp32 by Winograd's algorithm, up to three times as fast; off: plain "
         "sums")
      ->transform(CLI::CheckedTransformer(names).description("{on,off}"))
      ->default_str("on");
}

/// Adds the option --padding.
inline void add_padding(CLI::App& app, padding& windows) {
  const std::map<std::string, padding> names{
      {"exact", padding::exact}, {"dropped", padding::dropped}, {"padded", padding::padded}};
  app.add_option("--padding", windows,
                 "windows at the border: exact, dropped as nested tensors do, or padded, which "
                 "gives what exact gives and takes longer")
      ->transform(CLI::CheckedTransformer(names).description("{exact,dropped,padded}"))
      ->default_str("exact");
}

/// What the user asked for makes no sense, though the parser could read it.
class usage_error : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

/// What to say of a failure.
inline const char* reason_of(const std::exception& e) {
  return dynamic_cast<const std::bad_alloc*>(&e) ? "not enough memory" : e.what();
}

}  // namespace microtome::app
