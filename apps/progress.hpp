#pragma once

#include <chrono>
#include <cstddef>
#include <mutex>
#include <string>
#include <vector>

namespace microtome::app {

/// Shows how far a run over many cases has come: a bar with cases, slices and the time left where
/// the error stream is a terminal, a line for each finished case otherwise. For any number of
/// threads.
class progress {
public:
  using index_t = std::ptrdiff_t;

  /// `workers` cases are in progress at a time, of `cases` in all.
  progress(std::size_t cases, std::size_t workers);
  ~progress();

  /// Worker `worker` has done `done` of the `total` slices of its case.
  void step(std::size_t worker, index_t done, index_t total);
  /// The worker's case is written: `what` describes it.
  void finished(std::size_t worker, const std::string& name, const std::string& what);
  /// The worker's case failed.
  void failed(std::size_t worker, const std::string& name, const std::string& why);

  /// One box of a case failed; the case goes on.
  void box_failed(const std::string& name, const std::string& why);

  /// Of the whole run.
  void say(const std::string& what);

  std::size_t failures() const { return failures_; }

private:
  struct slices {
    index_t done = 0, total = 0;
  };

  void end_case(std::size_t worker);
  void draw();
  void clear();

  std::size_t cases_, done_ = 0, failures_ = 0;
  std::vector<slices> active_;
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point drawn_{};
  bool terminal_;
  std::mutex mutex_;
};

}  // namespace microtome::app
