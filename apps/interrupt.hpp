/// Ends a long run cleanly when it is interrupted.
#pragma once

#include <csignal>
#include <exception>

namespace microtome::app {

inline volatile std::sig_atomic_t interrupts = 0;

/// From now on the first SIGINT (Ctrl-C) or SIGTERM only makes interrupted() true; the next ends
/// the program at once.
inline void catch_interrupts() {
  const auto note = [](int signal) {
    interrupts = 1;
    std::signal(signal, SIG_DFL);
  };
  std::signal(SIGINT, note);
  std::signal(SIGTERM, note);
}

inline bool interrupted() {
  return interrupts != 0;
}

/// Thrown out of work that is given up because of it.
struct interruption : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

/// What shells report of a program that SIGINT has ended.
inline constexpr int exit_interrupted = 128 + SIGINT;

}  // namespace microtome::app
