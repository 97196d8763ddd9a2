/// What the tests share: seeded numbers, comparisons, and where data lies.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <microtome/core/tensor.hpp>

namespace microtome::tests {

/// Normally distributed values, the same in every run.
inline tensor<float> random_tensor(shape extents, unsigned seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  tensor<float> values(extents);
  for (float& value : values) value = normal(generator);
  return values;
}

/// Pointers to the rows of a dense matrix whose rows lie `stride` floats apart.
template <class T>
std::vector<T*> row_pointers_of(T* first, index_t rows, index_t stride) {
  std::vector<T*> pointers;
  for (index_t i = 0; i < rows; ++i) pointers.push_back(first + i * stride);
  return pointers;
}

/// Largest absolute difference; infinite where a value is not a number.
template <class A, class B>
double max_error(const A& a, const B& b) {
  REQUIRE(std::distance(a.begin(), a.end()) == std::distance(b.begin(), b.end()));
  double worst = 0;
  auto other = b.begin();
  for (auto one = a.begin(); one != a.end(); ++one, ++other) {
    const double difference = std::abs(double{*one} - double{*other});
    if (!(difference <= worst)) worst = std::isnan(difference) ? HUGE_VAL : difference;
  }
  return worst;
}

/// Standard deviation, to state errors relative to.
template <class A>
double deviation(const A& a) {
  double sum = 0, squares = 0;
  for (const auto value : a) {
    sum += double{value};
    squares += double{value} * double{value};
  }
  const auto n = static_cast<double>(std::distance(a.begin(), a.end()));
  return std::sqrt(squares / n - sum / n * (sum / n));
}

/// Files that the project ships for its tests.
inline std::filesystem::path data_file(const std::string& name) {
  return std::filesystem::path(MICROTOME_TEST_DATA) / name;
}

/// The message of the error that f throws; fails the test where it throws none.
template <class Function>
std::string error_of(Function&& f) {
  try {
    f();
  } catch (const error& e) {
    return e.what();
  }
  FAIL("no error was thrown");
  return "";
}

/// Whether `text` holds all of `parts`.
inline bool mentions(const std::string& text, std::initializer_list<const char*> parts) {
  return std::all_of(parts.begin(), parts.end(), [&](const char* part) {
    const bool found = text.find(part) != std::string::npos;
    if (!found) MESSAGE("'" << text << "' does not mention '" << part << "'");
    return found;
  });
}

}  // namespace microtome::tests
