/// Reading of golden answers, for the tests of the model.
#pragma once

#include <filesystem>
#include <map>
#include <random>
#include <string>

#include <microtome/microtome.hpp>

#include "../arrays.hpp"
#include "../support.hpp"

namespace microtome::tests {

/// A float array of a .npz file; doubles are rounded.
inline tensor<float> read_floats(const array_file& file, const std::string& name) {
  io::npy_array array = file.read(name);
  tensor<float> values(array.header.extents);
  if (array.header.dtype == "<f8") {
    std::vector<double> doubles(static_cast<std::size_t>(values.size()));
    std::memcpy(doubles.data(), array.bytes.data(), static_cast<std::size_t>(array.bytes.size()));
    std::transform(doubles.begin(), doubles.end(), values.begin(),
                   [](double x) { return static_cast<float>(x); });
    return values;
  }
  REQUIRE(array.header.dtype == "<f4");
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

/// The model of 115 000 weights.
inline const std::filesystem::path& tiny_path() {
  static const std::filesystem::path path = data_file("tiny.safetensors");
  return path;
}

/// What a model says of the golden image and three boxes.
struct answer {
  tensor<float> embedding, masks;

  bool operator==(const answer& other) const {
    return std::equal(embedding.begin(), embedding.end(), other.embedding.begin()) &&
           std::equal(masks.begin(), masks.end(), other.masks.begin());
  }
};

inline tensor<float> copy_of(view<const float> values) {
  tensor<float> copy(values.extents());
  std::copy(values.begin(), values.end(), copy.begin());
  return copy;
}

inline tensor<float> golden_image() {
  const array_file golden(data_file("tiny_golden.npz"));
  return channels_last(read_floats(golden, "image"));
}

inline answer answer_of(const sam& model, int threads = 2) {
  session s(model, {.threads = threads});
  s.encode(golden_image());
  const box boxes[] = {{3, 4, 40, 30}, {10, 12, 50, 51}, {20, 2, 33, 18}};
  return {copy_of(s.embedding()), copy_of(s.decode(boxes).low_res_masks)};
}

/// A path for a file, which is gone afterwards.
struct temporary_file {
  std::filesystem::path path = std::filesystem::temp_directory_path() /
                               ("microtome_test_" + std::to_string(std::random_device()()));
  ~temporary_file() {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
};

}  // namespace microtome::tests
