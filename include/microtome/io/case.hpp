#pragma once

#include <kernels/macros_off.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include <microtome/imaging/pipeline.hpp>
#include <microtome/io/npz.hpp>
#include <microtome/io/png.hpp>

namespace microtome::io {

/// An image (H, W, 3) or (H, W, 1) and what points out the objects in it.
struct image_case {
  tensor<std::uint8_t> image;
  std::vector<image_prompt> prompts;
  std::string note;  ///< what reading it has changed, for people; usually empty
};

/// A volume (D, H, W) and the boxes in it.
struct volume_case {
  tensor<std::uint8_t> volume;
  std::vector<voxel_box> boxes;
};

using segmentation_case = std::variant<image_case, volume_case>;

namespace detail {

/// The elements of an array of integers, truth values or floats. Numbers of 64 bits lose what a
/// double has no place for.
inline std::vector<double> numbers(const npy_array& array, const std::string& what) {
  const std::string& dtype = array.header.dtype;
  const auto convert = [&]<class T>(T) {
    std::vector<double> found(static_cast<std::size_t>(array.header.extents.size()));
    const std::uint8_t* bytes = array.bytes.data();
    for (double& number : found) {
      T value;
      std::memcpy(&value, bytes, sizeof(T));
      number = static_cast<double>(value);
      bytes += sizeof(T);
    }
    return found;
  };
  if (dtype == "|u1" || dtype == "|b1") return convert(std::uint8_t{});
  if (dtype == "|i1") return convert(std::int8_t{});
  if (dtype == "<u2") return convert(std::uint16_t{});
  if (dtype == "<i2") return convert(std::int16_t{});
  if (dtype == "<u4") return convert(std::uint32_t{});
  if (dtype == "<i4") return convert(std::int32_t{});
  if (dtype == "<u8") return convert(std::uint64_t{});
  if (dtype == "<i8") return convert(std::int64_t{});
  if (dtype == "<f4") return convert(float{});
  if (dtype == "<f8") return convert(double{});
  fail(what, " has dtype '", dtype, "', expected integers or floats");
}

/// The same, all of them whole and below a thousand million.
inline std::vector<index_t> whole_numbers(const npy_array& array, const std::string& what) {
  constexpr double limit = 1e9;  // far beyond any image
  std::vector<index_t> whole;
  for (const double number : numbers(array, what)) {
    if (!(std::abs(number) <= limit) || number != std::floor(number))
      fail(what, " holds ", number, ", expected whole numbers up to ", limit);
    whole.push_back(static_cast<index_t>(number));
  }
  return whole;
}

/// Adds the array `points` of a case to the prompts that its boxes have made.
inline void read_points(const npz_reader& file, std::vector<image_prompt>& prompts) {
  const npy_array array = file.read("points");
  const shape& extents = array.header.extents;
  const std::string what = file.name() + ": array 'points'";
  if (extents.size() == 0) return;
  if (extents.rank() != 2 || extents[1] != 4)
    fail(what, " has shape ", to_string(extents), ", expected (N, 4): x, y, label, object");
  const std::vector<double> rows = numbers(array, what);
  const std::size_t most = prompts.size() + rows.size() / 4;
  for (std::size_t i = 0; i + 3 < rows.size(); i += 4) {
    const double label = rows[i + 2], object = rows[i + 3];
    if (label != 0 && label != 1)
      fail(what, " holds label ", label, ", expected 1 inside the object or 0 outside");
    if (!(object >= 1 && object <= static_cast<double>(most)) || object != std::floor(object))
      fail(what, " holds object ", object, ", expected a number from 1");
    prompts.resize(std::max(prompts.size(), static_cast<std::size_t>(object)));
    prompts[static_cast<std::size_t>(object) - 1].points.push_back(
        {rows[i], rows[i + 1], static_cast<int>(label)});
  }
}

}  // namespace detail

/// Reads a case from a .npz file: `imgs`, uint8, (H, W, 3) or (H, W) with `boxes` (N, 4) as x0, y0,
/// x1, y1, or (D, H, W) with `boxes` (N, 6) as x0, y0, z0, x1, y1, z1. The shapes decide which it
/// is. An image may have `points` (M, 4), too, or instead: x, y, label (1 inside the object, 0
/// outside) and the number of the object, from 1; the objects of the boxes are the first. Throws
/// `error` naming file and array.
inline segmentation_case read_case(const npz_reader& file) {
  const std::string& name = file.name();
  const bool clicked = file.contains("points");
  npy_array boxes{{"<i8", false, shape{0, 4}}, {}};
  if (!clicked || file.contains("boxes")) boxes = file.read("boxes");
  const shape& box_shape = boxes.header.extents;
  const std::string what = name + ": array 'boxes'";
  const bool none = box_shape.size() == 0;
  if (!none && (box_shape.rank() != 2 || (box_shape[1] != 4 && box_shape[1] != 6)))
    fail(what, " has shape ", to_string(box_shape), ", expected (N, 4) or (N, 6)");
  const std::vector<index_t> numbers = detail::whole_numbers(boxes, what);

  npy_array imgs = file.read("imgs");
  const shape extents = imgs.header.extents;
  if (imgs.header.dtype != "|u1")
    fail(name, ": array 'imgs' has dtype '", imgs.header.dtype, "', expected '|u1' (uint8)");
  const bool grey = extents.rank() == 2;
  const bool color = extents.rank() == 3 && extents[2] == 3 && (none || box_shape[1] == 4);
  const bool volume = extents.rank() == 3 && !color && (none || box_shape[1] == 6);
  if (extents.size() == 0 || !(grey || color || volume) || (grey && !none && box_shape[1] != 4))
    fail(name, ": array 'imgs' has shape ", to_string(extents), " with boxes ",
         to_string(box_shape),
         ", expected (H, W, 3) with (N, 4) or (D, H, W) with (N, 6), not empty");

  if (volume) {
    if (clicked) fail(name, ": array 'points' beside a volume; points are for images");
    volume_case result{std::move(imgs.bytes).reshaped(extents), {}};
    for (std::size_t i = 0; i + 5 < numbers.size(); i += 6)
      result.boxes.push_back({numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3],
                              numbers[i + 4], numbers[i + 5]});
    return result;
  }
  image_case result{
      std::move(imgs.bytes).reshaped({extents[0], extents[1], color ? index_t{3} : index_t{1}}),
      {},
      {}};
  for (std::size_t i = 0; i + 3 < numbers.size(); i += 4)
    result.prompts.emplace_back(
        pixel_box{numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]});
  if (clicked) detail::read_points(file, result.prompts);
  return result;
}

