#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <microtome/io/file.hpp>
#include <microtome/weights.hpp>

namespace microtome {

/// How a range is made of what was seen.
enum class observer_kind {
  min_max,     ///< all of it
  average,     ///< mean over the cases of their least and greatest values, weighted 0.9^age
  percentile,  ///< all but the outermost 0.005 % at either end
  mse,         ///< the range with the least squared error of what is quantised in it
  entropy      ///< the range whose levels tell least apart from the values (Kullback-Leibler)
};
inline constexpr std::array<const char*, 5> observer_names{"min-max", "average", "percentile",
                                                           "mse", "entropy"};

/// Values of an activation, zero always among them.
struct value_range {
  float low = 0, high = 0;

  /// 256 levels from low to high, of which one is zero.
  quantization levels() const {
    quantization q;
    q.scale = std::max((high - low) / 255.0f, weights::least_scale);
    q.zero_point = static_cast<int>(std::clamp(std::nearbyint(-low / q.scale), 0.0f, 255.0f));
    return q;
  }
};

/// How often values fell between `range`.low and .high, in bins of equal width.
struct value_histogram {
  static constexpr index_t bins = 2048;

  value_range range;
  std::vector<std::int64_t> counts = std::vector<std::int64_t>(bins);

  double width() const { return (double{range.high} - double{range.low}) / double{bins}; }
  double centre(index_t bin) const {
    return range.low + (static_cast<double>(bin) + 0.5) * width();
  }
  std::int64_t count(index_t bin) const { return counts[static_cast<std::size_t>(bin)]; }

  void add(float x) {
    const double at = (double{x} - double{range.low}) / width();
    const auto bin = std::clamp<index_t>(static_cast<index_t>(at), 0, bins - 1);
    ++counts[static_cast<std::size_t>(bin)];
  }

  value_range percentile() const {
    std::int64_t total = 0;
    for (const std::int64_t n : counts) total += n;
    const std::int64_t outside = total / 20000;
    index_t first = 0, last = bins - 1;
    for (std::int64_t seen = count(first); seen <= outside && first < last;) seen += count(++first);
    for (std::int64_t seen = count(last); seen <= outside && last > first;) seen += count(--last);
    return {static_cast<float>(std::min(0.0, range.low + static_cast<double>(first) * width())),
            static_cast<float>(std::max(0.0, range.low + static_cast<double>(last + 1) * width()))};
  }

  value_range least_squared_error() const {
    return drawn_in([this](value_range tried) { return squared_error(tried); });
  }
  value_range least_divergence() const {
    return drawn_in([this](value_range tried) { return divergence_of(tried); });
  }

  /// Sum over all values of the squared difference that quantising in a range makes.
  double squared_error(value_range tried) const {
    const quantization q = tried.levels();
    double error = 0;
    for (index_t bin = 0; bin < bins; ++bin) {
      if (!count(bin)) continue;
      const double x = centre(bin);
      const double level = std::clamp(std::nearbyint(x / double{q.scale}), -double(q.zero_point),
                                      255.0 - q.zero_point);
      const double difference = x - level * double{q.scale};
      error += static_cast<double>(count(bin)) * difference * difference;
    }
    return error;
  }

