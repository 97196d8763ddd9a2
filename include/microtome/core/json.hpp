#pragma once

#include <kernels/macros_off.hpp>

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include <microtome/core/error.hpp>

namespace microtome::detail {

/// JSON from a file; `what` stands for it in errors. What microtome reads nests six deep at most; a
/// hostile text nested a million deep would exhaust the stack.
class json_document {
public:
  json_document(std::string_view text, const std::string& what) {
    const auto bounded_depth = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
      if (depth > 8) fail(what, " nests deeper than it ever should");
      return true;
    };
    try {
      value = nlohmann::json::parse(text, bounded_depth);
    } catch (const nlohmann::json::exception& e) {
      fail(what, " is not JSON: ", e.what());
    }
  }
  json_document(const json_document&) = delete;
  json_document& operator=(const json_document&) = delete;
  ~json_document() { empty(value); }

  nlohmann::json value;

private:
  /// nlohmann's destructor of what has children allocates, and ends the program where it cannot;
  /// so that they go first.
  static void empty(nlohmann::json& from) {
    if (!from.is_structured()) return;
    for (nlohmann::json& child : from) empty(child);
    from.clear();
  }
};

}  // namespace microtome::detail

#include <kernels/macros_on.hpp>
