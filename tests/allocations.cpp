// A program of its own, since it replaces the global operator new: the second inference allocates
// nothing.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#include <microtome/microtome.hpp>

// g++ warns of a free for a new that it has inlined only one of.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif

namespace {

std::atomic<long> allocations = 0;

void* counted(std::size_t size, std::size_t alignment) {
  ++allocations;
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded ? rounded : alignment);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t size) {
  return counted(size, alignof(std::max_align_t));
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return counted(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return counted(size, alignof(std::max_align_t));
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

int main(int, char** arguments) {
  using namespace microtome;
  const lite_medsam model = lite_medsam::load(arguments[1]);
  session s(model, {.threads = 2});
  const index_t side = model.config.image_size;
  const tensor<float> image(shape{side * side, 3});
  const box boxes[] = {{1, 2, 30, 40}, {3, 3, 9, 20}, {5, 0, 50, 51}, {1, 1, 2, 2}, {9, 9, 20, 30}};
  const point points[] = {{3, 4, 1}, {20, 30, 0}};
  const tensor<float> mask(shape{side, side});
  const auto infer = [&] {
    s.encode(image);
    static_cast<void>(s.decode(boxes));
    static_cast<void>(s.decode(points, boxes[0], mask));
  };
  const long before_first = allocations;
  infer();
  const long first = allocations - before_first;
  const long before_second = allocations;
  for (int i = 0; i < 3; ++i) infer();
  const long later = allocations - before_second;
  std::printf("allocations: %ld in loading, %ld in the first inference, %ld in the next three\n",
              before_first, first, later);
  return before_first > 0 && later == 0 ? 0 : 1;
}
