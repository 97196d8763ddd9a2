// The mutator of inputs that are safetensors files. It knows their parts, since one that flips bits
// in the header gets no further than its JSON. Half of the mutations change what the header says of
// a tensor or of the model, the others bytes of the header or of the data; the header's length is
// always right.
#pragma once

#include <string>
#include <string_view>

#include <microtome/model_file/safetensors.hpp>

#include "support.hpp"

namespace microtome::fuzz {

struct parts {
  std::string header, data;
};

inline bool split(std::span<const std::uint8_t> file, parts& out) {
  std::uint64_t length = 0;
  if (file.size() < 8) return false;
  std::memcpy(&length, file.data(), 8);
  if (length > file.size() - 8) return false;
  const auto* text = reinterpret_cast<const char*>(file.data()) + 8;
  out.header.assign(text, static_cast<std::size_t>(length));
  out.data.assign(text + length, file.size() - 8 - static_cast<std::size_t>(length));
  return true;
}

inline std::string join(const parts& p) {
  std::string file(8, '\0');
  const std::uint64_t length = p.header.size();
  std::memcpy(file.data(), &length, 8);
  return file + p.header + p.data;
}

/// Changes a header as text, a number, a word or a tensor at a time: far quicker than through a
/// JSON document, and the rest of the text stays as odd as it was.
class header_mutator {
public:
  header_mutator(std::string& text, unsigned seed) : text_(text), random_(seed) {}

  void change() {
    switch (below(8)) {
      case 0:
        change_tensor();
        break;
      case 1:
        change_word();
        break;
      case 2:
        change_value();
        break;
      default:
        change_number();
    }
  }

private:
  std::size_t below(std::size_t n) { return n ? random_() % n : 0; }
  template <class List>
  std::string_view one_of(const List& list) {
    return list[below(std::size(list))];
  }

  /// Where the first text that looks like `what` begins at or after a random place, from the start
  /// if there is none; npos where there is none at all.
  std::size_t any(std::string_view what) {
    const std::size_t from = below(text_.size());
    const std::size_t found = text_.find(what, from);
    return found != std::string::npos ? found : text_.find(what);
  }

  /// A number of a list, or one that follows a name; in the configuration, too, which is JSON in a
  /// string.
  void change_number() {
    static constexpr std::string_view numbers[] = {"0",          "1",
                                                   "2",          "3",
                                                   "4",          "7",
                                                   "8",          "16",
                                                   "64",         "255",
                                                   "4096",       "65536",
                                                   "2147483647", "-1",
                                                   "1.5",        "\"8\"",
                                                   "4294967296", "null",
                                                   "[]",         "true",
                                                   "1e400",      "18446744073709551615"};
    const auto digit = [](char c) { return c >= '0' && c <= '9'; };
    std::size_t at = below(text_.size());
    for (std::size_t tries = 0;; at = 0) {
      while (at < text_.size() &&
             !(digit(text_[at]) && at > 0 &&
               std::string_view("[,: ").find(text_[at - 1]) != std::string_view::npos))
        ++at;
      if (at < text_.size()) break;
      if (++tries == 2) return;
    }
    std::size_t length = 1;
    while (at + length < text_.size() && digit(text_[at + length])) ++length;
    switch (below(8)) {
      case 0:
        text_.insert(at, std::string(one_of(numbers)) + ",");
        break;
      case 1:
        if (at + length < text_.size() && text_[at + length] == ',')
          text_.erase(at, length + 1);
        else if (text_[at - 1] == ',')
          text_.erase(at - 1, length + 1);
        else
          text_.erase(at, length);
        break;
      default:
        text_.replace(at, length, one_of(numbers));
    }
  }

  /// A tensor's type, or a text of the metadata.
  void change_word() {
    static constexpr std::string_view words[] = {
        "F32",          "F16",         "BF16",     "F64",      "I8",    "U8",         "I64",
        "BOOL",         "?",           "",         "1",        "2",     "area",       "tiny_vit",
        "efficientvit", "fused",       "inverted", "residual", "range", "statistics", "attention",
        "exact",        "antialiased", "strided"};
    const std::size_t colon = any("\":\"");
    if (colon == std::string::npos) return;
    std::size_t end = colon + 3;
    while (end < text_.size() && text_[end] != '"') end += text_[end] == '\\' ? 2 : 1;
    if (end < text_.size()) text_.replace(colon + 3, end - colon - 3, one_of(words));
  }

  /// A list or an object becomes something else, or has its first element once more.
  void change_value() {
    static constexpr std::string_view values[] = {"[]", "{}", "0", "null", "1e9", "[[]]"};
    const std::size_t start = any(below(2) ? ":[" : ":{") + 1;
    if (start == 0 || start >= text_.size()) return;
    std::size_t end = start, comma = 0;
    for (int depth = 0; end < text_.size(); ++end) {
      const char c = text_[end];
      depth += (c == '[' || c == '{') - (c == ']' || c == '}');
      if (depth == 0) break;
      if (depth == 1 && c == ',' && !comma) comma = end;
    }
    if (comma && below(2))
      text_.insert(start + 1, text_.substr(start + 1, comma - start));
    else if (end < text_.size())
      text_.replace(start, end + 1 - start, one_of(values));
  }

  /// A tensor goes, gets another name, or comes again under another.
  void change_tensor() {
    static constexpr std::string_view ends[] = {"_mask", "_values", "_scale", "_zero_point", ".x"};
    const std::size_t colon = any("\":{\"");
    const std::size_t close = text_.find('}', colon);
    if (colon == std::string::npos || close == std::string::npos) return;
    const std::size_t name = text_.rfind('"', colon - 1);
    if (name == std::string::npos) return;
    const std::string entry = text_.substr(name, close + 1 - name);
    const std::size_t comma = close + 1 < text_.size() && text_[close + 1] == ',' ? 1 : 0;
    switch (below(4)) {
      case 0:
        text_.erase(name, entry.size() + comma);
        break;
      case 1:
        text_.insert(colon, one_of(ends));
        break;
      case 2:
        if (const std::size_t cut = text_.rfind('_', colon); cut > name && cut < colon)
          text_.erase(cut, colon - cut);
        break;
      default:
        text_.insert(name, entry + ",");
        text_.insert(colon, one_of(ends));
    }
  }

  std::string& text_;
  std::minstd_rand random_;
};

}  // namespace microtome::fuzz

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t most, unsigned seed) {
  using namespace microtome::fuzz;
  parts file;
  if (seed % 16 == 0 || !split({data, size}, file)) return LLVMFuzzerMutate(data, size, most);
  if (seed % 2) {
    header_mutator mutator(file.header, seed);
    for (unsigned i = 0; i <= seed / 16 % 3; ++i) mutator.change();
  } else if (seed % 4) {
    mutate(file.data, most > file.header.size() + 8 ? most - file.header.size() - 8 : 0);
  } else {
    mutate(file.header, most > file.data.size() + 8 ? most - file.data.size() - 8 : 0);
  }
  return give_back(join(file), data, size, most);
}
