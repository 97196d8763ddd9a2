// Model files, loaded as a whole: configuration, and the tensors that it asks for.
#include <microtome/models/lite_medsam.hpp>

#include "safetensors_mutator.hpp"

namespace microtome::fuzz {

inline void read(std::span<const std::byte> bytes) {
  static_cast<void>(lite_medsam(safetensors(bytes, "model"), {}));
}

}  // namespace microtome::fuzz
