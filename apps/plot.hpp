/// Pictures of numbers, as SVG: nothing but text, and every browser shows it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <microtome/core/file.hpp>

namespace microtome::app {

class svg {
public:
  svg(double width, double height) {
    add("<svg xmlns='http://www.w3.org/2000/svg' width='%.0f' height='%.0f' "
        "font-family='sans-serif' font-size='11'>\n<rect width='100%%' height='100%%' "
        "fill='white'/>\n",
        width, height);
  }

  void bar(double x, double y, double width, double height, const char* color) {
    add("<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' ", x, y, width, height);
    text_ += std::string("fill='") + color + "'/>\n";
  }
  void label(double x, double y, const std::string& text, const char* anchor = "start") {
    add("<text x='%.1f' y='%.1f' ", x, y);
    text_ += std::string("text-anchor='") + anchor + "'>" + escaped(text) + "</text>\n";
  }

  void write(const std::string& path) {
    text_ += "</svg>\n";
    replace_file(path, std::as_bytes(std::span(text_)));
  }

private:
  template <class... Values>
  void add(const char* format, Values... values) {
    char line[512];
    std::snprintf(line, sizeof line, format, values...);
    text_ += line;
  }
  static std::string escaped(const std::string& text) {
    std::string out;
    for (const char c : text) out += c == '<' ? "&lt;" : c == '&' ? "&amp;" : std::string(1, c);
    return out;
  }

  std::string text_;
};

/// A horizontal bar for each label, longest first if sorted so.
inline void draw_bars(const std::string& path, const std::string& title,
                      const std::vector<std::pair<std::string, double>>& values) {
  const double row = 15, left = 260, width = 420;
  double most = 1e-12;
  for (const auto& [name, value] : values) most = std::max(most, value);
  svg picture(left + width + 80, row * static_cast<double>(values.size() + 2));
  picture.label(8, 15, title);
  double y = 2 * row;
  for (const auto& [name, value] : values) {
    const double length = std::max(0.0, value) / most * width;
    picture.label(left - 6, y, name, "end");
    picture.bar(left, y - 10, length, 11, "#2a7f62");
    char number[32];
    std::snprintf(number, sizeof number, "%.5f", value);
    picture.label(left + length + 5, y, number);
    y += row;
  }
  picture.write(path);
}

/// A small histogram for each name, its counts on a logarithmic scale, with `kept` shaded.
struct histogram_plot {
  std::string name;
  std::vector<double> counts;
  double low, high;            ///< of all bins
  double kept_low, kept_high;  ///< of the range that was chosen
};

inline void draw_histograms(const std::string& path, const std::vector<histogram_plot>& plots) {
  const double width = 230, height = 90, columns = 5, inside = width - 20;
  const auto rows = std::ceil(static_cast<double>(plots.size()) / columns);
  svg picture(columns * width, rows * height + 10);
  for (std::size_t i = 0; i < plots.size(); ++i) {
    const histogram_plot& p = plots[i];
    const double x = static_cast<double>(i % 5) * width + 10;
    const double y = static_cast<double>(i / 5) * height + height;  // of the axis
    const auto at = [&](double value) { return x + (value - p.low) / (p.high - p.low) * inside; };
    picture.bar(at(p.kept_low), y - 58, at(p.kept_high) - at(p.kept_low), 58, "#e4efe9");
    const double most = std::log1p(*std::max_element(p.counts.begin(), p.counts.end()));
    const double bar = inside / static_cast<double>(p.counts.size());
    for (std::size_t b = 0; b < p.counts.size(); ++b) {
      const double length = most > 0 ? std::log1p(p.counts[b]) / most * 55 : 0;
      if (length > 0)
        picture.bar(x + static_cast<double>(b) * bar, y - length, bar, length, "#2a7f62");
    }
    picture.label(x, y - 64, p.name);
    char ends[64];
    std::snprintf(ends, sizeof ends, "%.3g", p.low);
    picture.label(x, y + 11, ends);
    std::snprintf(ends, sizeof ends, "%.3g", p.high);
    picture.label(x + inside, y + 11, ends, "end");
  }
  picture.write(path);
}

}  // namespace microtome::app
