// JPEG images, as eval --coco reads them, by the libjpeg that is installed.
#include <microtome/io/jpeg.hpp>

#include "support.hpp"

namespace microtome::fuzz {

namespace {

/// Whether a frame of the image claims 512 pixels or more in a direction: such cost time and find
/// nothing more.
bool large(std::span<const std::byte> bytes) {
  for (std::size_t i = 0; i + 8 < bytes.size(); ++i)
    if (bytes[i] == std::byte{0xff} && (bytes[i + 1] & std::byte{0xf0}) == std::byte{0xc0} &&
        (bytes[i + 5] > std::byte{1} || bytes[i + 7] > std::byte{1}))
      return true;
  return false;
}

}  // namespace

inline void read(std::span<const std::byte> bytes) {
  if (!large(bytes)) static_cast<void>(io::read_jpeg(bytes, "image.jpg"));
}

}  // namespace microtome::fuzz
