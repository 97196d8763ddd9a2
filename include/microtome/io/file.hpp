#pragma once

#include <kernels/macros_off.hpp>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<sys/mman.h>)
#define MICROTOME_HAS_MMAP 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#define MICROTOME_HAS_MMAP 0
#endif

#include <microtome/error.hpp>

namespace microtome::io {

namespace detail {

struct file_closer {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

/// std::fopen, for names that are not text on Windows either.
inline std::FILE* open_to_read(const std::filesystem::path& path) {
#ifdef _WIN32
  return ::_wfopen(path.c_str(), L"rb");
#else
  return std::fopen(path.c_str(), "rb");
#endif
}

/// Null where there is such a file already; older libraries of Windows cannot tell.
inline std::FILE* create_file(const std::filesystem::path& path) {
#ifdef _WIN32
  return ::_wfopen(path.c_str(), L"wb");
#else
  return std::fopen(path.c_str(), "wbx");
#endif
}

}  // namespace detail

/// A file's bytes, read-only: mapped where the system can, read otherwise. The file must not shrink
/// while it is mapped.
class mapped_file {
public:
  mapped_file() = default;

  /// Throws `error` where `path` is not a readable regular file.
  explicit mapped_file(const std::filesystem::path& path) {
    std::error_code ignored;
    if (std::filesystem::is_directory(path, ignored)) fail(path.string(), ": is a directory");
#if MICROTOME_HAS_MMAP
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail(path.string(), ": cannot be opened: ", std::strerror(errno));
    struct stat status {};
    if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
      ::close(descriptor);
      fail(path.string(), ": is not a regular file");
    }
    const auto size = static_cast<std::size_t>(status.st_size);
    void* start = size ? ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0) : nullptr;
    const int reason = errno;
    ::close(descriptor);
    if (start == MAP_FAILED) fail(path.string(), ": cannot be mapped: ", std::strerror(reason));
    bytes_ = {static_cast<const std::byte*>(start), size};
#else
    const std::unique_ptr<std::FILE, detail::file_closer> file(detail::open_to_read(path));
    if (!file) fail(path.string(), ": cannot be opened: ", std::strerror(errno));
    const std::uintmax_t size = std::filesystem::file_size(path, ignored);
    if (ignored || !std::filesystem::is_regular_file(path, ignored))
      fail(path.string(), ": is not a regular file");
    storage_.resize(static_cast<std::size_t>(size));
    if (std::fread(storage_.data(), 1, storage_.size(), file.get()) != storage_.size())
      fail(path.string(), ": cannot be read: ", std::strerror(errno));
    bytes_ = storage_;
#endif
  }

  mapped_file(mapped_file&& other) noexcept
      : storage_(std::move(other.storage_)), bytes_(std::exchange(other.bytes_, {})) {}
  mapped_file& operator=(mapped_file&& other) noexcept {
    std::swap(storage_, other.storage_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  ~mapped_file() {
#if MICROTOME_HAS_MMAP
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
#endif
  }

  std::span<const std::byte> bytes() const {
    return bytes_;
  }

  /// Lets the system take the pages back; the next access reads them again.
  void drop_pages() {
#if MICROTOME_HAS_MMAP
    if (!bytes_.empty())
      ::madvise(const_cast<std::byte*>(bytes_.data()), bytes_.size(), MADV_DONTNEED);
#endif
  }

private:
  std::vector<std::byte> storage_;
  std::span<const std::byte> bytes_;
};

/// Writes a whole file or nothing: into a new file beside `path`, which then takes its name. Throws
/// `error` with the system's reason (a missing folder, no permission, a full disk), or where `path`
/// is something else than a file; whatever was at `path` before is then still there.
inline void replace_file(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  std::error_code unknown;
  if (std::filesystem::exists(path, unknown) && !std::filesystem::is_regular_file(path, unknown))
    fail(path.string(), ": is not a regular file, and is not replaced");
  std::filesystem::path temporary = path;
  temporary += std::string(".").append(std::to_string(std::random_device{}())).append(".part");
  const auto give_up = [&](const char* what, int reason) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    fail(path.string(), ": ", what, ": ", std::strerror(reason));
  };
  std::FILE* file = detail::create_file(temporary);
  if (!file) fail(path.string(), ": cannot be created: ", std::strerror(errno));
  const bool written =
      (bytes.empty() || std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size()) &&
      std::fflush(file) == 0;
  const int reason = errno;
  if (std::fclose(file) != 0 || !written) give_up("cannot be written", reason);
  std::error_code failed;
  std::filesystem::rename(temporary, path, failed);
  if (failed) give_up("cannot be put in place", failed.value());
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
