#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <system_error>

#ifndef _WIN32
#include <fcntl.h>
#include <unistd.h>
#endif

#include <microtome/core/error.hpp>

namespace microtome {

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

/// std::fseek from the start, beyond 2 GiB everywhere.
inline bool seek(std::FILE* file, std::uint64_t place) {
#ifdef _WIN32
  return ::_fseeki64(file, static_cast<long long>(place), SEEK_SET) == 0;
#else
  return ::fseeko(file, static_cast<::off_t>(place), SEEK_SET) == 0;
#endif
}

/// The name of a file that is being written beside `path`. (Of text, since GCC's path breaks where
/// memory runs out while it is appended to.)
inline std::filesystem::path part_of(const std::filesystem::path& path) {
  std::filesystem::path::string_type name = path.native();
  std::string ending = ".";
  ending.append(std::to_string(std::random_device{}())).append(".part");
  return name.append(ending.begin(), ending.end());
}

}  // namespace detail

/// The largest file that is read as a whole: 4 GiB, several times the largest model's.
inline constexpr std::uint64_t max_file_bytes =
    std::min<std::uint64_t>(std::uint64_t{4} << 30, std::numeric_limits<std::ptrdiff_t>::max());

/// A file that is read in parts. It is not mapped, since a mapped file that is cut off while it is
/// in use ends the program. The file that was opened is read to the end, whatever takes its name
/// meanwhile.
class open_file {
public:
  open_file() = default;

  /// Throws `error` where `path` is not a readable regular file of at most max_file_bytes.
  explicit open_file(const std::filesystem::path& path) : name_(path.string()) {
    std::error_code unknown;
    const std::filesystem::file_status status = std::filesystem::status(path, unknown);
    if (std::filesystem::is_directory(status)) fail(path.string(), ": is a directory");
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))
      fail(path.string(), ": is not a regular file");
    file_.reset(detail::open_to_read(path));
    if (!file_) fail(name_, ": cannot be opened: ", std::strerror(errno));
    size_ = std::filesystem::file_size(path, unknown);
    if (unknown) fail(name_, ": cannot be read: ", unknown.message());
    if (size_ > max_file_bytes)
      fail(name_, ": has ", size_, " bytes, at most ", max_file_bytes, " are read");
  }

  /// Bytes that it had when it was opened.
  std::uint64_t size() const { return size_; }

  /// Reads `count` bytes from byte `begin` on. Throws `error` where they are no longer there. Not
  /// for several threads at once.
  void read(std::uint64_t begin, void* out, std::size_t count) const {
    if (begin != position_ && !detail::seek(file_.get(), begin))
      fail(name_, ": cannot be read: ", std::strerror(errno));
    const std::size_t got = std::fread(out, 1, count, file_.get());
    position_ = begin + got;
    if (std::ferror(file_.get())) fail(name_, ": cannot be read: ", std::strerror(errno));
    if (got != count)
      fail(name_, ": ended after ", position_, " of its ", size_, " bytes; is it being written?");
  }

private:
  std::string name_;
  std::unique_ptr<std::FILE, detail::file_closer> file_;
  std::uint64_t size_ = 0;
  mutable std::uint64_t position_ = 0;
};

/// A file's bytes, read at once.
class whole_file {
public:
  whole_file() = default;

  /// Throws `error` as open_file does.
  explicit whole_file(const std::filesystem::path& path) {
    const open_file file(path);
    size_ = static_cast<std::size_t>(file.size());
    bytes_.reset(new std::byte[size_]);  // left as it is, not cleared
    file.read(0, bytes_.get(), size_);
  }

  std::span<const std::byte> bytes() const { return {bytes_.get(), size_}; }

private:
  std::unique_ptr<std::byte[]> bytes_;
  std::size_t size_ = 0;
};

