#pragma once

#include <string>

#include <kernels/table.hpp>
#include <microtome/safetensors.hpp>

namespace microtome {

using kernels::precision;

/// Where layers read their weights, and what they keep the factors of their products as.
class weights {
public:
  weights(const safetensors& file, precision inputs = precision::fp32)
      : file_(&file), inputs_(inputs) {}

  precision inputs() const { return inputs_; }
  /// The same weights with products in another precision.
  weights with(precision inputs) const { return {*file_, inputs}; }

  /// See safetensors::read.
  tensor<float> read(const std::string& name, shape expected) const {
    return file_->read(name, expected);
  }

private:
  const safetensors* file_;
  precision inputs_;
};

}  // namespace microtome
