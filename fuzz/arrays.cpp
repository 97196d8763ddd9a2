// What is in the arrays of a case. An input is the .npy files of `imgs`, `boxes`, `gts`,
// `spacing`, `points` and `low_res_masks`, each after its length in two bytes; those that there
// are, but for empty ones, are put into an archive with the right checksums, and read from it as
// the program reads cases, labels, spacing and masks.
#include <array>

#include <zlib.h>

#include <microtome/io/case.hpp>

#include "support.hpp"

namespace microtome::fuzz {

namespace {

constexpr std::array<const char*, 6> names{"imgs",    "boxes",  "gts",
                                           "spacing", "points", "low_res_masks"};

std::uint32_t checksum(std::span<const std::byte> bytes) {
  return static_cast<std::uint32_t>(
      crc32(0, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(bytes.size())));
}

/// A ZIP archive whose entries are stored as they are.
class stored_archive {
public:
  void add(const std::string& name, std::span<const std::byte> content) {
    const auto offset = static_cast<std::uint32_t>(bytes_.size());
    const auto size = static_cast<std::uint32_t>(content.size());
    std::string shared;  // by the local and the central header
    put(shared, 20, 2), put(shared, 0, 2), put(shared, 0, 2), put(shared, 0, 2), put(shared, 33, 2);
    put(shared, checksum(content), 4), put(shared, size, 4), put(shared, size, 4);
    put(shared, static_cast<std::uint32_t>(name.size()), 2), put(shared, 0, 2);
    bytes_ += "PK\3\4" + shared + name;
    bytes_.append(reinterpret_cast<const char*>(content.data()), content.size());
    directory_ += "PK\1\2";
    put(directory_, 20, 2);
    directory_ += shared;
    put(directory_, 0, 2), put(directory_, 0, 2), put(directory_, 0, 2), put(directory_, 0, 4);
    put(directory_, offset, 4);
    directory_ += name;
    ++count_;
  }

  std::string finished() const {
    std::string end = "PK\5\6";
    put(end, 0, 4), put(end, count_, 2), put(end, count_, 2);
    put(end, static_cast<std::uint32_t>(directory_.size()), 4);
    put(end, static_cast<std::uint32_t>(bytes_.size()), 4), put(end, 0, 2);
    return bytes_ + directory_ + end;
  }

private:
  static void put(std::string& out, std::uint32_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> 8 * i & 255);
  }

  std::string bytes_, directory_;
  std::uint32_t count_ = 0;
};

}  // namespace

inline void read(std::span<const std::byte> bytes) {
  stored_archive archive;
  for (const char* name : names) {
    if (bytes.size() < 2) break;
    const auto length =
        std::to_integer<std::size_t>(bytes[0]) | std::to_integer<std::size_t>(bytes[1]) << 8;
    bytes = bytes.subspan(2);
    const auto content = bytes.first(std::min(length, bytes.size()));
    bytes = bytes.subspan(content.size());
    if (!content.empty()) archive.add(std::string(name) + ".npy", content);
  }
  const std::string whole = archive.finished();
  const auto whole_bytes = std::as_bytes(std::span(whole));
  const io::npz_reader file(whole_bytes, "case.npz");
  const auto attempt = [](auto&& f) {
    try {
      f();
    } catch (const error&) {
    }
  };
  std::vector<image_prompt> prompts;
  attempt([&] {
    io::segmentation_case read = io::read_case(file);
    if (auto* image = std::get_if<io::image_case>(&read)) prompts = std::move(image->prompts);
  });
  attempt([&] { io::read_logits(file, prompts); });
  attempt([&] { static_cast<void>(io::read_labels(file, "gts")); });
  attempt([&] { static_cast<void>(io::read_spacing(file)); });
  if (!by_path(whole_bytes)) return;
  const file_of copy(whole_bytes);
  attempt([&] { static_cast<void>(io::read_case(copy.path())); });
  attempt([&] { static_cast<void>(io::read_labels(copy.path(), "gts")); });
  attempt([&] { static_cast<void>(io::read_spacing(copy.path())); });
  attempt([&] { io::read_logits(copy.path(), prompts); });
}

}  // namespace microtome::fuzz
