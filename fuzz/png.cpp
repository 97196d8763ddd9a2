// PNG images. The mutator repairs the checksum of every chunk: without that no changed byte gets
// past the first.
#include <zlib.h>

#include <microtome/io/png.hpp>

#include "support.hpp"

namespace microtome::fuzz {

namespace {

void repair(std::uint8_t* data, std::size_t size) {
  std::size_t at = 8;
  while (at + 12 <= size) {
    const std::size_t length = std::size_t{data[at]} << 24 | std::size_t{data[at + 1]} << 16 |
                               std::size_t{data[at + 2]} << 8 | data[at + 3];
    if (length > size - at - 12) return;
    const uLong crc = crc32(0, data + at + 4, static_cast<uInt>(length + 4));
    for (int i = 0; i < 4; ++i)
      data[at + 8 + length + static_cast<std::size_t>(i)] =
          static_cast<std::uint8_t>(crc >> (24 - 8 * i));
    at += length + 12;
  }
}

}  // namespace

inline void read(std::span<const std::byte> bytes) {
  // Large images cost time and find nothing more.
  if (bytes.size() >= 24 && (bytes[16] != std::byte{} || bytes[17] != std::byte{} ||
                             bytes[20] != std::byte{} || bytes[21] != std::byte{}))
    return;
  std::string note;
  if (by_path(bytes))
    static_cast<void>(io::read_png(file_of(bytes).path(), &note));
  else
    static_cast<void>(io::read_png(bytes, "image.png", &note));
}

}  // namespace microtome::fuzz

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t most, unsigned seed) {
  size = LLVMFuzzerMutate(data, size, most);
  if (seed % 32) microtome::fuzz::repair(data, size);
  return size;
}
