/// COCO's files: annotations of instances, and results (https://cocodataset.org/#format-data).
#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <microtome/core/file.hpp>
#include <microtome/core/json.hpp>
#include <microtome/imaging/polygon_mask.hpp>
#include <microtome/imaging/prompts.hpp>
#include <microtome/imaging/run_lengths.hpp>

namespace microtome::io {

/// Images that COCO's files may speak of are at most so large, in pixels.
inline constexpr index_t max_coco_pixels = index_t{1} << 28;

/// Called with what is wrong with one part of a file, which is then left out.
using complaint_callback = std::function<void(const std::string& complaint)>;

struct coco_image {
  std::string file_name;  ///< a path below the images' folder, with the separator '/'
  index_t height = 0, width = 0;
};

struct coco_annotation {
  std::int64_t id = 0, image = 0, category = 0;
  double area = 0;               ///< what the file says, pixels
  std::optional<image_box> box;  ///< where the file has one
  bool crowd = false;
  run_lengths mask;  ///< of the image's size
};

/// Annotations of instances.
struct coco_instances {
  std::map<std::int64_t, coco_image> images;                         ///< by id
  std::map<std::int64_t, std::string> categories;                    ///< names by id
  std::map<std::int64_t, std::vector<coco_annotation>> annotations;  ///< by image, in file order
};

/// One result: a detector's box, or a mask.
struct coco_result {
  std::int64_t category = 0;
  double score = 0;
  std::optional<image_box> box;
  run_lengths mask;  ///< empty where only boxes were asked for
};

/// Results by image, in file order.
using coco_results = std::map<std::int64_t, std::vector<coco_result>>;

namespace detail {

/// The object under `key`, or null where there is none.
inline const nlohmann::json* find_key(const nlohmann::json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() ? nullptr : &*found;
}

/// A whole number from `low` to `high`; throws `error` otherwise.
inline std::int64_t whole_number(const nlohmann::json& object, const char* key, std::int64_t low,
                                 std::int64_t high) {
  const nlohmann::json* value = find_key(object, key);
  if (!value) fail("'", key, "' is missing");
  const bool fits = value->is_number_unsigned()
                        ? value->get<std::uint64_t>() <= static_cast<std::uint64_t>(high)
                        : value->is_number_integer() && value->get<std::int64_t>() <= high;
  if (!fits || value->get<std::int64_t>() < low)
    fail("'", key, "' is not a whole number from ", low, " to ", high);
  return value->get<std::int64_t>();
}

inline std::int64_t coco_id(const nlohmann::json& object, const char* key) {
  constexpr auto most = std::int64_t{1}
                        << 53;  // what programs that read numbers as double can tell apart
  return whole_number(object, key, -most, most);
}

/// A finite number of a magnitude up to `most`.
inline double real_number(const nlohmann::json& value, const char* key, double most) {
  const double number = value.is_number() ? value.get<double>() : HUGE_VAL;
  if (!(std::abs(number) <= most)) fail("'", key, "' is not a number up to ", most);
  return number;
}

inline double real_number_at(const nlohmann::json& object, const char* key, double most) {
  const nlohmann::json* value = find_key(object, key);
  if (!value) fail("'", key, "' is missing");
  return real_number(*value, key, most);
}

/// x, y, width, height.
inline std::optional<image_box> coco_box(const nlohmann::json& object) {
  const nlohmann::json* value = find_key(object, "bbox");
  if (!value) return {};
  if (!value->is_array() || value->size() != 4)
    fail("'bbox' is not a list of x, y, width and height");
  double b[4];
  for (std::size_t i = 0; i < 4; ++i) b[i] = real_number((*value)[i], "bbox", 1e9);
  if (b[2] < 0 || b[3] < 0) fail("'bbox' has the size ", b[2], " x ", b[3]);
  return image_box(b[0], b[1], b[0] + b[2], b[1] + b[3]);
}

/// Throws `error` unless the runs fill the mask.
inline void check_runs(const run_lengths& runs) {
  std::uint64_t sum = 0;
  for (const std::uint32_t count : runs.counts) sum += count;
  if (sum != static_cast<std::uint64_t>(runs.height * runs.width))
    fail("'segmentation' has runs of ", sum, " pixels, expected ", runs.height, " x ", runs.width);
}

inline run_lengths polygons_mask(const nlohmann::json& list, index_t height, index_t width) {
  if (list.empty()) fail("'segmentation' has no polygon");
  std::optional<run_lengths> mask;
  std::vector<double> coordinates;
  for (const nlohmann::json& polygon : list) {
    if (!polygon.is_array()) fail("'segmentation' is not a list of polygons");
    coordinates.clear();
    for (const nlohmann::json& c : polygon)
      coordinates.push_back(real_number(c, "segmentation", max_polygon_coordinate));
    run_lengths one = polygon_mask(coordinates, height, width);
    mask = mask ? united(*mask, one) : std::move(one);
  }
  return *mask;
}

}  // namespace detail

/// Runs as the text of COCO's compressed form. Each number is written in groups of 5 bits, the
/// lowest first, in characters from '0' on, with 32 added where another group follows and the
/// highest bit of the last group for the sign; from the fourth number on it is the difference to
/// the number before the last.
inline std::string compressed_runs(const run_lengths& runs) {
  std::string text;
  for (std::size_t i = 0; i < runs.counts.size(); ++i) {
    std::int64_t left = runs.counts[i];
    if (i > 2) left -= runs.counts[i - 2];
    while (true) {
      const auto group = static_cast<int>(left & 31);
      left >>= 5;
      const bool last = left == (group & 16 ? -1 : 0);
      text.push_back(static_cast<char>('0' + group + (last ? 0 : 32)));
      if (last) break;
    }
  }
  return text;
}

/// The runs of such a text, for a mask of height x width pixels. Throws `error` where they do not
/// make that mask.
inline run_lengths expanded_runs(std::string_view text, index_t height, index_t width) {
  run_lengths runs{height, width, {}};
  const std::int64_t pixels = height * width;
  for (std::size_t i = 0; i < text.size();) {
    std::int64_t number = 0;
    int bits = 0;
    for (bool more = true; more; ++i, bits += 5) {
      const int group = i < text.size() ? text[i] - '0' : -1;
      if (group < 0 || group > 63 || bits > 35)
        fail("'segmentation' has compressed runs that are damaged at character ", i);
      number |= static_cast<std::int64_t>(group & 31) << bits;
      more = group & 32;
      if (!more && group & 16) number -= std::int64_t{32} << bits;
    }
    if (runs.counts.size() > 2) number += runs.counts[runs.counts.size() - 2];
    if (number < 0 || number > pixels)
      fail("'segmentation' has a run of ", number, " of ", pixels, " pixels");
    runs.counts.push_back(static_cast<std::uint32_t>(number));
  }
  detail::check_runs(runs);
  return runs;
}

namespace detail {

/// The mask of a 'segmentation' in an image of height x width pixels: a list of polygons, or runs.
inline run_lengths coco_mask(const nlohmann::json& object, index_t height, index_t width) {
  const nlohmann::json* value = find_key(object, "segmentation");
  if (!value) fail("'segmentation' is missing");
  if (value->is_array()) return polygons_mask(*value, height, width);
  const nlohmann::json* counts = value->is_object() ? find_key(*value, "counts") : nullptr;
  const nlohmann::json* size = value->is_object() ? find_key(*value, "size") : nullptr;
  if (!counts || !size) fail("'segmentation' is neither a list of polygons nor counts and size");
  if (!size->is_array() || size->size() != 2 || (*size)[0] != height || (*size)[1] != width)
    fail("'segmentation' has the size ", size->dump().substr(0, 64), ", expected [", height, ",",
         width, "] as its image");
  if (counts->is_string())
    return expanded_runs(counts->get_ref<const std::string&>(), height, width);
  if (!counts->is_array()) fail("'segmentation' has counts that are neither a list nor text");
  run_lengths runs{height, width, {}};
  for (const nlohmann::json& count : *counts) {
    if (!count.is_number_unsigned() ||
        count.get<std::uint64_t>() > static_cast<std::uint64_t>(height * width))
      fail("'segmentation' has a run that is not a whole number from 0 to ", height * width);
    runs.counts.push_back(count.get<std::uint32_t>());
  }
  check_runs(runs);
  return runs;
}

/// A name to open below a folder: not a way out of it, nor anything that a terminal acts on.
inline std::string coco_file_name(const nlohmann::json& object) {
  const nlohmann::json* value = find_key(object, "file_name");
  if (!value || !value->is_string()) fail("'file_name' is missing");
  std::string name = value->get<std::string>();
  const std::filesystem::path path(name);
  const bool leaves = path.empty() || path.is_absolute() || path.has_root_name() ||
                      std::find(path.begin(), path.end(), "..") != path.end();
  if (leaves || std::any_of(name.begin(), name.end(),
                            [](char c) { return static_cast<unsigned char>(c) < 32; }))
    fail("'file_name' is not the name of a file in a folder");
  return name;
}

/// Calls read(object) for every object of a list, and tells `bad` of the error that it throws, with
/// the object's number, or its id where it has one.
template <class Read>
void for_each_object(const nlohmann::json& list, const std::string& file, const char* what,
                     const char* id, const complaint_callback& bad, Read&& read) {
  for (std::size_t i = 0; i < list.size(); ++i) {
    try {
      if (!list[i].is_object()) fail("is not an object");
      read(list[i]);
    } catch (const error& e) {
      std::string name = file + ": " + what + " number ";
      name.append(std::to_string(i));
      if (const nlohmann::json* known = list[i].is_object() ? find_key(list[i], id) : nullptr;
          known && known->is_number_integer())
        name.append(" (").append(id).append(" ").append(known->dump()).append(")");
      bad(name.append(": ").append(e.what()));
    }
  }
}

inline const nlohmann::json& coco_list(const nlohmann::json& json, const std::string& file,
                                       const char* key) {
  const nlohmann::json* list = json.is_object() ? find_key(json, key) : nullptr;
  if (!list || !list->is_array())
    fail(file, ": the list '", key, "' is missing: not annotations of instances in COCO's format");
  return *list;
}

}  // namespace detail

/// Annotations of instances from the text of such a file; `name` stands for it in messages. Nothing
/// in it is trusted. `bad` is told of every image, category and annotation that is not sound or has
/// an id that was there before, which are left out, and so are annotations of images and categories
/// that there are not. Throws `error` where the file as a whole is something else.
inline coco_instances parse_coco_instances(std::string_view text, const std::string& name,
                                           const complaint_callback& bad) {
  const microtome::detail::json_document document(text, name);
  const nlohmann::json& json = document.value;
  coco_instances found;
  const nlohmann::json& annotations = detail::coco_list(json, name, "annotations");
  detail::for_each_object(
      detail::coco_list(json, name, "images"), name, "image", "id", bad,
      [&](const nlohmann::json& object) {
        coco_image image;
        image.file_name = detail::coco_file_name(object);
        image.height =
            static_cast<index_t>(detail::whole_number(object, "height", 1, max_coco_pixels));
        image.width =
            static_cast<index_t>(detail::whole_number(object, "width", 1, max_coco_pixels));
        if (image.height > max_coco_pixels / image.width)
          fail("is ", image.width, " x ", image.height, " pixels, at most ", max_coco_pixels,
               " are possible");
        if (!found.images.emplace(detail::coco_id(object, "id"), std::move(image)).second)
          fail("has the id of another one");
      });
  detail::for_each_object(
      detail::coco_list(json, name, "categories"), name, "category", "id", bad,
      [&](const nlohmann::json& object) {
        const nlohmann::json* label = detail::find_key(object, "name");
        if (!label || !label->is_string()) fail("'name' is missing");
        if (!found.categories.emplace(detail::coco_id(object, "id"), label->get<std::string>())
                 .second)
          fail("has the id of another one");
      });
  std::set<std::int64_t> ids;
  detail::for_each_object(
      annotations, name, "annotation", "id", bad, [&](const nlohmann::json& object) {
        coco_annotation a;
        a.id = detail::coco_id(object, "id");
        a.image = detail::coco_id(object, "image_id");
        a.category = detail::coco_id(object, "category_id");
        const auto image = found.images.find(a.image);
        if (image == found.images.end()) fail("there is no image ", a.image);
        if (!found.categories.contains(a.category)) fail("there is no category ", a.category);
        a.area = detail::real_number_at(object, "area", 1e15);
        if (a.area < 0) fail("'area' is ", a.area);
        a.box = detail::coco_box(object);
        if (const nlohmann::json* crowd = detail::find_key(object, "iscrowd")) {
          a.crowd = *crowd == 1 || *crowd == true;
          if (!a.crowd && *crowd != 0 && *crowd != false) fail("'iscrowd' is neither 0 nor 1");
        }
        a.mask = detail::coco_mask(object, image->second.height, image->second.width);
        if (!ids.insert(a.id).second) fail("has the id of another one");
        found.annotations[a.image].push_back(std::move(a));
      });
  return found;
}

/// What results are read for.
enum class coco_result_part { boxes, masks };

/// Results for those images, in the same way: a list of image_id, category_id, score, and bbox or
/// segmentation, whichever is asked for. Where results are of other images or categories than
/// `instances` has, `bad` is told of their number once.
inline coco_results parse_coco_results(std::string_view text, const std::string& name,
                                       const coco_instances& instances, coco_result_part part,
                                       const complaint_callback& bad) {
  const microtome::detail::json_document document(text, name);
  if (!document.value.is_array()) fail(name, ": is not a list: not results in COCO's format");
  coco_results found;
  struct strangers {
    const char* what;
    std::size_t count = 0;
    std::int64_t first = 0;
    void add(std::int64_t id) {
      if (!count++) first = id;
    }
  } images{"images"}, categories{"categories"};
  detail::for_each_object(
      document.value, name, "result", "image_id", bad, [&](const nlohmann::json& object) {
        coco_result r;
        const std::int64_t id = detail::coco_id(object, "image_id");
        r.category = detail::coco_id(object, "category_id");
        r.score = detail::real_number_at(object, "score", 1e300);
        const auto image = instances.images.find(id);
        if (image == instances.images.end()) return images.add(id);
        if (!instances.categories.contains(r.category)) return categories.add(r.category);
        if (part == coco_result_part::masks)
          r.mask = detail::coco_mask(object, image->second.height, image->second.width);
        else if (r.box = detail::coco_box(object); !r.box)
          fail("'bbox' is missing");
        found[id].push_back(std::move(r));
      });
  for (const strangers& s : {images, categories})
    if (s.count) {
      std::string complaint = name + ": ";
      complaint.append(std::to_string(s.count)).append(" results are of ").append(s.what);
      complaint.append(" that the annotations do not have, the first of ");
      bad(complaint.append(std::to_string(s.first)));
    }
  return found;
}

inline coco_instances read_coco_instances(const std::filesystem::path& path,
                                          const complaint_callback& bad) {
  const whole_file file(path);
  const auto* text = reinterpret_cast<const char*>(file.bytes().data());
  return parse_coco_instances({text, file.bytes().size()}, path.string(), bad);
}

inline coco_results read_coco_results(const std::filesystem::path& path,
                                      const coco_instances& instances, coco_result_part part,
                                      const complaint_callback& bad) {
  const whole_file file(path);
  const auto* text = reinterpret_cast<const char*>(file.bytes().data());
  return parse_coco_results({text, file.bytes().size()}, path.string(), instances, part, bad);
}

/// Masks as a results file, with compressed runs.
class coco_results_writer {
public:
  void add(std::int64_t image, std::int64_t category, double score, const run_lengths& mask) {
    const auto number = [](auto value) { return nlohmann::json(value).dump(); };
    text_.append(text_.empty() ? "[" : ",\n");
    text_.append("{\"image_id\":").append(number(image));
    text_.append(",\"category_id\":").append(number(category));
    text_.append(",\"score\":").append(number(score));
    text_.append(",\"segmentation\":{\"size\":[").append(number(mask.height));
    text_.append(",").append(number(mask.width)).append("],\"counts\":");
    text_.append(nlohmann::json(compressed_runs(mask)).dump()).append("}}");
  }

  /// Writes the file, all or nothing.
  void write(const std::filesystem::path& path) const {
    const std::string whole = (text_.empty() ? "[" : text_) + "]\n";
    replace_file(path, std::as_bytes(std::span(whole)));
  }

private:
  std::string text_;
};

}  // namespace microtome::io

#include <kernels/macros_on.hpp>