inline segmentation_case read_case(const std::filesystem::path& path) {
  return read_case(npz_reader(path));
}

/// Gives each of the prompts its mask of `low_res_masks`, float32, (prompts, side, side) or
/// (prompts, 1, side, side), of a .npz file, as write_logits() writes it. Where there are no
/// prompts yet, the masks are.
inline void read_logits(const npz_reader& file, std::vector<image_prompt>& prompts) {
  const npy_array array = file.read("low_res_masks");
  const shape& extents = array.header.extents;
  const std::string what = file.name() + ": array 'low_res_masks'";
  if (array.header.dtype != "<f4")
    fail(what, " has dtype '", array.header.dtype, "', expected '<f4' (float32)");
  if (extents.rank() < 3 || extents.size() == 0 || (extents.rank() == 4 && extents[1] != 1))
    fail(what, " has shape ", to_string(extents), ", expected (objects, side, side), not empty");
  if (prompts.empty()) prompts.resize(static_cast<std::size_t>(std::min(extents[0], max_boxes)));
  const auto objects = static_cast<index_t>(prompts.size());
  if (extents[0] != objects)
    fail(what, " has masks of ", extents[0], " objects, expected ", objects);
  const index_t pixels = extents.size() / objects;
  for (index_t i = 0; i < objects; ++i) {
    std::vector<float>& mask = prompts[static_cast<std::size_t>(i)].mask;
    mask.resize(static_cast<std::size_t>(pixels));
    std::memcpy(mask.data(), array.bytes.data() + i * pixels * 4,
                static_cast<std::size_t>(pixels) * 4);
  }
}

