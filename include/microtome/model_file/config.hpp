#pragma once

#include <kernels/macros_off.hpp>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <microtome/model_file/safetensors.hpp>

namespace microtome {

/// Access to an object of a model file's configuration, in which every number is bounded and every
/// error names the file and the key.
class config_reader {
public:
  /// `object` must outlive the reader, and what it makes.
  config_reader(std::string file, std::string path, const nlohmann::json& object)
      : file_(std::move(file)), path_(std::move(path)), object_(&object) {
    if (!object.is_object()) fail(file_, ": config ", path_, " is not an object");
  }

  index_t number(const char* key, index_t low, index_t high) const {
    const nlohmann::json& value = at(key);
    if (!value.is_number_integer() || value < low || value > high)
      fail(file_, ": config ", path_, key, " is ", value.dump(), ", expected an integer from ", low,
           " to ", high);
    return value.get<index_t>();
  }

  /// `count` numbers from `low` to `high`.
  std::vector<double> numbers(const char* key, std::size_t count, double low, double high) const {
    const nlohmann::json& list = at(key);
    std::vector<double> values;
    if (list.is_array())
      for (const nlohmann::json& value : list)
        if (value.is_number()) values.push_back(value.get<double>());
    bool good = list.is_array() && list.size() == count && values.size() == count;
    for (const double value : values) good = good && value >= low && value <= high;
    if (!good)
      fail(file_, ": config ", path_, key, " is ", list.dump(), ", expected ", count,
           " numbers from ", low, " to ", high);
    return values;
  }

  double real(const char* key, double low, double high) const {
    const nlohmann::json& value = at(key);
    if (!value.is_number() || !(value >= low && value <= high))
      fail(file_, ": config ", path_, key, " is ", value.dump(), ", expected a number from ", low,
           " to ", high);
    return value.get<double>();
  }

  std::string text(const char* key) const {
    const nlohmann::json& value = at(key);
    if (!value.is_string()) fail(file_, ": config lacks the text ", path_, key);
    return value.get<std::string>();
  }

  /// The place of the text among `known`.
  std::size_t one_of(const char* key, std::initializer_list<const char*> known) const {
    const std::string found = text(key);
    std::string names;
    std::size_t place = 0;
    for (const char* name : known) {
      if (found == name) return place;
      names.append(place++ ? ", " : "").append(name);
    }
    fail(file_, ": config ", path_, key, " is '", found, "', expected one of: ", names);
  }

  const nlohmann::json& at(const char* key) const {
    const auto found = object_->find(key);
    if (found == object_->end()) fail(file_, ": config lacks ", path_, key);
    return *found;
  }

  /// The object under `key`.
  config_reader object(const char* key) const {
    return config_reader(file_, path_ + key + ".", at(key));
  }

  /// The objects of the list under `key`, `least` to `most` of them.
  std::vector<config_reader> objects(const char* key, std::size_t least, std::size_t most) const {
    const nlohmann::json& list = at(key);
    if (!list.is_array() || list.size() < least || list.size() > most)
      fail(file_, ": config ", path_, key, " is not a list of ", least, " to ", most);
    std::vector<config_reader> readers;
    for (std::size_t i = 0; i < list.size(); ++i)
      readers.emplace_back(file_, path_ + key + "[" + std::to_string(i) + "].", list[i]);
    return readers;
  }

  /// Throws `error` with what is wrong with the configuration.
  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail(file_, ": config ", path_, parts...);
  }

private:
  std::string file_;
  std::string path_;
  const nlohmann::json* object_;
};

/// The configuration in the metadata of a model file, as converters/convert.py writes it.
class model_config {
public:
  /// Throws `error` where the file is not of a known version. Version 1 knew LiteMedSAM alone; it
  /// is read as the same model in version 2.
  explicit model_config(const safetensors& file)
      : name_(file.name()),
        version_(version(file)),
        json_(text(file, "config"), file.name() + ": metadata 'config'") {
    if (!json_.value.is_object()) fail(name_, ": metadata 'config' is not an object");
    if (version_ == "2") return;
    if (const std::string model = text(file, "model"); model != "lite_medsam")
      fail(name_, ": metadata 'model' is '", model, "', expected 'lite_medsam'");
    upgrade(json_.value);
  }

  config_reader reader() const { return config_reader(name_, "", json_.value); }

private:
  static std::string text(const safetensors& file, const char* key) {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end())
      fail(file.name(), ": metadata '", key,
           "' is missing: not a model that converters/convert.py wrote");
    return found->second;
  }

  static std::string version(const safetensors& file) {
    if (const std::string format = text(file, "format"); format != "microtome")
      fail(file.name(), ": metadata 'format' is '", format, "', expected 'microtome'");
    const std::string found = text(file, "format_version");
    if (found != "1" && found != "2")
      fail(file.name(), ": metadata 'format_version' is '", found, "', expected '1' or '2'");
    return found;
  }

  /// What version 1 has at the top is the encoder's; what it does not say is LiteMedSAM's. Objects
  /// are there before they are filled: nlohmann's would be broken ones if memory ran out as the
  /// first value made them.
  static void upgrade(nlohmann::json& config) {
    nlohmann::json& encoder = config["image_encoder"] = nlohmann::json::object();
    encoder["kind"] = "tiny_vit";
    encoder["stem"] = "pointwise";
    for (const char* key : {"image_size", "pixel_channels", "stages", "embed_dim"})
      if (const auto found = config.find(key); found != config.end()) {
        encoder[key].swap(*found);
        config.erase(found);
      }
    nlohmann::json& input = config["input"] = nlohmann::json::object();
    input["resize"] = "area";
    input["normalize"] = "range";
    input["coordinates"] = "truncated";
    if (encoder.contains("image_size")) input["frame"] = encoder["image_size"];
    if (const auto decoder = config.find("decoder");
        decoder != config.end() && decoder->is_object())
      (*decoder)["norm_epsilon"] = 1e-5;
  }

  std::string name_, version_;
  detail::json_document json_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
