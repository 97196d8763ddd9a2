/// What the fuzz targets share. Each defines read(bytes), which may throw microtome::error and
/// nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <microtome/core/error.hpp>

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

namespace microtome::fuzz {

inline void read(std::span<const std::byte> bytes);

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