  /// Kullback-Leibler divergence of the values, those outside counted at the ends, from what 256
  /// levels keep of them: each level's count spread evenly over its bins that are not empty.
  double divergence_of(value_range tried) const {
    const quantization q = tried.levels();
    std::array<double, 256> mass{}, cells{};
    std::vector<double> clipped(static_cast<std::size_t>(bins));
    std::vector<int> level(static_cast<std::size_t>(bins));
    double total = 0;
    for (index_t bin = 0; bin < bins; ++bin) {
      const double inside = std::clamp(centre(bin), double{tried.low}, double{tried.high});
      const auto at = static_cast<std::size_t>(std::clamp<index_t>(
          static_cast<index_t>((inside - double{range.low}) / width()), 0, bins - 1));
      clipped[at] += static_cast<double>(count(bin));
      total += static_cast<double>(count(bin));
    }
    for (std::size_t bin = 0; bin < clipped.size(); ++bin) {
      const double x = centre(static_cast<index_t>(bin));
      const double l = std::nearbyint(x / double{q.scale}) + q.zero_point;
      level[bin] = static_cast<int>(std::clamp(l, 0.0, 255.0));
      if (!count(static_cast<index_t>(bin)) || x < tried.low || x > tried.high) continue;
      mass[static_cast<std::size_t>(level[bin])] +=
          static_cast<double>(count(static_cast<index_t>(bin)));
      cells[static_cast<std::size_t>(level[bin])] += 1;
    }
    double divergence = 0;
    for (std::size_t bin = 0; bin < clipped.size(); ++bin) {
      if (clipped[bin] == 0) continue;
      const auto l = static_cast<std::size_t>(level[bin]);
      const double kept = cells[l] > 0 ? mass[l] / cells[l] : 0.0;
      divergence += clipped[bin] / total * std::log(clipped[bin] / std::max(kept, 1e-3));
    }
    return divergence;
  }

private:
  /// The range with the least cost, its ends drawn in each on its own.
  template <class Cost>
  value_range drawn_in(Cost&& cost) const {
    constexpr int steps = 24;
    value_range best = range;
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < (range.low < 0 ? steps : 1); ++i)
      for (int j = 0; j < (range.high > 0 ? steps : 1); ++j) {
        const value_range tried{range.low * static_cast<float>(steps - i) / steps,
                                range.high * static_cast<float>(steps - j) / steps};
        if (const double found = cost(tried); found < least) {
          least = found;
          best = tried;
        }
      }
    return best;
  }
};

/// Ranges of the inputs of a model's layers, by module path.
struct activation_ranges {
  std::string model;  ///< safetensors::fingerprint of the one they were seen in
  std::string observer;
  index_t cases = 0;
  std::map<std::string, value_range, std::less<>> layers;

  static activation_ranges read(const std::filesystem::path& path) {
    const io::whole_file file(path);
    const auto* text = reinterpret_cast<const char*>(file.bytes().data());
    return parse({text, file.bytes().size()}, path.string());
  }

  /// Of the text of such a file; `name` stands for it in messages.
  static activation_ranges parse(std::string_view text, const std::string& name) {
    const detail::json_document document(text, name);
    const nlohmann::json& json = document.value;
    const auto text_of = [&](const char* key) {
      if (!json.is_object() || !json.contains(key) || !json[key].is_string())
        fail(name, ": '", key, "' is missing: not a file of ranges, which `calibrate` writes");
      return json[key].get<std::string>();
    };
    if (text_of("format") != "microtome ranges")
      fail(name, ": format is '", text_of("format"), "', expected 'microtome ranges'");
    activation_ranges ranges{text_of("model"), text_of("observer"), 0, {}};
    if (json.contains("cases") && json["cases"].is_number_unsigned())
      ranges.cases = json["cases"].get<index_t>();
    if (!json.contains("layers") || !json["layers"].is_object())
      fail(name, ": 'layers' is missing");
    for (const auto& [layer, value] : json["layers"].items()) {
      if (!value.is_array() || value.size() != 2 || !value[0].is_number() || !value[1].is_number())
        fail(name, ": layer '", layer, "': expected [low, high]");
      const value_range range{value[0].get<float>(), value[1].get<float>()};
      if (!(range.low <= 0 && range.high >= 0 && range.low < range.high &&
            std::isfinite(range.low) && std::isfinite(range.high)))
        fail(name, ": layer '", layer, "' has the range ", range.low, " to ", range.high,
             ", expected finite numbers around zero");
      ranges.layers.emplace(layer, range);
    }
    return ranges;
  }

  void write(const std::filesystem::path& path) const {
    const auto quoted = [](const std::string& text) { return nlohmann::json(text).dump(); };
    std::string text = "{\n \"format\": \"microtome ranges\",\n \"model\": " + quoted(model) +
                       ",\n \"observer\": " + quoted(observer) +
                       ",\n \"cases\": " + std::to_string(cases) + ",\n \"layers\": {";
    const char* separator = "\n";
    for (const auto& [layer, range] : layers) {
      text += separator + ("  " + quoted(layer)) + ": [" + nlohmann::json(range.low).dump() + ", " +
              nlohmann::json(range.high).dump() + "]";
      separator = ",\n";
    }
    text += "\n }\n}\n";
    io::replace_file(path, std::as_bytes(std::span(text)));
  }
};

