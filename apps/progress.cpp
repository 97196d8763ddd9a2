#include "progress.hpp"

#include <algorithm>
#include <cstdio>

#if __has_include(<unistd.h>)
#include <unistd.h>
#else
#include <io.h>
#endif

namespace microtome::app {

namespace {

/// Whether somebody reads along.
bool is_terminal(std::FILE* stream) {
#if __has_include(<unistd.h>)
  return isatty(fileno(stream)) != 0;
#else
  return _isatty(_fileno(stream)) != 0;
#endif
}

std::string clock_text(double seconds) {
  const auto whole = static_cast<long>(seconds + 0.5);
  char text[32];
  if (whole >= 3600)
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
  else
    std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  return text;
}

}  // namespace

progress::progress(std::size_t cases, std::size_t workers)
    : cases_(cases),
      active_(workers),
      start_(std::chrono::steady_clock::now()),
      terminal_(is_terminal(stderr)) {
  const std::lock_guard lock(mutex_);
  draw();
}

progress::~progress() {
  clear();
}

void progress::step(std::size_t worker, index_t done, index_t total) {
  const std::lock_guard lock(mutex_);
  active_[worker] = {done, total};
  const auto now = std::chrono::steady_clock::now();
  if (now - drawn_ < std::chrono::milliseconds(100)) return;
  drawn_ = now;
  draw();
}

void progress::finished(std::size_t worker, const std::string& name, const std::string& what) {
  const std::lock_guard lock(mutex_);
  end_case(worker);
  clear();
  std::printf("[%zu/%zu] %s: %s\n", done_, cases_, name.c_str(), what.c_str());
  std::fflush(stdout);
  draw();
}

void progress::failed(std::size_t worker, const std::string& name, const std::string& why) {
  const std::lock_guard lock(mutex_);
  end_case(worker);
  ++failures_;
  clear();
  std::fprintf(stderr, "[%zu/%zu] %s FAILED: %s\n", done_, cases_, name.c_str(), why.c_str());
  draw();
}

void progress::box_failed(const std::string& name, const std::string& why) {
  const std::lock_guard lock(mutex_);
  ++failures_;
  clear();
  std::fprintf(stderr, "%s: FAILED: %s\n", name.c_str(), why.c_str());
  draw();
}

void progress::say(const std::string& what) {
  const std::lock_guard lock(mutex_);
  clear();
  std::fprintf(stderr, "microtome: %s\n", what.c_str());
}

void progress::end_case(std::size_t worker) {
  ++done_;
  active_[worker] = {};
}

void progress::draw() {
  if (!terminal_) return;
  double finished = static_cast<double>(done_);
  slices sum;
  for (const slices& s : active_) {
    if (s.total) finished += static_cast<double>(s.done) / static_cast<double>(s.total);
    sum.done += s.done;
    sum.total += s.total;
  }
  const double share = finished / static_cast<double>(std::max<std::size_t>(cases_, 1));
  constexpr int width = 32;
  const int filled = static_cast<int>(share * width);
  std::string line = "\r\x1b[K[" + std::string(static_cast<std::size_t>(filled), '#') +
                     std::string(static_cast<std::size_t>(width - filled), '.') + "] cases " +
                     std::to_string(done_) + "/" + std::to_string(cases_);
  if (sum.total > 1)
    line += "  slices " + std::to_string(sum.done) + "/" + std::to_string(sum.total);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
  if (share > 0.01) line += "  " + clock_text(elapsed.count() * (1 - share) / share) + " left";
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
}

void progress::clear() {
  if (!terminal_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
}

}  // namespace microtome::app
