// EfficientViT-SAM and MobileSAM against the answers of the original PyTorch code. Needs the golden
// data, which does not come with the project, and the models converted, as NAME.safetensors in the
// folder MICROTOME_GOLDEN_FAMILY.
#include <microtome/io/case.hpp>

#include "golden_support.hpp"

namespace microtome::tests {

namespace {

namespace fs = std::filesystem;

const fs::path shared_data = MICROTOME_SHARED_DATA;

fs::path family_model(const std::string& name) {
  const char* folder = std::getenv("MICROTOME_GOLDEN_FAMILY");
  return folder ? fs::path(folder) / (name + ".safetensors") : fs::path();
}

/// Where a sampled array has its values: (N, C, H, W) or (N, L, C), flattened.
struct samples {
  tensor<float> expected;
  std::vector<index_t> rows, channels;
  float spread = 0;
  index_t window = 0;   ///< tokens of a window
  index_t windows = 1;  ///< square ones side by side, each with its tokens after each other

  samples(const io::npz_reader& file, const std::string& name)
      : expected(read_floats(file, name + ".value")),
        spread(read_floats(file, name + ".mean_std")[1]) {
    const io::npy_array shape = file.read(name + ".shape"), index = file.read(name + ".index");
    const auto integer = [](const io::npy_array& array, index_t i) -> index_t {
      if (array.header.dtype == "<i4") {
        std::int32_t value = 0;
        std::memcpy(&value, array.bytes.data() + i * 4, 4);
        return value;
      }
      REQUIRE(array.header.dtype == "<i8");
      std::int64_t value = 0;
      std::memcpy(&value, array.bytes.data() + i * 8, 8);
      return static_cast<index_t>(value);
    };
    const bool pixels = shape.header.extents[0] == 4;
    if (!pixels) window = integer(shape, 1);
    const index_t size = pixels ? integer(shape, 2) * integer(shape, 3) : integer(shape, 1);
    const index_t depth = pixels ? integer(shape, 1) : integer(shape, 2);
    for (index_t i = 0; i < expected.size(); ++i) {
      const index_t at = integer(index, i);
      rows.push_back(pixels ? at % size : at / depth);
      if (!pixels) windows = integer(shape, 0);
      channels.push_back(pixels ? at / size : at % depth);
    }
  }

  /// Largest difference over the deviation.
  double error(view<const float> got) const {
    double worst = 0;
    for (std::size_t i = 0; i < rows.size(); ++i)
      if (const index_t row = place(rows[i], got.extent(0)); row >= 0)
        worst = std::max(worst, std::abs(double{got.row(row)[channels[i]]} -
                                         double{expected[static_cast<index_t>(i)]}));
    return worst / double{spread};
  }

private:
  /// The row of a token in a map of so many; -1 for the padding of windows.
  index_t place(index_t token, index_t tokens) const {
    if (windows == 1) return token;
    const auto root = [](index_t n) {
      return static_cast<index_t>(std::lround(std::sqrt(static_cast<double>(n))));
    };
    const index_t across = root(windows), side = root(window), width = root(tokens);
    const index_t w = token / window, t = token % window;
    const index_t y = w / across * side + t / side, x = w % across * side + t % side;
    return y < width && x < width ? y * width + x : -1;
  }
};

/// Compares what is recorded at once, so that nothing large is kept.
class comparing_tracer : public tracer {
public:
  explicit comparing_tracer(const io::npz_reader& file) {
    for (const std::string& name : file.names())
      if (name.ends_with(".mean_std")) {
        const std::string path = name.substr(0, name.size() - 9);
        wanted_.emplace(path, samples(file, path));
      }
  }

  bool wants(std::string_view name) const override { return wanted_.contains(local(name)); }
  void record(std::string_view name, view<const float> value, layout, index_t) override {
    errors[local(name)] = wanted_.at(local(name)).error(value);
  }
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, values] : wanted_) all.push_back(name);
    return all;
  }

  std::map<std::string, double> errors;

private:
  static std::string local(std::string_view name) {
    constexpr std::string_view encoder = "image_encoder.";
    return std::string(name.starts_with(encoder) ? name.substr(encoder.size()) : name);
  }
  std::map<std::string, samples> wanted_;
};

std::vector<std::uint8_t> unpacked_bits(const io::npz_reader& file, const std::string& name) {
  std::vector<std::uint8_t> bits;
  for (const std::uint8_t byte : file.read(name).bytes)
    for (int i = 7; i >= 0; --i) bits.push_back(byte >> i & 1);
  return bits;
}

/// A mask of logits at the image's size.
tensor<std::uint8_t> drawn(const decoded_masks& masks, index_t i, const image_fit& fit) {
  tensor<std::uint8_t> mask(shape{fit.height, fit.width});
  detail::draw_mask(2, view<const float>(masks.low_res_masks.row(0) + i * 256 * 256, {256, 256}),
                    fit, std::uint8_t{1}, mask);
  return mask;
}

/// Largest difference of every `step`-th row and column of a plane.
double error_of_every(index_t step, const float* plane, const float* expected) {
  double worst = 0;
  for (index_t y = 0; y < 256; y += step)
    for (index_t x = 0; x < 256; x += step)
      worst = std::max(worst, std::abs(double{plane[y * 256 + x]} - double{*expected++}));
  return worst;
}

