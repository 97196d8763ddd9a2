// safetensors files of a few tensors, of which each is read.
#include "safetensors_mutator.hpp"

namespace microtome::fuzz {

inline void read(std::span<const std::byte> bytes) {
  const safetensors file(bytes, "tensors");
  for (const auto& [stored, entry] : file.tensors()) {
    // One that is compressed is read by the name that it has without.
    const bool mask = stored.ends_with("_mask");
    const std::string name = mask ? stored.substr(0, stored.size() - 5) : stored;
    shape expected = entry.extents;
    if (mask) {
      if (!file.contains(name + "_values")) continue;
      expected = {entry.extents.size(), 8};
    }
    try {
      file.dtype(name) == "I8" ? file.read_int8(name, expected) : file.read(name, expected);
    } catch (const error&) {
    }
  }
  static_cast<void>(file.fingerprint());
}

}  // namespace microtome::fuzz