inline void read_logits(const std::filesystem::path& path, std::vector<image_prompt>& prompts) {
  read_logits(npz_reader(path), prompts);
}

/// Reads a label map from array `name` of a .npz file: whole numbers from 0 to 65535, (H, W) or
/// (D, H, W).
inline label_map read_labels(const npz_reader& file, const std::string& name) {
  const npy_array array = file.read(name);
  const std::string what = file.name() + ": array '" + name + "'";
  const shape& extents = array.header.extents;
  if ((extents.rank() != 2 && extents.rank() != 3) || extents.size() == 0)
    fail(what, " has shape ", to_string(extents), ", expected (H, W) or (D, H, W), not empty");
  const std::vector<index_t> numbers = detail::whole_numbers(array, what);
  label_map labels(extents);
  for (index_t i = 0; i < labels.size(); ++i) {
    const index_t number = numbers[static_cast<std::size_t>(i)];
    if (number < 0 || number > max_boxes)
      fail(what, " holds ", number, ", expected labels from 0 to ", max_boxes);
    labels[i] = static_cast<std::uint16_t>(number);
  }
  return labels;
}

inline label_map read_labels(const std::filesystem::path& path, const std::string& name) {
  return read_labels(npz_reader(path), name);
}

/// Distances in mm between voxels along D, H, W, from `spacing` of a .npz file, which the field
/// keeps in the order x, y, z; nothing where there is none.
inline std::optional<std::array<double, 3>> read_spacing(const npz_reader& file) {
  if (!file.contains("spacing")) return std::nullopt;
  std::array<double, 3> spacing{1, 1, 1};
  const npy_array array = file.read("spacing");
  const std::string what = file.name() + ": array 'spacing'";
  const std::vector<double> found = detail::numbers(array, what);
  if (found.size() < 2 || found.size() > 3)
    fail(what, " has shape ", to_string(array.header.extents), ", expected 2 or 3 numbers");
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!(found[i] > 0 && found[i] < 1e6))
      fail(what, " holds ", found[i], ", expected millimetres above 0");
    spacing[2 - i] = found[i];
  }
  return spacing;
}

inline std::optional<std::array<double, 3>> read_spacing(const std::filesystem::path& path) {
  return read_spacing(npz_reader(path));
}

/// Writes labels as `segs` of a .npz file: uint8, or uint16 where a label is above 255. All or
/// nothing.
inline void write_segs(const std::filesystem::path& path, const label_map& labels) {
  npz_writer file;
  if (std::all_of(labels.begin(), labels.end(), [](std::uint16_t v) { return v < 256; })) {
    tensor<std::uint8_t> narrow(labels.extents());
    std::copy(labels.begin(), labels.end(), narrow.begin());
    file.add<std::uint8_t>("segs", narrow);
  } else {
    file.add<std::uint16_t>("segs", labels);
  }
  file.write(path);
}

/// What decoding found for the objects of an image, for later decodings.
struct object_logits {
  tensor<float> low_res_masks;    ///< (objects, side, side), logits
  tensor<float> iou_predictions;  ///< (objects), NaN where an object could not be segmented
};

/// Writes `low_res_masks` and `iou_predictions` of a .npz file. All or nothing.
inline void write_logits(const std::filesystem::path& path, const object_logits& found) {
  npz_writer file;
  file.add<float>("low_res_masks", found.low_res_masks);
  file.add<float>("iou_predictions", found.iou_predictions);
  file.write(path);
}

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
