#pragma once

#include <kernels/macros_off.hpp>

#include <version>

#ifdef __cpp_lib_bit_cast
#include <bit>
#endif

namespace microtome {

/// std::bit_cast, which the libraries of some compilers lack (libc++ before 14).
template <class To, class From>
constexpr To bit_cast(const From& from) {
#ifdef __cpp_lib_bit_cast
  return std::bit_cast<To>(from);
#else
  return __builtin_bit_cast(To, from);
#endif
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
