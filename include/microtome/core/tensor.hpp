#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include <microtome/core/error.hpp>

namespace microtome {

using index_t = std::ptrdiff_t;

/// Every buffer that a kernel reads or writes starts on a cache line, which is also the widest
/// vector of any target.
inline constexpr std::size_t alignment = 64;

/// Extents of a dense row-major array of up to four dimensions, outermost first.
class shape {
public:
  static constexpr int max_rank = 4;

  constexpr shape() = default;
  constexpr shape(std::initializer_list<index_t> extents)
      : rank_(static_cast<int>(extents.size())) {
    if (rank_ > max_rank) fail("shape: at most ", max_rank, " dimensions, got ", rank_);
    std::copy(extents.begin(), extents.end(), extents_.begin());
  }

  constexpr int rank() const { return rank_; }
  constexpr index_t operator[](int axis) const { return extents_[static_cast<std::size_t>(axis)]; }

  /// Number of elements; 1 for a scalar (rank 0).
  constexpr index_t size() const {
    index_t product = 1;
    for (int axis = 0; axis < rank_; ++axis) product *= (*this)[axis];
    return product;
  }

  constexpr void append(index_t extent) {
    if (rank_ == max_rank) fail("shape: at most ", max_rank, " dimensions");
    extents_[static_cast<std::size_t>(rank_++)] = extent;
  }

  friend constexpr bool operator==(const shape& a, const shape& b) {
    return a.rank_ == b.rank_ &&
           std::equal(a.extents_.begin(), a.extents_.begin() + a.rank_, b.extents_.begin());
  }

private:
  std::array<index_t, max_rank> extents_{};
  int rank_ = 0;
};

/// "(4096, 160)", as PyTorch and NumPy print it.
inline std::string to_string(const shape& s) {
  std::string text = "(";
  for (int axis = 0; axis < s.rank(); ++axis) text += (axis ? ", " : "") + std::to_string(s[axis]);
  return text + ")";
}

/// A dense row-major array that somebody else owns. Activations are token-major: (H * W, C).
template <class T>
class view {
public:
  view() = default;
  view(T* data, shape extents) : data_(data), shape_(extents) {}

  /// A view of T is also a view of const T.
  operator view<const T>() const requires(!std::is_const_v<T>) { return {data_, shape_}; }

  T* data() const { return data_; }
  const shape& extents() const { return shape_; }
  index_t extent(int axis) const { return shape_[axis]; }
  index_t size() const { return data_ ? shape_.size() : 0; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size(); }
  T& operator[](index_t i) const { return data_[i]; }

  /// First element of row `i` of the outermost dimension.
  T* row(index_t i) const { return data_ + i * (shape_.size() / shape_[0]); }

private:
  T* data_ = nullptr;
  shape shape_;
};

/// A dense row-major array that owns its 64-byte aligned elements. Elements are zero at first.
template <class T>
class tensor {
  static_assert(std::is_trivially_copyable_v<T>);

public:
  tensor() = default;
  explicit tensor(shape extents) : shape_(extents) {
    const std::size_t bytes = static_cast<std::size_t>(extents.size()) * sizeof(T);
    data_ = static_cast<T*>(::operator new (bytes, std::align_val_t{alignment}));
    std::fill_n(data_, extents.size(), T{});
  }
  tensor(const tensor& other) : tensor(other.data_ ? tensor(other.shape_) : tensor()) {
    std::copy_n(other.data_, size(), data_);
  }
  tensor(tensor&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), shape_(std::exchange(other.shape_, {})) {}
  tensor& operator=(tensor other) noexcept {
    std::swap(data_, other.data_);
    std::swap(shape_, other.shape_);
    return *this;
  }
  ~tensor() { ::operator delete (data_, std::align_val_t{alignment}); }

  /// The same elements with other extents of the same size, given up by this tensor.
  tensor reshaped(shape extents) && {
    if (extents.size() != shape_.size())
      fail("tensor: ", to_string(shape_), " cannot become ", to_string(extents));
    shape_ = extents;
    return std::move(*this);
  }

  operator view<T>() { return {data_, shape_}; }
  operator view<const T>() const { return {data_, shape_}; }

  T* data() { return data_; }
  const T* data() const { return data_; }
  const shape& extents() const { return shape_; }
  index_t extent(int axis) const { return shape_[axis]; }
  index_t size() const { return data_ ? shape_.size() : 0; }
  bool empty() const { return size() == 0; }
  T* begin() { return data_; }
  T* end() { return data_ + size(); }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size(); }
  T& operator[](index_t i) { return data_[i]; }
  const T& operator[](index_t i) const { return data_[i]; }
  T* row(index_t i) { return view<T>(*this).row(i); }
  const T* row(index_t i) const { return view<const T>(*this).row(i); }

private:
  T* data_ = nullptr;
  shape shape_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
