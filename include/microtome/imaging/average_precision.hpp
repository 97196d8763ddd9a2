/// Average precision of instance segmentation by COCO's rules.
#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <span>
#include <vector>

#include <microtome/imaging/run_lengths.hpp>

namespace microtome {

/// An object of the ground truth. What is found in a crowd (objects that were not told apart) is
/// neither right nor wrong.
struct true_object {
  std::int64_t category = 0;
  double area = 0;  ///< decides on its range of sizes, pixels
  bool crowd = false;
  run_lengths mask;
};

/// What somebody has found, and how sure he is of it.
struct detected_object {
  std::int64_t category = 0;
  double score = 0;
  run_lengths mask;
};

/// Objects whose area is from low to high, both included, in pixels.
struct area_range {
  const char* name;
  double low, high;
  bool holds(double area) const { return area >= low && area <= high; }
};

/// COCO's ranges of areas.
inline constexpr std::array<area_range, 4> coco_areas{{{"all", 0, 1e10},
                                                       {"small", 0, 32 * 32},
                                                       {"medium", 32 * 32, 96 * 96},
                                                       {"large", 96 * 96, 1e10}}};

/// One of the numbers that COCO's evaluation ends with.
struct precision_measure {
  bool recall = false;               ///< average recall rather than average precision
  double low_iou = 0, high_iou = 0;  ///< of the thresholds that it is the mean over
  std::size_t area = 0;              ///< of coco_areas
  int detections = 0;                ///< at most so many of an image and category count
  double value = -1;                 ///< 0 to 1; -1 where there is no object to be found
};

namespace detail {

inline constexpr std::size_t iou_thresholds = 10, recall_thresholds = 101;

/// 0.50, 0.55, ..., 0.95, with the last bits of NumPy's linspace, since an IoU may equal one. Made
/// by the compiler, which fuses nothing.
inline constexpr std::array<double, iou_thresholds> iou_threshold = [] {
  std::array<double, iou_thresholds> values{};
  constexpr double step = (0.95 - 0.5) / 9;
  for (std::size_t i = 0; i < 9; ++i) values[i] = static_cast<double>(i) * step + 0.5;
  values[9] = 0.95;
  return values;
}();

/// 0, 0.01, ..., 1 in the same way.
inline constexpr std::array<double, recall_thresholds> recall_threshold = [] {
  std::array<double, recall_thresholds> values{};
  for (std::size_t i = 0; i < recall_thresholds; ++i) values[i] = static_cast<double>(i) * 0.01;
  return values;
}();

}  // namespace detail

/// Average precision (AP) and recall of masks by the rules of COCO's evaluation (Lin et al.,
/// "Microsoft COCO: Common Objects in Context", 2014, and the evaluation code published with it):
///
/// - In each image and category the 100 detections of the highest score choose, one after the
///   other, the object that they share the largest intersection over union (IoU) with, among those
///   of at least the threshold that none has chosen before. Objects outside the range of areas, and
///   crowds, are to be ignored: they are chosen only where no other can be, crowds by any number of
///   detections, with the intersection over the detection's area for the IoU. A detection that
///   chooses such a one is ignored, as is one that chooses none and whose own mask is outside the
///   range.
/// - Precision and recall follow from all images' detections by falling score, each precision the
///   largest at any recall above it; AP is its mean at the recalls 0, 0.01, ..., 1, over categories
///   and the thresholds 0.50, 0.55, ..., 0.95. Average recall (AR) is the last recall.
///
/// Of equal scores what was added first counts first, which is what pycocotools does where images
/// are added by rising id.
class average_precision {
public:
  /// Adds an image: all objects in it and everything that was found. The masks have to have the
  /// image's size; throws `error` where they do not.
  void add_image(std::span<const true_object> truth, std::span<const detected_object> found) {
    std::map<std::int64_t, image_part> parts;
    for (const true_object& o : truth) parts[o.category].objects.push_back(&o);
    for (const detected_object& d : found) parts[d.category].detections.push_back(&d);
    for (auto& [category, part] : parts) add(categories_[category], part);
  }