namespace detail {

#ifdef _WIN32

/// Writes a new file, which then takes the name `path`. Returns an error number, 0 for none.
inline int write_and_rename(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  const std::filesystem::path part = part_of(path);
  std::FILE* file = ::_wfopen(part.c_str(), L"wb");
  if (!file) return errno;
  int reason = std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() ? 0 : errno;
  if (std::fclose(file) != 0 && !reason) reason = errno;
  std::error_code failed;
  if (!reason) std::filesystem::rename(part, path, failed);
  if (!reason && failed) reason = failed.value();
  if (reason) std::filesystem::remove(part, failed);
  return reason;
}

#else

/// Writes everything and closes. Returns an error number, 0 for none.
inline int write_and_close(int file, std::span<const std::byte> bytes, const auto& before_closing) {
  int reason = 0;
  while (!bytes.empty() && !reason) {
    // At most 1 GiB at a time: some systems take no more.
    const ::ssize_t got = ::write(file, bytes.data(), std::min<std::size_t>(bytes.size(), 1 << 30));
    if (got < 0 && errno != EINTR) reason = errno;
    if (got == 0) reason = EIO;
    if (got > 0) bytes = bytes.subspan(static_cast<std::size_t>(got));
  }
  if (!reason) reason = before_closing();
  if (::close(file) != 0 && !reason && errno != EINTR) reason = errno;
  return reason;
}

#ifdef O_TMPFILE

/// Gives a file that has no name yet the name `path`, which another may have. A link replaces
/// nothing, so that it is linked under a name of its own first. One that is killed in between
/// leaves a whole file of that name, and the next one that writes `path` removes it; it cannot tell
/// whether another program is just there, which then has to write again: EAGAIN.
inline int link_and_rename(const std::string& unnamed, const std::filesystem::path& path) {
  const auto link = [&](const std::string& name) {
    const int flags = AT_SYMLINK_FOLLOW;
    return ::linkat(AT_FDCWD, unnamed.c_str(), AT_FDCWD, name.c_str(), flags) ? errno : 0;
  };
  int reason = link(path.native());
  if (reason != EEXIST) return reason;
  const std::size_t name = path.native().find_last_of('/') + 1;
  const std::string whole =
      path.native().substr(0, name) + "." + path.native().substr(name) + ".whole";
  while ((reason = link(whole)) == EEXIST)
    if (::unlink(whole.c_str()) != 0 && errno != ENOENT) return errno;
  if (reason || std::rename(whole.c_str(), path.c_str()) == 0) return reason;
  if (errno == ENOENT) return EAGAIN;
  reason = errno;
  ::unlink(whole.c_str());
  return reason;
}

#endif

/// Writes a new file, which then takes the name `path`. Returns an error number, 0 for none. Where
/// the system can, the file has no name until it is whole: nothing is left of it then when the
/// program is killed.
inline int write_and_rename(const std::filesystem::path& path, std::span<const std::byte> bytes) {
#ifdef O_TMPFILE
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  for (int tries = 0; tries < 1000; ++tries) {
    const int unnamed = ::open(folder.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC, 0666);
    if (unnamed < 0) {
      if (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL || errno == ENOENT) break;
      return errno;
    }
    const std::string self = "/proc/self/fd/" + std::to_string(unnamed);
    if (::access(self.c_str(), F_OK) != 0) {  // without /proc it cannot get a name
      ::close(unnamed);
      break;
    }
    const int reason = write_and_close(unnamed, bytes, [&] { return link_and_rename(self, path); });
    if (reason != EAGAIN) return reason;
  }
#endif
  const std::filesystem::path part = part_of(path);
  const int file = ::open(part.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
  if (file < 0) return errno;
  int reason = write_and_close(file, bytes, [] { return 0; });
  if (!reason && std::rename(part.c_str(), path.c_str()) != 0) reason = errno;
  if (reason) ::unlink(part.c_str());
  return reason;
}

#endif

}  // namespace detail

/// Writes a whole file or nothing: into a new file beside `path`, which then takes its name. Throws
/// `error` with the system's reason (a missing folder, no permission, a full disk), or where `path`
/// is something else than a file; whatever was at `path` before is then still there.
inline void replace_file(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  std::error_code unknown;
  if (std::filesystem::exists(path, unknown) && !std::filesystem::is_regular_file(path, unknown))
    fail(path.string(), ": is not a regular file, and is not replaced");
  if (const int reason = detail::write_and_rename(path, bytes))
    fail(path.string(), ": cannot be written: ", std::strerror(reason));
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
