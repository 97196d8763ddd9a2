// The mutator of inputs that are safetensors files. It knows their parts, since one that flips bits
// in the header gets no further than its JSON. Half of the mutations change what the header says of
// a tensor or of the model, the others bytes of the header or of the data; the header's length is
// always right.
#pragma once

#include <microtome/safetensors.hpp>

#include "support.hpp"

namespace microtome::fuzz {

using json = nlohmann::json;

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

class header_mutator {
public:
  explicit header_mutator(unsigned seed) : random_(seed) {}

  void change(json& header) {
    if (header.empty()) return;
    auto at = std::next(header.begin(), static_cast<std::ptrdiff_t>(below(header.size())));
    const std::string name = at.key();
    if (name == "__metadata__") {
      change_metadata(at.value());
    } else {
      switch (below(6)) {
        case 0:
          header.erase(at);
          break;
        case 1:
          rename(header, name);
          break;
        default:
          change_tensor(at.value());
      }
    }
  }

private:
  std::size_t below(std::size_t n) { return n ? random_() % n : 0; }
  template <class List>
  auto one_of(const List& list) {
    return list[below(std::size(list))];
  }

  json number() {
    static const json numbers[] = {
        0,    1,     2,          3,  4,   7,   8,  16,         64,         255,
        4096, 65536, 2147483647, -1, 1.5, "8", {}, 1ull << 32, 1ull << 63, 18446744073709551615ull};
    return one_of(numbers);
  }

  void rename(json& header, const std::string& name) {
    static const char* const ends[] = {"_mask", "_values", "_scale", "", ".x"};
    const json value = header[name];
    if (below(2)) header.erase(name);
    header[name + one_of(ends)] = value;
  }

  void change_tensor(json& tensor) {
    static const char* const dtypes[] = {"F32", "F16", "BF16", "F64", "I8",
                                         "U8",  "I64", "BOOL", "?"};
    if (!tensor.is_object()) return;
    switch (below(4)) {
      case 0:
        tensor["dtype"] = one_of(dtypes);
        break;
      case 1:
        change_list(tensor["data_offsets"]);
        break;
      default:
        change_list(tensor["shape"]);
    }
  }

  void change_list(json& list) {
    if (!list.is_array()) return;
    if (list.empty() || below(5) == 0)
      list.push_back(number());
    else if (below(6) == 0)
      list.erase(list.size() - 1);
    else
      list[below(list.size())] = number();
  }

  /// A number or a list in the configuration, or the text of another entry.
  void change_metadata(json& metadata) {
    if (!metadata.is_object() || metadata.empty()) return;
    auto at = std::next(metadata.begin(), static_cast<std::ptrdiff_t>(below(metadata.size())));
    if (at.key() != "config" || !at.value().is_string()) {
      at.value() =
          one_of(std::array<const char*, 6>{"", "1", "2", "lite_medsam", "microtome", "x"});
      return;
    }
    json config = json::parse(at.value().get<std::string>(), nullptr, false);
    if (config.is_discarded()) return;
    json* place = &config;
    while (place->is_structured() && !place->empty()) {
      auto next = std::next(place->begin(), static_cast<std::ptrdiff_t>(below(place->size())));
      if (next.value().is_structured() && below(8) == 0) {
        place->erase(next);
        at.value() = config.dump();
        return;
      }
      place = &next.value();
    }
    *place = number();
    at.value() = config.dump();
  }

  std::minstd_rand random_;
};

}  // namespace microtome::fuzz

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t most, unsigned seed) {
  using namespace microtome::fuzz;
  parts file;
  if (seed % 16 == 0 || !split({data, size}, file)) return LLVMFuzzerMutate(data, size, most);
  nlohmann::json header = nlohmann::json::parse(file.header, nullptr, false);
  if (seed % 2 && header.is_object()) {
    header_mutator mutator(seed);
    for (unsigned i = 0; i <= seed / 16 % 3; ++i) mutator.change(header);
    file.header = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  } else if (seed % 4) {
    mutate(file.data, most > file.header.size() + 8 ? most - file.header.size() - 8 : 0);
  } else {
    mutate(file.header, most > file.data.size() + 8 ? most - file.data.size() - 8 : 0);
  }
  return give_back(join(file), data, size, most);
}
