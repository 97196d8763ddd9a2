/// What the fuzz targets share. Each defines read(bytes), which may throw microtome::error and
/// nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include <microtome/core/error.hpp>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

namespace microtome::fuzz {

inline void read(std::span<const std::byte> bytes);

/// Whether an input is read by a path, too: one in 32, since that takes long.
inline bool by_path(std::span<const std::byte> bytes) {
  return bytes.size() % 32 == 0;
}

/// A file of these bytes, in memory.
class file_of {
public:
  explicit file_of(std::span<const std::byte> bytes) : file_(memfd_create("input", MFD_CLOEXEC)) {
    if (write(file_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
      std::abort();
  }
  ~file_of() { close(file_); }
  file_of(const file_of&) = delete;
  file_of& operator=(const file_of&) = delete;

  std::filesystem::path path() const { return "/proc/self/fd/" + std::to_string(file_); }

private:
  int file_;
};

/// libFuzzer's own mutation of part of an input, which may grow to `most` bytes.
template <class Bytes>
void mutate(Bytes& bytes, std::size_t most) {
  const std::size_t size = std::min(bytes.size(), most);
  bytes.resize(std::max<std::size_t>(most, 1));
  bytes.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(bytes.data()), size, most));
}

/// Writes a mutated input back; returns its size. Too long ones are left as they were.
template <class Bytes>
std::size_t give_back(const Bytes& bytes, std::uint8_t* data, std::size_t size, std::size_t most) {
  if (bytes.size() > most) return size;
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}

}  // namespace microtome::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    microtome::fuzz::read(std::as_bytes(std::span(data, size)));
  } catch (const microtome::error&) {
  }
  return 0;
}
