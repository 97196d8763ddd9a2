#pragma once

#include <kernels/macros_off.hpp>

#include <sstream>
#include <stdexcept>
#include <string>

#include <kernels/strict_math.hpp>

namespace microtome {

/// What every function of microtome throws on bad input. The message names the file, the tensor or
/// argument, what was expected and what was found.
class error : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

/// Throws `error` with the arguments printed one after the other.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw error(message.str());
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
