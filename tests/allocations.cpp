// A program of its own, since it replaces the global operator new: the second inference allocates
// nothing, and wherever an allocation fails there is an exception, and nothing is lost (the address
// sanitizer tells) or broken.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

#if MICROTOME_HAS_IO
#include <microtome/io/case.hpp>
#include <microtome/io/overlay.hpp>
#include <microtome/io/png.hpp>
#endif
#include <microtome/microtome.hpp>

// g++ warns of a free for a new that it has inlined only one of.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#endif

namespace {

std::atomic<long> allocations = 0;
std::atomic<long> fails_at = 0;  // the number of the allocation that fails

void* counted(std::size_t size, std::size_t alignment) {
  if (++allocations == fails_at) throw std::bad_alloc();
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
  try {
    return counted(size, alignof(std::max_align_t));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
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

namespace {

using namespace microtome;

bool allocates_only_at_first(const char* path) {
  const sam model = sam::load(path);
  session s(model, {.threads = 2});
  const index_t side = model.encoder.image_size();
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
  return before_first > 0 && later == 0;
}

// How many times more seldom allocations fail than they do by default: emulators are slow.
long seldom = 1;

/// Lets the first allocations of f fail, one in each run, then every `every`-th. Each run must end
/// with std::bad_alloc, or well where f can do without (a sort without its buffer). Returns whether
/// f works afterwards.
template <class Function>
bool survives(const char* what, long every, Function&& f) {
  f();  // what is made once and kept
  const long before = allocations;
  f();
  const long count = allocations - before;
  long failed = 0;
  for (long i = 1; i <= count; i += i < 50 / seldom ? 1 : every * seldom) {
    fails_at = allocations + i;
    try {
      f();
    } catch (const std::bad_alloc&) {
      ++failed;
    }
  }
  fails_at = 0;
  f();
  std::printf("%s: %ld allocations, %ld runs without one of them\n", what, count, failed);
  return count == 0 || failed > 0;
}

}  // namespace

/// microtome_allocations MODEL [SELDOM]
int main(int, char** arguments) {
  const char* const path = arguments[1];
  if (arguments[2]) seldom = std::max(1L, std::atol(arguments[2]));
  bool good = allocates_only_at_first(path);
  const safetensors file{std::filesystem::path(path)};
  good &= survives("a configuration", 1, [&] { static_cast<void>(model_config(file)); });
  good &= survives("loading", 61, [&] { static_cast<void>(sam::load(path)); });

  const sam model = sam::load(path);
  const index_t side = model.encoder.image_size();
  const tensor<float> input(shape{side * side, 3});
  good &= survives("a session", 1, [&] {
    session s(model, {.threads = 2});
    s.encode(input);
    const box boxes[] = {{1, 2, 30, 40}, {3, 3, 9, 20}};
    static_cast<void>(s.decode(boxes));
  });

  tensor<std::uint8_t> image(shape{41, 37, 3}), volume(shape{5, 33, 29});
  for (index_t i = 0; i < image.size(); ++i) image[i] = static_cast<std::uint8_t>(i * i);
  for (index_t i = 0; i < volume.size(); ++i) volume[i] = static_cast<std::uint8_t>(i * 7);
  const pixel_box boxes[] = {{3, 4, 30, 35}, {1, 2, 9, 20}};
  const voxel_box voxels[] = {{3, 4, 0, 25, 30, 4}, {1, 2, 1, 9, 20, 3}};
  session s(model, {.threads = 2});
  const label_map expected = segment(s, volume, voxels);
  good &= survives("an image", 1, [&] { static_cast<void>(segment(s, image, boxes)); });
  good &= survives("a volume", 1, [&] { static_cast<void>(segment(s, volume, voxels)); });
  const label_map after = segment(s, volume, voxels);
  good &= std::equal(expected.begin(), expected.end(), after.begin());

#if MICROTOME_HAS_IO
  const std::filesystem::path folder = std::filesystem::temp_directory_path();
  io::npz_writer writer;
  const std::int64_t corners[] = {3, 4, 30, 35, 1, 2, 9, 20};
  writer.add<std::uint8_t>("imgs", image);
  writer.add<std::int64_t>("boxes", {corners, {2, 4}});
  writer.write(folder / "allocations.npz");
  io::write_png(folder / "allocations.png", image);
  good &= survives("reading a case", 1,
                   [&] { static_cast<void>(io::read_case(folder / "allocations.npz")); });
  good &= survives("reading an image", 1,
                   [&] { static_cast<void>(io::read_png(folder / "allocations.png")); });
  good &= survives("writing labels", 1,
                   [&] { io::write_segs(folder / "allocations_segs.npz", expected); });
  good &= survives("writing a picture", 1, [&] {
    const label_map labels(shape{41, 37});
    const io::labelled_box drawn[] = {{boxes[0], 1}};
    io::write_png(folder / "allocations.png", io::make_overlay(image, labels, drawn));
  });
#endif
  return good ? 0 : 1;
}
