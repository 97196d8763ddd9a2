#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cassert>
#include <span>
#include <string_view>

#include <microtome/core/parallel.hpp>
#include <microtome/core/tensor.hpp>

namespace microtome {

/// Memory for activations: one block, handed out and given back in the order of a stack. It is
/// sized when the model is loaded, and inference never allocates.
class arena {
public:
  arena() = default;
  explicit arena(index_t floats) : block_(shape{floats}) {}

  /// Uninitialised floats, 64-byte aligned. Throws `error` where the block is too small, which
  /// means that a module's workspace() and its forward() disagree.
  float* take(index_t floats) {
    float* taken = block_.data() + used_;
    used_ += rounded(floats);
    if (used_ > block_.size())
      fail("arena: ", used_, " floats wanted, ", block_.size(), " planned at load");
    return taken;
  }

  /// What `take` really uses: whole cache lines.
  static constexpr index_t rounded(index_t floats) {
    constexpr index_t line = alignment / sizeof(float);
    return (floats + line - 1) / line * line;
  }

private:
  friend class frame;
  tensor<float> block_;
  index_t used_ = 0;
};

/// What is taken from an arena through a frame is given back when the frame ends.
class frame {
public:
  explicit frame(arena& memory) : memory_(memory), start_(memory.used_) {}
  ~frame() { memory_.used_ = start_; }
  frame(const frame&) = delete;
  frame& operator=(const frame&) = delete;

  view<float> take(shape extents) { return {memory_.take(extents.size()), extents}; }

private:
  arena& memory_;
  index_t start_;
};

/// Working memory of one task, gone when the task ends. Planned at load like the arena.
class scratch {
public:
  explicit scratch(std::span<std::byte> bytes) : bytes_(bytes) {}

  /// Uninitialised, 64-byte aligned.
  template <class T>
  T* take(index_t count) {
    const std::size_t size = bytes_of<T>(count);
    assert(size <= bytes_.size());
    std::byte* taken = bytes_.data();
    bytes_ = bytes_.subspan(size);
    return reinterpret_cast<T*>(taken);
  }

  /// Bytes that `take<T>(count)` uses.
  template <class T>
  static constexpr std::size_t bytes_of(index_t count) {
    return (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
  }

private:
  std::span<std::byte> bytes_;
};

/// How the elements of a recorded activation lie. Both are (rows, C); PyTorch would have pixels as
/// (1, C, H, W) and tokens as (1, L, C).
enum class layout { pixels, tokens };

/// Receives intermediate results by their module paths.
class tracer {
public:
  virtual ~tracer() = default;
  /// Whether `name` is wanted: it may cost work that inference would not do.
  virtual bool wants(std::string_view name) const = 0;
  /// `value` is (rows, channels); for pixels `width` is that of the map.
  virtual void record(std::string_view name, view<const float> value, layout order,
                      index_t width) = 0;
};

/// What a forward pass needs besides weights and input: threads, memory, scratch per thread.
class workspace {
public:
  /// `scratch_bytes` is for each thread. 0 threads means all.
  workspace(int threads, index_t arena_floats, std::size_t scratch_bytes)
      : threads_(threads > 0 ? threads : default_threads()),
        memory_(arena_floats),
        scratch_(shape{threads_, static_cast<index_t>(scratch::bytes_of<std::byte>(
                                     static_cast<index_t>(scratch_bytes)))}) {}

  int threads() const { return threads_; }
  arena& memory() { return memory_; }
  tracer* trace = nullptr;

  /// Calls f(task, scratch) for every task in [0, tasks), with the scratch of the calling thread.
  template <class Function>
  void parallel(index_t tasks, Function&& f) {
    const auto size = static_cast<std::size_t>(scratch_.extent(1));
    parallel_for(threads_, tasks, [&](index_t task, int thread) {
      f(task, scratch({scratch_.row(thread), size}));
    });
  }

  bool tracing(std::string_view name) const { return trace && trace->wants(name); }
  void record(std::string_view name, view<const float> value, layout order,
              index_t width = 0) const {
    if (tracing(name)) trace->record(name, value, order, width);
  }

private:
  int threads_;
  arena memory_;
  tensor<std::byte> scratch_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
