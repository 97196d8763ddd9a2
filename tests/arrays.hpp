/// Arrays of the .npz files in tests/data: read as they are, or, where there is no libzip, from the
/// safetensors files that npz_to_safetensors.py makes of them.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#ifdef MICROTOME_TEST_ARRAYS
#include <microtome/io/npy.hpp>
#include <microtome/model_file/safetensors.hpp>
#else
#include <microtome/io/npz.hpp>
#endif

namespace microtome::tests {

#ifdef MICROTOME_TEST_ARRAYS
class array_file {
public:
  explicit array_file(const std::filesystem::path& npz)
      : file_(std::filesystem::path(MICROTOME_TEST_ARRAYS) / npz.stem().concat(".safetensors")) {}

  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& [name, entry] : file_.tensors()) found.push_back(name);
    return found;
  }

  io::npy_array read(const std::string& name) const {
    const safetensors::entry& from = file_.tensors().at(name);
    const std::vector<std::byte> bytes = file_.stored(from);
    const auto size = static_cast<index_t>(bytes.size());
    io::npy_array array{{from.dtype == "F32" ? "<f4" : "|u1", false, from.extents},
                        tensor<std::uint8_t>(shape{size})};
    std::memcpy(array.bytes.data(), bytes.data(), bytes.size());
    return array;
  }

private:
  safetensors file_;
};
#else
using array_file = io::npz_reader;
#endif

}  // namespace microtome::tests
