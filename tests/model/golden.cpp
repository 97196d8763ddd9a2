// LiteMedSAM at full size against the answers of the original PyTorch model. Needs the golden data,
// which does not come with the project, and its checkpoint converted: MICROTOME_GOLDEN_MODEL.
#include <microtome/io/case.hpp>

#include "golden_support.hpp"

namespace microtome::tests {

namespace {

namespace fs = std::filesystem;

const fs::path shared = MICROTOME_SHARED_DATA;

fs::path golden_model() {
  const char* path = std::getenv("MICROTOME_GOLDEN_MODEL");
  return path ? path : "";
}

bool has_golden_data() {
  return fs::exists(golden_model()) && fs::exists(shared / "golden" / "lite_medsam_s20.npz");
}

/// The model once for all tests, since it takes a while to load.
const sam& model() {
  static const sam loaded = sam::load(golden_model());
  return loaded;
}

struct golden {
  io::npz_reader file{shared / "golden" / "lite_medsam_s20.npz"};
  tensor<float> image = channels_last(read_floats(file, "input"));
  std::vector<box> boxes;
  golden() {
    const io::npy_array array = file.read("boxes256");
    const auto* v = reinterpret_cast<const std::int64_t*>(array.bytes.data());
    for (index_t i = 0; i < array.header.extents[0]; ++i, v += 4)
      boxes.push_back({static_cast<float>(v[0]), static_cast<float>(v[1]), static_cast<float>(v[2]),
                       static_cast<float>(v[3])});
  }
};

double share_of_different(const label_map& a, const label_map& b) {
  REQUIRE(a.extents() == b.extents());
  index_t different = 0;
  for (index_t i = 0; i < a.size(); ++i) different += a[i] != b[i];
  return static_cast<double>(different) / static_cast<double>(a.size());
}

}  // namespace

TEST_SUITE("golden" * doctest::skip(!has_golden_data())) {
  TEST_CASE("image_embedding and every traced module") {
    const golden g;
    session s(model());
    memory_tracer trace;
    s.set_tracer(&trace);
    s.encode(g.image);
    CHECK(max_error(s.embedding(), channels_last(read_floats(g.file, "image_embedding"))) <= 2e-4);
    for (const std::string& name : g.file.names()) {
      if (!name.ends_with(".value")) continue;
      const std::string path = name.substr(0, name.size() - 6);
      CAPTURE(path);
      const tensor<float>& got = trace.records.at("image_encoder." + path);
      const tensor<float> expected = read_floats(g.file, name);
      const io::npy_array where = g.file.read(path + ".index");
      const float spread = read_floats(g.file, path + ".mean_std")[1];
      REQUIRE(where.header.dtype == "<i8");
      const bool pixels = g.file.read(path + ".shape").header.extents[0] == 4;
      const index_t rows = got.extent(0), channels = got.extent(1);
      double worst = 0;
      for (index_t i = 0; i < expected.size(); ++i) {
        std::int64_t at = 0;
        std::memcpy(&at, where.bytes.data() + i * 8, 8);
        const float value = pixels ? got[at % rows * channels + at / rows] : got[at];
        worst = std::max(worst, std::abs(double{value} - double{expected[i]}));
      }
      CHECK(worst / spread <= 2e-4);
    }
  }

  TEST_CASE("masks and IoU of boxes, multimask, points with a mask") {
    const golden g;
    session s(model());
    s.encode(g.image);
    const auto check = [&](const std::string& prefix, const decoded_masks& got) {
      CAPTURE(prefix);
      CHECK(max_error(got.low_res_masks, read_floats(g.file, prefix + "low_res_masks")) <= 2e-3);
      CHECK(max_error(got.iou_predictions, read_floats(g.file, prefix + "iou")) <= 2e-3);
    };
    check("", s.decode(g.boxes));
    check("multimask.", s.decode({}, g.boxes[0]));
    const point points[] = {{90, 120, 1}, {40, 60, 0}};
    check("point.", s.decode(points, std::nullopt, read_floats(g.file, "point.mask_input")));
  }

  TEST_CASE("segs of a 2-D case") {
    session s(model());
    const io::segmentation_case read = io::read_case(shared / "data" / "mammography_2d.npz");
    const auto& c = std::get<io::image_case>(read);
    const io::npz_reader file(shared / "golden" / "lite_medsam_s20.npz");
    CHECK(share_of_different(segment(s, c.image, c.prompts), tests::read_labels(file, "segs")) <=
          1e-4);
  }

  TEST_CASE("segs of a 3-D case") {
    session s(model());
    const fs::path path = shared / "golden" / "lite_medsam_s20_3d.npz";
    const io::segmentation_case read = io::read_case(path);
    const auto& c = std::get<io::volume_case>(read);
    const io::npz_reader file(path);
    CHECK(share_of_different(segment(s, c.volume, c.boxes), tests::read_labels(file, "segs")) <=
          1e-3);
  }
}

TEST_CASE("golden data") {
  if (!has_golden_data())
    MESSAGE("no golden data (MICROTOME_GOLDEN_MODEL, " << shared.string()
                                                       << "): the golden suite is skipped");
}

}  // namespace microtome::tests
