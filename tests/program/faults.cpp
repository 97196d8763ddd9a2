// A library to be preloaded: one call of the program's fails, as a full disk or want of memory
// would make it. Variables:
//
//     FAULT=write:N:E   the N-th call that makes, writes, names or closes a file fails with errno E
//     FAULT=short:N:E   the N-th write takes half of its bytes, or none and fails with errno E
//     FAULT=new:N:0     the N-th operator new throws
//     FAULT_COUNT=PATH  where the number of such calls goes when the program ends (N = 0: none
//     fails)
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

// What libraries make before main, such as CLI11's constants, has nobody to tell of a failure.
std::atomic<bool> in_main = false;
int (*real_main)(int, char**, char**);

int main_with_faults(int argc, char** argv, char** environment) {
  in_main = true;
  const int code = real_main(argc, argv, environment);
  in_main = false;
  return code;
}

struct fault {
  char kind[8] = "none";
  long at = 0;
  int error = 0;
  std::atomic<long> count = 0;

  fault() {
    if (const char* text = std::getenv("FAULT"))
      std::sscanf(text, "%7[a-z]:%ld:%d", kind, &at, &error);
  }
  ~fault() {
    const char* path = std::getenv("FAULT_COUNT");
    std::FILE* file = path ? std::fopen(path, "w") : nullptr;
    if (!file) return;
    std::fprintf(file, "%ld", count.load());
    std::fclose(file);
  }
  bool now(const char* what) { return in_main && std::strcmp(what, kind) == 0 && ++count == at; }
};

// In a function, since the first allocations are made before this library's own start.
fault& the_fault() {
  static fault f;
  return f;
}

bool fails() {
  if (!the_fault().now("write")) return false;
  errno = the_fault().error;
  return true;
}

template <class Function>
Function* next(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

std::atomic<bool> is_written[1024];

bool writes(int file) {
  return file >= 0 && file < 1024 && is_written[file];
}

void* allocate(std::size_t size, std::size_t alignment) {
  if (the_fault().now("new")) throw std::bad_alloc();
  void* memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (!memory && size) throw std::bad_alloc();
  return memory;
}

}  // namespace

extern "C" {

int __libc_start_main(int (*main)(int, char**, char**), int argc, char** argv, void (*init)(),
                      void (*finish)(), void (*unload)(), void* stack_end) {
  static const auto real = next(&::__libc_start_main, "__libc_start_main");
  real_main = main;
  return real(main_with_faults, argc, argv, init, finish, unload, stack_end);
}

int open(const char* path, int flags, ...) {
  std::va_list more;
  va_start(more, flags);
  const mode_t mode = va_arg(more, mode_t);
  va_end(more);
  static const auto real = next(&::open, "open");
  const bool to_write = (flags & O_ACCMODE) != O_RDONLY;
  if (to_write && fails()) return -1;
  const int file = real(path, flags, mode);
  if (file >= 0 && file < 1024) is_written[file] = to_write;
  return file;
}

ssize_t write(int file, const void* bytes, size_t size) {
  static const auto real = next(&::write, "write");
  if (!writes(file)) return real(file, bytes, size);
  if (the_fault().now("short")) {
    errno = the_fault().error;
    return errno ? -1 : real(file, bytes, (size + 1) / 2);
  }
  if (!fails()) return real(file, bytes, size);
  const int error = errno;
  if (real(file, bytes, size / 2) < 0) std::abort();  // part of it is on the disk
  errno = error;
  return -1;
}

int close(int file) {
  static const auto real = next(&::close, "close");
  const bool failed = writes(file) && fails();
  const int error = errno;
  if (file >= 0 && file < 1024) is_written[file] = false;
  const int result = real(file);
  if (!failed) return result;
  errno = error;
  return -1;
}

int linkat(int from, const char* name, int to, const char* new_name, int flags) {
  static const auto real = next(&::linkat, "linkat");
  return fails() ? -1 : real(from, name, to, new_name, flags);
}

int rename(const char* from, const char* to) {
  static const auto real = next(&::rename, "rename");
  return fails() ? -1 : real(from, to);
}

int mkdir(const char* path, mode_t mode) {
  static const auto real = next(&::mkdir, "mkdir");
  return fails() ? -1 : real(path, mode);
}

}  // extern "C"

void* operator new(std::size_t size) {
  return allocate(size, alignof(std::max_align_t));
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