void check_model(const std::string& name, const std::string& answers, bool winograd) {
  if (!fs::exists(family_model(name)) || !fs::exists(shared_data / "golden" / answers)) {
    MESSAGE("no golden data for " << name << " (MICROTOME_GOLDEN_FAMILY): skipped");
    return;
  }
  CAPTURE(name);
  const sam model = sam::load(family_model(name), {.winograd = winograd});
  const io::npz_reader file(shared_data / "golden" / answers);
  const io::segmentation_case read = io::read_case(shared_data / "data" / "mammography_2d.npz");
  const auto& c = std::get<io::image_case>(read);

  session s(model, {.threads = 2});
  comparing_tracer trace(file);
  s.set_tracer(&trace);
  const index_t side = model.encoder.image_size();
  tensor<float> input(shape{side * side, 3});
  const image_fit fit = preprocess(c.image, model, input);
  CHECK(samples(file, "input").error(input) <= 1e-6);
  CHECK(samples(file, "dense_pe").error(model.prompts.dense_position()) <= 1e-5);
  s.encode(input);
  for (const std::string& path : trace.names()) {
    if (path == "input" || path == "dense_pe" || path == "boxes.logits") continue;
    CAPTURE(path);
    REQUIRE(trace.errors.contains(path));
    CHECK(trace.errors.at(path) <= (path == "image_embedding" ? 2e-5 : 1e-4));
  }
  s.set_tracer(nullptr);

  const std::vector<box> boxes{fit.to_frame(*c.prompts[0].box), fit.to_frame(*c.prompts[1].box)};
  const tensor<float> scaled = read_floats(file, "boxes.scaled");
  CHECK(std::abs(boxes[1].x1 - scaled[6]) <= 1e-4);
  const decoded_masks two = s.decode(boxes);
  CHECK(max_error(two.low_res_masks, read_floats(file, "boxes.low_res_masks")) <= 3e-4);
  CHECK(max_error(two.iou_predictions, read_floats(file, "boxes.iou")) <= 3e-4);
  const std::vector<std::uint8_t> expected = unpacked_bits(file, "boxes.masks");
  index_t different = 0;
  for (index_t i = 0; i < 2; ++i) {
    const tensor<std::uint8_t> mask =
        drawn({{two.low_res_masks.row(i), {1, 1, 256, 256}}, {}}, 0, fit);
    for (index_t p = 0; p < mask.size(); ++p)
      different += mask[p] != expected[static_cast<std::size_t>(i * mask.size() + p)];
  }
  CHECK(static_cast<double>(different) <= 1e-4 * 2604 * 1726 * 2);
  const tensor<float> first_mask = copy_of({two.low_res_masks.row(0), {256 * 256}});

  const decoded_masks three = s.decode({}, boxes[0]);
  const tensor<float> multimask = read_floats(file, "multimask.low_res_masks");
  for (index_t i = 0; i < 3; ++i)
    CHECK(error_of_every(2, three.low_res_masks.row(0) + i * 256 * 256, multimask.row(i)) <= 3e-4);
  CHECK(max_error(three.iou_predictions, read_floats(file, "multimask.iou")) <= 3e-4);

  const tensor<float> at = read_floats(file, "points.scaled");
  const point points[] = {{at[0], at[1], 1}, {at[2], at[3], 0}};
  const decoded_masks clicked = s.decode(points, std::nullopt, {}, false);
  CHECK(error_of_every(2, clicked.low_res_masks.data(),
                       read_floats(file, "points.low_res_masks").data()) <= 3e-4);
  CHECK(max_error(clicked.iou_predictions, read_floats(file, "points.iou")) <= 3e-4);

  // The prompt is a mask that was decoded: its rounding errors come on top, 6e-4 in all for XL1.
  const decoded_masks refined = s.decode(points, std::nullopt, first_mask, false);
  CHECK(error_of_every(4, refined.low_res_masks.data(),
                       read_floats(file, "mask_prompt.low_res_masks").data()) <=
        (name == "xl1" ? 1e-3 : 3e-4));
  CHECK(max_error(refined.iou_predictions, read_floats(file, "mask_prompt.iou")) <= 3e-4);
}

}  // namespace

TEST_SUITE("golden") {
  TEST_CASE("MobileSAM") {
    check_model("mobile_sam", "mobile_sam.npz", true);
  }
  TEST_CASE("EfficientViT-SAM L0") {
    check_model("l0", "efficientvit_sam_l0.npz", true);
    check_model("l0", "efficientvit_sam_l0.npz", false);
  }
  TEST_CASE("EfficientViT-SAM L1") {
    check_model("l1", "efficientvit_sam_l1.npz", true);
  }
  TEST_CASE("EfficientViT-SAM L2") {
    check_model("l2", "efficientvit_sam_l2.npz", true);
  }
  TEST_CASE("EfficientViT-SAM XL0") {
    check_model("xl0", "efficientvit_sam_xl0.npz", true);
  }
  TEST_CASE("EfficientViT-SAM XL1") {
    check_model("xl1", "efficientvit_sam_xl1.npz", true);
  }
}

}  // namespace microtome::tests
