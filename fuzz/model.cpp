// Model files, loaded as a whole: configuration, and the tensors that it asks for.
#include <microtome/models/sam.hpp>

#include "safetensors_mutator.hpp"

namespace microtome::fuzz {

inline void read(std::span<const std::byte> bytes) {
  if (by_path(bytes))
    static_cast<void>(sam(safetensors(file_of(bytes).path()), {}));
  else
    static_cast<void>(sam(safetensors(bytes, "model"), {}));
}

}  // namespace microtome::fuzz
