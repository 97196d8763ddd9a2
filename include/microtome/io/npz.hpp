#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <zip.h>

#include <microtome/core/file.hpp>
#include <microtome/io/npy.hpp>

namespace microtome::io {

/// Largest array that is read from a file: 2 GiB, a volume of 2048 slices of 1024 x 1024. What
/// claims to be larger is taken for a mistake or an attack, before any memory is spent on it.
inline constexpr index_t max_array_bytes = static_cast<index_t>(
    std::min<std::int64_t>(std::int64_t{2} << 30, std::numeric_limits<index_t>::max()));

namespace detail {

struct zip_closer {
  void operator()(zip_t* archive) const { zip_discard(archive); }
  void operator()(zip_file_t* file) const { zip_fclose(file); }
  void operator()(zip_source_t* source) const { zip_source_free(source); }
};

inline std::string zip_message(int code) {
  zip_error_t failure;
  zip_error_init_with_code(&failure, code);
  std::string text = zip_error_strerror(&failure);
  zip_error_fini(&failure);
  return text;
}

}  // namespace detail

/// Reads arrays from a .npz file (a ZIP archive of .npy files), each when it is asked for. Needs
/// libzip. Every error names the file and the array.
class npz_reader {
public:
  explicit npz_reader(const std::filesystem::path& path) : path_(path.string()) {
    int code = 0;
    archive_.reset(zip_open(path_.c_str(), ZIP_RDONLY | ZIP_CHECKCONS, &code));
    if (!archive_) fail(path_, ": is not a readable .npz archive: ", detail::zip_message(code));
  }

  /// Reads from memory, which must outlive this object; `name` stands for it in messages.
  npz_reader(std::span<const std::byte> bytes, std::string name) : path_(std::move(name)) {
    zip_error_t failure;
    zip_error_init(&failure);
    zip_source_t* source = zip_source_buffer_create(bytes.data(), bytes.size(), 0, &failure);
    if (source) archive_.reset(zip_open_from_source(source, ZIP_RDONLY | ZIP_CHECKCONS, &failure));
    const std::string reason = zip_error_strerror(&failure);
    zip_error_fini(&failure);
    if (archive_) return;
    zip_source_free(source);
    fail(path_, ": is not a readable .npz archive: ", reason);
  }

  /// The file's path, or what stands for it.
  const std::string& name() const { return path_; }

  bool contains(const std::string& name) const {
    return zip_name_locate(archive_.get(), (name + ".npy").c_str(), 0) >= 0;
  }

  /// Names of the arrays, in the order of the file.
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    const zip_int64_t count = zip_get_num_entries(archive_.get(), 0);
    for (zip_int64_t i = 0; i < count; ++i) {
      const char* entry = zip_get_name(archive_.get(), static_cast<zip_uint64_t>(i), 0);
      const std::string name = entry ? entry : "";
      if (name.ends_with(".npy")) found.push_back(name.substr(0, name.size() - 4));
    }
    return found;
  }

