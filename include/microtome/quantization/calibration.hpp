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

#include <microtome/core/file.hpp>
#include <microtome/core/parallel.hpp>
#include <microtome/model_file/weights.hpp>
#include <microtome/quantization/second_moments.hpp>

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

  void add(float x, std::int64_t times = 1) {
    add_at((double{x} - double{range.low}) / width(), times);
  }
  /// What lies so many bins from range.low.
  void add_at(double at, std::int64_t times = 1) {
    const auto bin = std::clamp<index_t>(static_cast<index_t>(at), 0, bins - 1);
    counts[static_cast<std::size_t>(bin)] += times;
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

/// What the input of a layer ranges over: all channels together, or each of a depthwise
/// convolution.
struct layer_range {
  std::vector<value_range> ranges;
  std::vector<float> factor;  ///< see layer_weight: `ranges` is of the input by this
};

/// x^(n / 4) for n from 0 to 4, by what every machine rounds alike.
inline double quarters(double x, int n) {
  const double half = std::sqrt(x), quarter = std::sqrt(half);
  return n == 4 ? x : (n & 2 ? half : 1.0) * (n & 1 ? quarter : 1.0);
}

/// What channels of a layer's input are best divided by before they are quantised together, and the
/// weight's columns multiplied by. The larger a channel, the larger its factor, so that all use the
/// levels well; but a weight's larger columns leave fewer levels to the others. (Xiao et al.,
/// SmoothQuant, 2023, whose two exponents are one.) Of
///
///     factor = range^a / |weight|^b        a, b in 0, 1/4, ... 1
///
/// the one is taken for which the squared error is least, rounding being uniform noise of 1/12 of a
/// squared step. Returns (in) factors up to 1, or none where it is best without.
inline std::vector<float> balancing_factors(const layer_weight& layer,
                                            const std::vector<value_range>& ranges,
                                            const std::vector<double>& mean_squares) {
  const auto in = static_cast<std::size_t>(layer.in()), out = static_cast<std::size_t>(layer.out());
  const tensor<float> weight = layer.dequantized();
  std::vector<double> norms(in), most(in);  // of the weight's columns
  std::vector<float> largest(out * in);     // |weight|, over the taps of a channel
  for (index_t i = 0; i < weight.size(); ++i) {
    const auto c = static_cast<std::size_t>(layer.input_channel(i));
    float& tap = largest[static_cast<std::size_t>(layer.channel(i)) * in + c];
    norms[c] += double{weight[i]} * weight[i];
    most[c] = std::max(most[c], double{std::abs(weight[i])});
    tap = std::max(tap, std::abs(weight[i]));
  }
  const double least = *std::max_element(most.begin(), most.end()) * 1e-6 + 1e-30;
  const double taps = static_cast<double>(weight.size()) / static_cast<double>(in * out);
  std::vector<double> factor(in), best;
  double least_error = std::numeric_limits<double>::infinity();
  for (int a = 0; a <= 4; ++a)
    for (int b = 0; b <= 4; ++b) {
      double top = 0;
      for (std::size_t c = 0; c < in; ++c) {
        const double range = std::max({double{ranges[c].high}, -double{ranges[c].low}, 1e-9});
        factor[c] = quarters(range, a) / quarters(std::max(most[c], least), b);
        top = std::max(top, factor[c]);
      }
      double low = 0, high = 0, weights = 0, inputs = 0, errors = 0;
      for (std::size_t c = 0; c < in; ++c) {
        factor[c] = std::max(factor[c] / top, 1e-4);
        low = std::min(low, ranges[c].low / factor[c]);
        high = std::max(high, ranges[c].high / factor[c]);
        inputs += factor[c] * factor[c] * norms[c];
        weights += taps * mean_squares[c] / (factor[c] * factor[c]);
      }
      for (std::size_t o = 0; o < out; ++o) {
        double step = 0;
        for (std::size_t c = 0; c < in; ++c)
          step = std::max(step, largest[o * in + c] * factor[c] / 127);
        errors += step * step;
      }
      const double error =
          inputs * (high - low) * (high - low) / (255.0 * 255.0) + weights * errors;
      if (error < least_error) {
        least_error = error;
        best = factor;
      }
    }
  if (std::all_of(best.begin(), best.end(), [](double f) { return f == 1; })) return {};
  return {best.begin(), best.end()};
}

/// Ranges of the inputs of a model's layers, by module path.
struct activation_ranges {
  std::string model;  ///< safetensors::fingerprint of the one they were seen in
  std::string observer;
  index_t cases = 0;
  std::map<std::string, layer_range, std::less<>> layers;

  /// Widens every range by this part of it. Images that calibration did not see reach further, and
  /// values that are clipped cost more than levels a little wider apart.
  void widen(float part) {
    for (auto& [name, layer] : layers)
      for (value_range& range : layer.ranges)
        range = {range.low * (1 + part), range.high * (1 + part)};
  }

  static activation_ranges read(const std::filesystem::path& path) {
    const whole_file file(path);
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
    for (const auto& [layer, value] : json["layers"].items())
      ranges.layers[layer] = parse_layer(value, name + ": layer '" + layer + "'");
    return ranges;
  }

  void write(const std::filesystem::path& path) const {
    const auto quoted = [](const std::string& text) { return nlohmann::json(text).dump(); };
    std::string text = "{\n \"format\": \"microtome ranges\",\n \"model\": " + quoted(model) +
                       ",\n \"observer\": " + quoted(observer) +
                       ",\n \"cases\": " + std::to_string(cases) + ",\n \"layers\": {";
    const char* separator = "\n";
    const auto listed = [](const auto& all, const auto& text_of) {
      std::string list;
      for (const auto& one : all) list += (list.empty() ? "[" : ", ") + text_of(one);
      return list + "]";
    };
    const auto number = [](float x) { return nlohmann::json(x).dump(); };
    for (const auto& [layer, range] : layers) {
      const std::string pairs = listed(range.ranges, [&](const value_range& r) {
        return "[" + number(r.low) + ", " + number(r.high) + "]";
      });
      text += separator + ("  " + quoted(layer)) + ": ";
      if (range.factor.empty())
        text += range.ranges.size() == 1 ? pairs.substr(1, pairs.size() - 2) : pairs;
      else
        text += "{\"ranges\": " + pairs + ", \"factor\": " + listed(range.factor, number) + "}";
      separator = ",\n";
    }
    text += "\n }\n}\n";
    replace_file(path, std::as_bytes(std::span(text)));
  }

private:
  /// [low, high], a list of such, or an object of that list and factors.
  static layer_range parse_layer(const nlohmann::json& value, const std::string& name) {
    layer_range found;
    const auto add = [&](const nlohmann::json& pair) {
      if (!pair.is_array() || pair.size() != 2 || !pair[0].is_number() || !pair[1].is_number())
        fail(name, ": expected [low, high], or a list of such");
      const value_range range{pair[0].get<float>(), pair[1].get<float>()};
      if (!(range.low <= 0 && range.high >= 0 && range.low < range.high &&
            std::isfinite(range.low) && std::isfinite(range.high)))
        fail(name, " has the range ", range.low, " to ", range.high,
             ", expected finite numbers around zero");
      found.ranges.push_back(range);
    };
    const bool object = value.is_object() && value.contains("ranges") && value.contains("factor");
    const nlohmann::json& pairs = object ? value["ranges"] : value;
    if (pairs.is_array() && !pairs.empty() && pairs[0].is_array())
      for (const nlohmann::json& pair : pairs) add(pair);
    else
      add(pairs);
    if (!object) return found;
    const nlohmann::json& factors = value["factor"];
    if (!factors.is_array() || factors.empty()) fail(name, ": 'factor' is no list of numbers");
    for (const nlohmann::json& factor : factors) {
      const float f = factor.is_number() ? factor.get<float>() : 0.0f;
      if (!(f >= 1e-6f && f <= 1e6f))
        fail(name, ": 'factor' holds ", factor.dump(), ", expected 1e-6 to 1e6");
      found.factor.push_back(f);
    }
    return found;
  }
};

/// Watches the inputs of all layers of a model that is loaded with it, in two rounds over the same
/// cases: first the extremes, then histograms between them. What it finds does not depend on
/// threads, second moments but in their last bits.
class calibrator : public layer_hook {
public:
  /// With second moments, it keeps a square of floats as large as each layer's input.
  explicit calibrator(bool with_moments = false) : with_moments_(with_moments) {}

  void load(layer_weight& layer) override {
    if (layer.folded) return;  // what it multiplies does not exist as an activation
    auto& watcher = watchers_[layer.name];
    watcher = std::make_unique<layer_watcher>(layer, with_moments_);
    layer.observer = watcher.get();
  }

  /// After each case of the first round.
  void end_case() {
    ++cases_;
    for (auto& [name, watcher] : watchers_) watcher->end_case();
  }
  /// After the first round.
  void begin_histograms() {
    for (auto& [name, watcher] : watchers_) watcher->begin_histograms();
  }

  /// Throws `error` for a layer whose input was zero throughout.
  activation_ranges ranges(observer_kind kind, const std::string& fingerprint,
                           int threads = 0) const {
    activation_ranges out;
    out.model = fingerprint;
    out.observer = observer_names[static_cast<std::size_t>(kind)];
    out.cases = cases_;
    std::vector<const layer_watcher*> seen;
    std::vector<layer_range*> found;
    for (const auto& [name, watcher] : watchers_)
      if (watcher->seen()) {
        seen.push_back(watcher.get());
        found.push_back(&out.layers[name]);
      }
    parallel_for(threads > 0 ? threads : default_threads(), std::ssize(seen), [&](index_t i, int) {
      const auto layer = static_cast<std::size_t>(i);
      *found[layer] = seen[layer]->range(kind);
    });
    return out;
  }

  /// Of the layers that were seen, over all their channels.
  std::map<std::string, value_histogram> histograms() const {
    std::map<std::string, value_histogram> all;
    for (const auto& [name, watcher] : watchers_)
      if (watcher->seen()) all.emplace(name, watcher->histogram());
    return all;
  }

  /// Of the layers that were seen: see second_moments::mean.
  std::map<std::string, tensor<float>> moments() {
    std::map<std::string, tensor<float>> all;
    for (auto& [name, watcher] : watchers_)
      if (watcher->has_moments()) all.emplace(name, watcher->moments());
    return all;
  }

private:
  class layer_watcher : public input_observer {
  public:
    layer_watcher(const layer_weight& layer, bool with_moments)
        : layer_(layer),
          with_moments_(with_moments),
          this_case_(static_cast<std::size_t>(layer.in())),
          all_(this_case_.size()),
          average_(this_case_.size()),
          squares_(this_case_.size()) {}

    void see(index_t taps, index_t rows, index_t, const float* const* x) override {
      const std::lock_guard lock(mutex_);
      seen_ = true;
      if (!histograms_.empty()) {
        count(taps * rows, x);
        return;
      }
      for (index_t i = 0; i < taps * rows; ++i)
        for (std::size_t c = 0; c < this_case_.size(); ++c) {
          const float value = x[i][c];
          value_range& range = this_case_[c];
          range.low = value < range.low ? value : range.low;
          range.high = value > range.high ? value : range.high;
          squares_[c] += double{value} * value;
        }
      rows_ += taps * rows;
      if (!with_moments_) return;
      if (moments_.empty()) moments_ = second_moments(layer_.in(), taps, layer_.depthwise);
      moments_.add(rows, x);
    }

    void end_case() {
      for (std::size_t c = 0; c < all_.size(); ++c) {
        all_[c].low = std::min(all_[c].low, this_case_[c].low);
        all_[c].high = std::max(all_[c].high, this_case_[c].high);
        const float kept = first_ ? 0.0f : 0.9f;
        average_[c].low = kept * average_[c].low + (1 - kept) * this_case_[c].low;
        average_[c].high = kept * average_[c].high + (1 - kept) * this_case_[c].high;
        this_case_[c] = {};
      }
      first_ = false;
    }

    /// Throws `error` for a layer whose input was zero throughout.
    void begin_histograms() {
      if (!seen_) return;
      if (widest(all_).low == widest(all_).high)
        fail("calibration: the input of ", layer_.name,
             " was 0 throughout, so that it has no range");
      if (!layer_.depthwise) {
        for (double& square : squares_) square /= static_cast<double>(rows_);
        factor_ = balancing_factors(layer_, all_, squares_);
      }
      histograms_.resize(layer_.depthwise ? all_.size() : 1);
      for (std::size_t i = 0; i < histograms_.size(); ++i)
        histograms_[i].range = layer_.depthwise ? all_[i] : widest(all_);
    }

    bool seen() const { return seen_; }
    bool has_moments() const { return !moments_.empty(); }
    tensor<float> moments() { return moments_.mean(); }

    value_histogram histogram() const {
      if (histograms_.size() == 1) return histograms_[0];
      value_histogram sum;
      sum.range = widest(all_);
      for (const value_histogram& h : histograms_)
        for (index_t bin = 0; bin < value_histogram::bins; ++bin)
          if (h.count(bin)) sum.add(static_cast<float>(h.centre(bin)), h.count(bin));
      return sum;
    }

    /// A channel that was 0 throughout gets the range of all.
    layer_range range(observer_kind kind) const {
      if (!layer_.depthwise)
        return {{range_of(kind, histograms_[0], widest(all_), widest(average_))}, factor_};
      layer_range found;
      for (std::size_t c = 0; c < all_.size(); ++c)
        found.ranges.push_back(all_[c].low == all_[c].high
                                   ? all_[c]
                                   : range_of(kind, histograms_[c], all_[c], average_[c]));
      const value_range every = widest(found.ranges);
      for (value_range& range : found.ranges)
        if (range.low == range.high) range = every;
      return found;
    }

  private:
    /// Around ranges of channels, by their factors.
    value_range widest(const std::vector<value_range>& ranges) const {
      value_range all;
      for (std::size_t c = 0; c < ranges.size(); ++c) {
        const float factor = factor_.empty() ? 1.0f : factor_[c];
        all.low = std::min(all.low, ranges[c].low / factor);
        all.high = std::max(all.high, ranges[c].high / factor);
      }
      return all;
    }

    static value_range range_of(observer_kind kind, const value_histogram& histogram,
                                value_range all, value_range average) {
      switch (kind) {
        case observer_kind::min_max:
          return all;
        case observer_kind::average:
          return average;
        case observer_kind::percentile:
          return histogram.percentile();
        case observer_kind::mse:
          return histogram.least_squared_error();
        case observer_kind::entropy:
          return histogram.least_divergence();
      }
      return all;
    }

    /// Channel by channel: a histogram fits in L1, those of all channels in no cache.
    void count(index_t rows, const float* const* x) {
      for (std::size_t c = 0; c < all_.size(); ++c) {
        value_histogram& h = histograms_[layer_.depthwise ? c : 0];
        if (h.range.low == h.range.high) continue;
        const double bins = 1 / h.width() / (factor_.empty() ? 1.0 : double{factor_[c]});
        const double first = double{h.range.low} / h.width();
        for (index_t i = 0; i < rows; ++i) h.add_at(double{x[i][c]} * bins - first);
      }
    }

    const layer_weight layer_;
    const bool with_moments_;
    std::mutex mutex_;
    bool seen_ = false, first_ = true;
    index_t rows_ = 0;
    std::vector<value_range> this_case_, all_, average_;  // of channels
    std::vector<double> squares_;                         // of channels: sums, then means
    std::vector<float> factor_;
    std::vector<value_histogram> histograms_;  // in the second round: one, or of channels
    second_moments moments_;
  };

  bool with_moments_;
  index_t cases_ = 0;
  std::map<std::string, std::unique_ptr<layer_watcher>> watchers_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
