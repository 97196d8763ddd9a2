#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <string>
#include <vector>

#include <microtome/ops/linear.hpp>

namespace microtome {

/// A grouped 1x1 convolution without bias: channels in groups of equal size, each of which a layer
/// of its own maps to as many.
class grouped_linear {
public:
  grouped_linear() = default;

  /// Reads `<name>.weight` (groups * size, size, 1, 1).
  grouped_linear(const weights& file, const std::string& name, index_t groups, index_t size)
      : size_(size) {
    const layer_weight all = file.layer(name, {groups * size, size, 1, 1});
    for (index_t g = 0; g < groups; ++g) {
      layer_weight group = all;
      group.values = slice(all.values, g * size * size, {size, size, 1, 1});
      if (!all.scale.empty()) group.scale = slice(all.scale, g * size, {size});
      groups_.emplace_back(group, 1, size, size, group.values.data(), 1, size);
    }
  }

  index_t channels() const { return size_ * static_cast<index_t>(groups_.size()); }
  /// Multiply-adds per token.
  index_t macs() const { return channels() * size_; }

  /// Serial: `count` <= max_rows dense rows at x to dense rows at `result`, which is not x.
  void rows(index_t count, const float* x, float* result) const {
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      const index_t offset = static_cast<index_t>(g) * size_;
      const row_pointers<const float> a(x + offset, channels(), count);
      const row_pointers<float> c(result + offset, channels(), count);
      groups_[g].multiply({.m = count, .n = size_, .k = size_, .a = a.data(), .c = c.data()});
    }
  }

private:
  static tensor<float> slice(const tensor<float>& all, index_t first, shape extents) {
    tensor<float> part(extents);
    std::copy_n(all.data() + first, extents.size(), part.data());
    return part;
  }

  index_t size_ = 0;
  std::vector<packed_weight> groups_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