  /// COCO's twelve numbers in their order: AP over all thresholds, at 0.50, at 0.75, of small,
  /// medium and large objects; AR with 1, 10 and 100 detections, of small, medium and large ones.
  std::array<precision_measure, 12> measures() const {
    std::array<precision_measure, 12> all{{
        {false, 0.5, 0.95, 0, 100},
        {false, 0.5, 0.5, 0, 100},
        {false, 0.75, 0.75, 0, 100},
        {false, 0.5, 0.95, 1, 100},
        {false, 0.5, 0.95, 2, 100},
        {false, 0.5, 0.95, 3, 100},
        {true, 0.5, 0.95, 0, 1},
        {true, 0.5, 0.95, 0, 10},
        {true, 0.5, 0.95, 0, 100},
        {true, 0.5, 0.95, 1, 100},
        {true, 0.5, 0.95, 2, 100},
        {true, 0.5, 0.95, 3, 100},
    }};
    std::array<double, 12> sums{};
    std::array<std::size_t, 12> counts{};
    for (const auto& [category, state] : categories_) {
      const std::vector<const detection*> ranked = by_score(state.detections);
      for (std::size_t i = 0; i < all.size(); ++i) {
        const precision_measure& m = all[i];
        if (state.objects[m.area] == 0) continue;
        for (std::size_t t = 0; t < detail::iou_thresholds; ++t) {
          // Thresholds are 0.05 apart.
          if (detail::iou_threshold[t] < m.low_iou - 0.01 ||
              detail::iou_threshold[t] > m.high_iou + 0.01)
            continue;
          const curve found = measure(ranked, state.objects[m.area], t, m.area, m.detections);
          sums[i] += m.recall ? found.recall : found.precision;
          ++counts[i];
        }
      }
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      if (counts[i]) all[i].value = sums[i] / static_cast<double>(counts[i]);
    return all;
  }

private:
  static constexpr std::size_t ranges = coco_areas.size();
  static constexpr std::size_t most_detections = 100;

  struct image_part {
    std::vector<const true_object*> objects;
    std::vector<const detected_object*> detections;
  };

  /// A detection that has been compared with the objects of its image. Bit t is about threshold t.
  struct detection {
    double score;
    int rank;  ///< among those of its image and category, from 0
    std::array<std::uint16_t, ranges> right, ignored;
  };

  struct category_state {
    std::array<std::size_t, ranges> objects{};  ///< to be found
    std::vector<detection> detections;
  };

  struct curve {
    double precision = 0, recall = 0;
  };

  static void add(category_state& state, image_part& part) {
    std::stable_sort(part.detections.begin(), part.detections.end(),
                     [](const auto* a, const auto* b) { return a->score > b->score; });
    if (part.detections.size() > most_detections) part.detections.resize(most_detections);
    const tensor<double> iou = compare(part);
    const std::size_t first = state.detections.size();
    for (std::size_t d = 0; d < part.detections.size(); ++d)
      state.detections.push_back({part.detections[d]->score, static_cast<int>(d), {}, {}});
    const std::span<detection> added = std::span(state.detections).subspan(first);
    for (std::size_t range = 0; range < ranges; ++range) {
      const area_range& sizes = coco_areas[range];
      const auto is_ignored = [&](const true_object* o) {
        return o->crowd || !sizes.holds(o->area);
      };
      std::vector<std::size_t> order(part.objects.size());  // those to be ignored last
      std::iota(order.begin(), order.end(), std::size_t{0});
      const auto ignored = std::stable_partition(
          order.begin(), order.end(), [&](std::size_t o) { return !is_ignored(part.objects[o]); });
      const auto wanted = static_cast<std::size_t>(ignored - order.begin());
      state.objects[range] += wanted;
      for (std::size_t t = 0; t < detail::iou_thresholds; ++t)
        match(part, iou, order, wanted, t, range, added);
    }
  }

  /// IoU of each detection with each object, (detections, objects).
  static tensor<double> compare(const image_part& part) {
    tensor<double> iou(shape{static_cast<index_t>(part.detections.size()),
                             static_cast<index_t>(part.objects.size())});
    double* out = iou.data();
    for (const detected_object* d : part.detections)
      for (const true_object* o : part.objects) {
        if (!o->crowd) {
          *out++ = intersection_over_union(d->mask, o->mask);
          continue;
        }
        const index_t both = common_area(d->mask, o->mask);
        *out++ = both ? static_cast<double>(both) / static_cast<double>(area_of(d->mask)) : 0;
      }
    return iou;
  }

  /// Lets detections choose at threshold t among the objects in `order`, of which the first
  /// `wanted` are not to be ignored.
  static void match(const image_part& part, const tensor<double>& iou,
                    const std::vector<std::size_t>& order, std::size_t wanted, std::size_t t,
                    std::size_t range, std::span<detection> detections) {
    const auto bit_t = static_cast<std::uint16_t>(1u << t);
    const std::size_t objects = order.size();
    std::vector<bool> chosen(objects);
    for (std::size_t d = 0; d < detections.size(); ++d) {
      const double* row = iou.data() + d * objects;
      double best = std::min(detail::iou_threshold[t], 1 - 1e-10);
      std::size_t choice = objects;
      for (std::size_t i = 0; i < objects; ++i) {
        const std::size_t o = order[i];
        if (chosen[i] && !part.objects[o]->crowd) continue;
        if (i >= wanted && choice < wanted) break;
        if (row[o] < best) continue;
        best = row[o];
        choice = i;
      }
      detection& found = detections[d];
      if (choice < objects) chosen[choice] = true;
      if (choice < wanted)
        found.right[range] = static_cast<std::uint16_t>(found.right[range] | bit_t);
      else if (choice < objects ||
               !coco_areas[range].holds(static_cast<double>(area_of(part.detections[d]->mask))))
        found.ignored[range] = static_cast<std::uint16_t>(found.ignored[range] | bit_t);
    }
  }

  static std::vector<const detection*> by_score(const std::vector<detection>& detections) {
    std::vector<const detection*> ranked;
    for (const detection& d : detections) ranked.push_back(&d);
    std::stable_sort(ranked.begin(), ranked.end(),
                     [](const detection* a, const detection* b) { return a->score > b->score; });
    return ranked;
  }

  /// Mean precision and last recall of one category at threshold t.
  static curve measure(const std::vector<const detection*>& ranked, std::size_t objects,
                       std::size_t t, std::size_t range, int most) {
    constexpr double epsilon = 2.220446049250313e-16;  // of COCO's evaluation
    std::vector<double> precision, recall;
    double right = 0, wrong = 0;
    for (const detection* d : ranked) {
      if (d->rank >= most) continue;
      if (!(d->ignored[range] >> t & 1)) ++(d->right[range] >> t & 1 ? right : wrong);
      precision.push_back(right / (wrong + right + epsilon));
      recall.push_back(right / static_cast<double>(objects));
    }
    for (std::size_t i = precision.size(); i-- > 1;)
      precision[i - 1] = std::max(precision[i - 1], precision[i]);
    double sum = 0;
    for (const double threshold : detail::recall_threshold) {
      const auto at = std::lower_bound(recall.begin(), recall.end(), threshold);
      if (at == recall.end()) break;
      sum += precision[static_cast<std::size_t>(at - recall.begin())];
    }
    return {sum / static_cast<double>(detail::recall_thresholds),
            recall.empty() ? 0 : recall.back()};
  }

  std::map<std::int64_t, category_state> categories_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