  /// The array `name`, row-major. Throws `error` where it is missing, damaged, of a dtype that is
  /// not read, or larger than max_array_bytes.
  npy_array read(const std::string& name) const {
    const std::string what = path_ + ": array '" + name + "'";
    const zip_int64_t entry = zip_name_locate(archive_.get(), (name + ".npy").c_str(), 0);
    if (entry < 0) fail(what, " is missing");
    const zip_stat_t status = stat(static_cast<zip_uint64_t>(entry), what);
    const std::unique_ptr<zip_file_t, detail::zip_closer> file(
        zip_fopen_index(archive_.get(), static_cast<zip_uint64_t>(entry), 0));
    if (!file) fail(what, " cannot be read: ", zip_strerror(archive_.get()));

    std::array<std::byte, 10> preamble;
    read_exactly(file.get(), preamble, what);
    std::vector<std::byte> front(header_length(preamble));
    const auto rest_of_header = std::copy(preamble.begin(), preamble.end(), front.begin());
    read_exactly(file.get(), {rest_of_header, front.end()}, what);

    npy_array array{parse_npy_header(front, what, max_array_bytes).first, {}};
    const index_t width = npy_element_size(array.header.dtype);
    const index_t bytes = array.header.extents.size() * width;
    check_size(status, front.size() + static_cast<std::size_t>(bytes), what);
    array.bytes = tensor<std::uint8_t>(shape{bytes});
    read_exactly(file.get(),
                 std::as_writable_bytes(std::span(array.bytes.begin(), array.bytes.end())), what);
    std::byte beyond{};
    const zip_int64_t rest = zip_fread(file.get(), &beyond, 1);  // also checks the CRC
    if (rest < 0) fail(what, " is damaged: ", zip_file_strerror(file.get()));
    if (rest > 0) fail(what, " has more bytes than its shape says");
    if (array.header.column_major) make_row_major(array, width);
    return array;
  }

private:
  /// Length of a .npy header that starts with these 10 bytes, its preamble included. Bounded, since
  /// it is read before anything else is known.
  static std::size_t header_length(const std::array<std::byte, 10>& front) {
    const auto low = static_cast<std::size_t>(front[8]) | static_cast<std::size_t>(front[9]) << 8;
    const bool wide = static_cast<unsigned>(front[6]) >= 2;  // two more bytes of length, never used
    return (wide ? 12 : 10) + low;
  }

  /// What the archive says of an entry, which must be stored as NumPy stores it.
  zip_stat_t stat(zip_uint64_t entry, const std::string& what) const {
    zip_stat_t status;
    if (zip_stat_index(archive_.get(), entry, 0, &status) != 0)
      fail(what, " cannot be read: ", zip_strerror(archive_.get()));
    if (status.comp_method != ZIP_CM_STORE && status.comp_method != ZIP_CM_DEFLATE)
      fail(what, " is compressed by method ", status.comp_method,
           " of ZIP archives, expected none or deflate, as NumPy writes");
    return status;
  }

  /// Before memory is spent on it: the archive must agree with the array's header about its size,
  /// and deflate never shrinks data by more than 1032 (https://zlib.net/zlib_tech.html).
  static void check_size(const zip_stat_t& status, std::size_t expected, const std::string& what) {
    if (status.size != expected)
      fail(what, " takes ", expected, " bytes by its shape, but the archive holds ", status.size);
    constexpr zip_uint64_t most = 1032;
    if (status.size / most > status.comp_size)
      fail(what, " claims to unpack ", status.comp_size, " bytes into ", status.size,
           ", which is impossible");
  }

  static void read_exactly(zip_file_t* file, std::span<std::byte> out, const std::string& what) {
    while (!out.empty()) {
      const zip_int64_t got = zip_fread(file, out.data(), out.size());
      if (got < 0) fail(what, " is damaged: ", zip_file_strerror(file));
      if (got == 0) fail(what, " is cut off: ", out.size(), " bytes more were expected");
      out = out.subspan(static_cast<std::size_t>(got));
    }
  }

  static void make_row_major(npy_array& array, index_t width) {
    const shape& s = array.header.extents;
    tensor<std::uint8_t> out(array.bytes.extents());
    index_t at[shape::max_rank] = {};
    for (index_t i = 0; i < s.size(); ++i) {
      index_t from = 0;
      for (int axis = s.rank() - 1; axis >= 0; --axis) from = from * s[axis] + at[axis];
      std::memcpy(out.data() + i * width, array.bytes.data() + from * width,
                  static_cast<std::size_t>(width));
      for (int axis = s.rank() - 1; axis >= 0 && ++at[axis] == s[axis]; --axis) at[axis] = 0;
    }
    array.bytes = std::move(out);
    array.header.column_major = false;
  }

