/// How tests quantise the inputs of int8 products.
#pragma once

#include <cstdint>

#include <kernels/reference.hpp>
#include <microtome/core/tensor.hpp>

namespace microtome::tests {

/// Of k channels, of one scale or of some, of one zero point or of some.
class levels {
public:
  levels(index_t k, float scale, int zero_point, bool same = true)
      : inverse_(shape{k}), zero_point_(shape{k}) {
    for (index_t i = 0; i < k; ++i) {
      inverse_[i] = 1.0f / (same ? scale : scale * static_cast<float>(i % 7 + 1));
      zero_point_[i] = static_cast<float>(same ? zero_point : (zero_point + 41 * i) % 256);
    }
  }
  kernels::channel_quantization get() const { return {inverse_.data(), zero_point_.data()}; }
  std::int32_t of(float x, index_t channel) const {
    return kernels::reference::quantize(x, inverse_[channel], zero_point_[channel]);
  }

private:
  tensor<float> inverse_, zero_point_;
};

}  // namespace microtome::tests
