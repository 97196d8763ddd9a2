/// Reading of golden answers, for the tests of the model.
#pragma once

#include <map>
#include <string>

#include <microtome/microtome.hpp>

#include "../arrays.hpp"
#include "../support.hpp"

namespace microtome::tests {

/// A float array of a .npz file.
inline tensor<float> read_floats(const array_file& file, const std::string& name) {
  io::npy_array array = file.read(name);
  REQUIRE(array.header.dtype == "<f4");
  tensor<float> values(array.header.extents);
  std::memcpy(values.data(), array.bytes.data(), static_cast<std::size_t>(array.bytes.size()));
  return values;
}

/// (1, C, H, W) to (H * W, C).
inline tensor<float> channels_last(const tensor<float>& x) {
  const index_t channels = x.extent(1), pixels = x.extent(2) * x.extent(3);
  tensor<float> out(shape{pixels, channels});
  for (index_t c = 0; c < channels; ++c)
    for (index_t p = 0; p < pixels; ++p) out[p * channels + c] = x[c * pixels + p];
  return out;
}

/// Keeps every record, as (rows, channels).
class memory_tracer : public tracer {
public:
  bool wants(std::string_view) const override { return true; }
  void record(std::string_view name, view<const float> value, layout, index_t) override {
    tensor<float> copy(value.extents());
    std::copy(value.begin(), value.end(), copy.begin());
    records.insert_or_assign(std::string(name), std::move(copy));
  }
  std::map<std::string, tensor<float>> records;
};

/// An (H, W) array of labels of any 8-bit or 16-bit dtype.
inline label_map read_labels(const array_file& file, const std::string& name) {
  const io::npy_array array = file.read(name);
  REQUIRE(array.header.dtype == "|u1");
  label_map labels(array.header.extents);
  std::copy(array.bytes.begin(), array.bytes.end(), labels.begin());
  return labels;
}

}  // namespace microtome::tests
