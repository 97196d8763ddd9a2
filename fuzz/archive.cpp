// .npz archives as a whole, as a case, as labels and as spacing: the archive's structure, of which
// libzip reads most. What is in the arrays is fuzzed by arrays.cpp, since here a changed byte ends
// at a checksum.
#include <microtome/io/case.hpp>

#include "support.hpp"

namespace microtome::fuzz {

inline void read(std::span<const std::byte> bytes) {
  const io::npz_reader file(bytes, "case.npz");
  for (const std::string& name : file.names()) {
    try {
      static_cast<void>(file.read(name));
    } catch (const error&) {
    }
  }
  if (by_path(bytes)) {
    const file_of copy(bytes);
    static_cast<void>(io::npz_reader(copy.path()).names());
  }
  static_cast<void>(io::read_case(file));
}

}  // namespace microtome::fuzz