/// Watches the inputs of all layers of a model that is loaded with it, in two rounds over the same
/// cases: first the extremes, then histograms between them. What it finds does not depend on
/// threads: it keeps extremes and counts alone.
class calibrator : public layer_hook {
public:
  void load(layer_weight& layer) override {
    if (layer.folded) return;  // what it multiplies does not exist as an activation
    auto& watcher = watchers_[layer.name];
    watcher = std::make_unique<layer_watcher>();
    layer.observer = watcher.get();
  }

  /// After each case of the first round.
  void end_case() {
    ++cases_;
    for (auto& [name, watcher] : watchers_) watcher->end_case();
  }
  void begin_histograms() {
    for (auto& [name, watcher] : watchers_) watcher->begin_histogram();
  }

  /// Throws `error` for a layer whose input was zero throughout.
  activation_ranges ranges(observer_kind kind, const std::string& fingerprint) const {
    activation_ranges out{fingerprint, observer_names[static_cast<std::size_t>(kind)], cases_, {}};
    for (const auto& [name, watcher] : watchers_) {
      if (!watcher->seen()) continue;
      const value_range range = watcher->range(kind);
      if (range.low == range.high)
        fail("calibration: the input of ", name, " was 0 throughout, so that it has no range");
      out.layers.emplace(name, range);
    }
    return out;
  }

  /// Of the layers that were seen.
  std::map<std::string, const value_histogram*> histograms() const {
    std::map<std::string, const value_histogram*> all;
    for (const auto& [name, watcher] : watchers_)
      if (watcher->seen()) all.emplace(name, &watcher->histogram());
    return all;
  }

private:
  class layer_watcher : public input_observer {
  public:
    void see(index_t rows, index_t columns, const float* const* x) override {
      value_range range;
      if (!counting_) {
        for (index_t i = 0; i < rows; ++i)
          for (index_t j = 0; j < columns; ++j) {
            range.low = x[i][j] < range.low ? x[i][j] : range.low;
            range.high = x[i][j] > range.high ? x[i][j] : range.high;
          }
      }
      const std::lock_guard lock(mutex_);
      seen_ = true;
      if (counting_) {
        for (index_t i = 0; i < rows; ++i)
          for (index_t j = 0; j < columns; ++j) histogram_.add(x[i][j]);
        return;
      }
      this_case_.low = std::min(this_case_.low, range.low);
      this_case_.high = std::max(this_case_.high, range.high);
    }

    void end_case() {
      all_.low = std::min(all_.low, this_case_.low);
      all_.high = std::max(all_.high, this_case_.high);
      const float kept = first_ ? 0.0f : 0.9f;
      average_.low = kept * average_.low + (1 - kept) * this_case_.low;
      average_.high = kept * average_.high + (1 - kept) * this_case_.high;
      this_case_ = {};
      first_ = false;
    }

    void begin_histogram() {
      counting_ = true;
      histogram_.range = all_;
    }

    bool seen() const { return seen_; }
    const value_histogram& histogram() const { return histogram_; }
    value_range range(observer_kind kind) const {
      if (all_.low == all_.high) return all_;
      switch (kind) {
        case observer_kind::min_max:
          return all_;
        case observer_kind::average:
          return average_;
        case observer_kind::percentile:
          return histogram_.percentile();
        case observer_kind::mse:
          return histogram_.least_squared_error();
        case observer_kind::entropy:
          return histogram_.least_divergence();
      }
      return all_;
    }

  private:
    std::mutex mutex_;
    bool seen_ = false, first_ = true, counting_ = false;
    value_range this_case_, all_, average_;
    value_histogram histogram_;
  };

  index_t cases_ = 0;
  std::map<std::string, std::unique_ptr<layer_watcher>> watchers_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
