// The choice among targets, in the tests that link microtome::dispatch.
#include <cstring>

#include <kernels/active.hpp>

#include "support.hpp"

namespace microtome::tests {

namespace {

/// MICROTOME_TARGET as it is set, or not, while this lives.
class target_request {
public:
  explicit target_request(const char* value) : before_(std::getenv(name)) {
    if (before_) kept_ = before_;
    value ? setenv(name, value, 1) : unsetenv(name);
  }
  ~target_request() { before_ ? setenv(name, kept_.c_str(), 1) : unsetenv(name); }

private:
  static constexpr const char* name = "MICROTOME_TARGET";
  const char* before_;
  std::string kept_;
};

}  // namespace

TEST_CASE("every target compiled in has a name of its own, and scalar runs anywhere") {
  const auto targets = kernels::compiled_targets();
  REQUIRE(targets.size() >= 2);
  for (std::size_t i = 0; i < targets.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      CHECK(std::strcmp(targets[i].kernels->name, targets[j].kernels->name) != 0);
  CHECK(std::string(targets.back().kernels->name) == "scalar");
  CHECK(targets.back().missing.empty());
}

TEST_CASE("the target that was asked for is the one that runs, else the best that can") {
  const char* asked = std::getenv("MICROTOME_TARGET");
  const kernels::table* best = nullptr;
  for (const auto& t : kernels::compiled_targets())
    if (!best && t.missing.empty()) best = t.kernels;
  if (asked && *asked)
    CHECK(std::string(kernels::active().name) == asked);
  else
    CHECK(&kernels::active() == best);
}

TEST_CASE("a target that is not there is an error that says which are") {
  for (const auto& t : kernels::compiled_targets()) {
    const target_request request(t.kernels->name);
    if (t.missing.empty())
      CHECK(kernels::target_complaint().empty());
    else
      CHECK(mentions(kernels::target_complaint(), {t.kernels->name, "needs", t.missing.c_str()}));
  }
  {
    const target_request request("mmx");
    CHECK(mentions(kernels::target_complaint(), {"'mmx'", "compiled in", "scalar", "runs"}));
  }
  const target_request none("");
  CHECK(kernels::target_complaint().empty());
}

}  // namespace microtome::tests