  std::string path_;
  std::unique_ptr<zip_t, detail::zip_closer> archive_;
};

enum class npz_compression { none, deflate };

/// Collects arrays and writes them as one .npz file, as np.savez or np.savez_compressed do. The
/// same arrays give the same bytes. Needs libzip.
class npz_writer {
public:
  template <class T>
  void add(const std::string& name, view<const T> array) {
    const std::string header = npy_header_bytes<T>(array.extents());
    const auto payload = std::as_bytes(std::span(array.begin(), array.end()));
    const auto* front = reinterpret_cast<const std::byte*>(header.data());
    std::vector<std::byte>& bytes = entries_.emplace_back(name + ".npy").bytes;
    bytes.reserve(header.size() + payload.size());
    bytes.insert(bytes.end(), front, front + header.size());
    bytes.insert(bytes.end(), payload.begin(), payload.end());
  }

  /// Writes all or nothing, as replace_file does. Throws `error` with the reason.
  void write(const std::filesystem::path& path,
             npz_compression compression = npz_compression::deflate) const {
    replace_file(path, compose(path.string(), compression));
  }

private:
  /// The archive's bytes.
  std::vector<std::byte> compose(const std::string& name, npz_compression compression) const {
    zip_error_t failure;
    zip_error_init(&failure);
    const auto give_up = [&] {
      const std::string reason = zip_error_strerror(&failure);
      zip_error_fini(&failure);
      fail(name, ": cannot be composed: ", reason);
    };
    const std::unique_ptr<zip_source_t, detail::zip_closer> target(
        zip_source_buffer_create(nullptr, 0, 0, &failure));
    if (!target) give_up();
    zip_source_keep(target.get());  // the archive lets go of it, and its bytes are read then
    std::unique_ptr<zip_t, detail::zip_closer> archive(
        zip_open_from_source(target.get(), ZIP_CREATE | ZIP_TRUNCATE, &failure));
    if (!archive) {
      zip_source_free(target.get());
      give_up();
    }
    const auto check = [&](bool done) {
      if (!done) fail(name, ": cannot be composed: ", zip_strerror(archive.get()));
    };
    for (const entry& e : entries_) {
      zip_source_t* source = zip_source_buffer(archive.get(), e.bytes.data(), e.bytes.size(), 0);
      check(source != nullptr);
      const zip_int64_t added =
          zip_file_add(archive.get(), e.name.c_str(), source, ZIP_FL_ENC_UTF_8);
      if (added < 0) zip_source_free(source);
      check(added >= 0);
      const auto index = static_cast<zip_uint64_t>(added);
      // zlib's level 3: label maps gain little from more.
      const bool deflates = compression == npz_compression::deflate;
      check(zip_set_file_compression(archive.get(), index, deflates ? ZIP_CM_DEFLATE : ZIP_CM_STORE,
                                     deflates ? 3 : 0) == 0);
      check(zip_file_set_dostime(archive.get(), index, 0, 1 << 5 | 1, 0) == 0);  // 1980, as NumPy's
    }
    check(zip_close(archive.get()) == 0);
    static_cast<void>(archive.release());  // zip_close has freed it
    zip_stat_t status;
    if (zip_source_stat(target.get(), &status) != 0 || zip_source_open(target.get()) != 0)
      fail(name, ": cannot be composed: ", zip_error_strerror(zip_source_error(target.get())));
    std::vector<std::byte> bytes(static_cast<std::size_t>(status.size));
    const zip_int64_t got = zip_source_read(target.get(), bytes.data(), bytes.size());
    zip_source_close(target.get());
    if (got != static_cast<zip_int64_t>(bytes.size())) fail(name, ": cannot be composed");
    return bytes;
  }

  struct entry {
    explicit entry(std::string entry_name) : name(std::move(entry_name)) {}
    std::string name;
    std::vector<std::byte> bytes;
  };
  std::vector<entry> entries_;
};

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
