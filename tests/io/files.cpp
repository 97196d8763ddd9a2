#include <algorithm>
#include <cstdint>
#include <fstream>
#include <thread>

#include <microtome/io/case.hpp>
#include <microtome/io/overlay.hpp>

#include "../support.hpp"

namespace microtome::tests {

namespace {

namespace fs = std::filesystem;

/// A folder of this test's own, gone when it ends.
class temporary_folder {
public:
  temporary_folder() {
    path_ = fs::temp_directory_path() / ("microtome." + std::to_string(std::random_device{}()));
    fs::create_directories(path_);
  }
  ~temporary_folder() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(path_), fs::directory_iterator{}));
  }

private:
  fs::path path_;
};

std::vector<char> content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void overwrite(const fs::path& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

template <class T>
tensor<T> counted(shape extents) {
  tensor<T> values(extents);
  for (index_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(i * 7 % 251);
  return values;
}

/// Writes a case of these arrays; returns the error of reading it.
template <class Image, class Box>
std::string case_error(const fs::path& path, const tensor<Image>& image, const tensor<Box>& boxes) {
  io::npz_writer file;
  file.add<Image>("imgs", image);
  file.add<Box>("boxes", boxes);
  file.write(path);
  return error_of([&] { static_cast<void>(io::read_case(path)); });
}

}  // namespace

TEST_CASE("arrays survive a .npz file, of every rank") {
  const temporary_folder folder;
  const tensor<std::uint8_t> a = counted<std::uint8_t>({3, 5, 7});
  const tensor<float> b = counted<float>({11});
  const tensor<std::int64_t> c = counted<std::int64_t>({2, 0});
  for (const auto compression : {io::npz_compression::none, io::npz_compression::deflate}) {
    io::npz_writer file;
    file.add<std::uint8_t>("a", a);
    file.add<float>("b.weight", b);
    file.add<std::int64_t>("c", c);
    file.write(folder / "x.npz", compression);
    const io::npz_reader read(folder / "x.npz");
    CHECK(read.names() == std::vector<std::string>{"a", "b.weight", "c"});
    const io::npy_array got = read.read("a");
    CHECK(got.header.extents == shape{3, 5, 7});
    CHECK(std::equal(a.begin(), a.end(), got.bytes.begin()));
    CHECK(read.read("b.weight").header.dtype == "<f4");
    CHECK(read.read("c").header.extents == shape{2, 0});
    CHECK(mentions(error_of([&] { static_cast<void>(read.read("d")); }),
                   {"x.npz", "'d'", "missing"}));
  }
  CHECK(folder.files() == 1);
}

TEST_CASE("a .npy header is read in every form that NumPy writes, and in no other") {
  const auto parse = [](const std::string& text, int version = 1) {
    std::string file("\x93NUMPY", 6);
    file += static_cast<char>(version);
    file += '\0';
    file += static_cast<char>(text.size() & 255);
    file += static_cast<char>(text.size() >> 8);
    if (version > 1) file += std::string(2, '\0');
    file += text;
    return io::parse_npy_header(std::as_bytes(std::span(file)), "x", 1 << 20).first;
  };
  CHECK(parse("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }").extents ==
        shape{3, 4});
  CHECK(parse("{'descr': '|u1', 'fortran_order': True, 'shape': (3,), }  \n").column_major);
  CHECK(parse("{\"shape\": (), 'descr': '<i8', 'fortran_order': False}", 2).extents.rank() == 0);
  for (const char* bad :
       {"", "{", "{}", "{'descr': '<f4'", "{'descr': '<f4', 'shape': (3, }",
        "{'descr': '<f4', 'fortran_order': Maybe, 'shape': (3,)}", "[1, 2]",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)} import os",
        "{'descr': '<f4', 'a': 'b', 'fortran_order': False, 'shape': (3,)}"})
    CHECK(mentions(error_of([&] { parse(bad); }), {"x: ", "header"}));
  for (const char* dtype : {">f4", "|O", "<U8", "<c8", "<f3", "|u2"}) {
    const std::string text =
        std::string("{'descr': '") + dtype + "', 'fortran_order': False, 'shape': (3,)}";
    CHECK(mentions(error_of([&] { parse(text); }), {"x: ", dtype}));
  }
  CHECK(mentions(error_of([&] {
                   parse("{'descr': '<f8', 'fortran_order': False, 'shape': (1000, 1000, 1000)}");
                 }),
                 {"(1000, 1000, 1000)", "larger"}));
}

TEST_CASE("column-major arrays come out row-major") {
  const temporary_folder folder;
  // (2, 3) in column-major order: columns one after the other.
  tensor<std::uint8_t> values(shape{2, 3});
  const std::uint8_t stored[] = {0, 10, 1, 11, 2, 12};
  std::copy(std::begin(stored), std::end(stored), values.begin());
  io::npz_writer file;
  file.add<std::uint8_t>("a", values);
  file.write(folder / "x.npz", io::npz_compression::none);
  std::vector<char> bytes = content(folder / "x.npz");
  const std::string from = "'fortran_order': False", to = "'fortran_order': True ";
  const auto at = std::search(bytes.begin(), bytes.end(), from.begin(), from.end());
  REQUIRE(at != bytes.end());
  std::copy(to.begin(), to.end(), at);
  overwrite(folder / "x.npz", bytes);
  // The checksum is wrong now, and that is found.
  const io::npz_reader damaged(folder / "x.npz");
  CHECK(mentions(error_of([&] { static_cast<void>(damaged.read("a")); }), {"'a'", "damaged"}));

  const io::npz_reader numpy(data_file("column_major.npz"));
  const io::npy_array a = numpy.read("a");
  CHECK(a.header.extents == shape{2, 3, 4});
  for (index_t i = 0; i < 24; ++i) {
    std::int16_t value = 0;
    std::memcpy(&value, a.bytes.data() + 2 * i, 2);
    CHECK(value == i);
  }
}

TEST_CASE("a .npz file cut off or damaged anywhere gives an error or sound data, never a crash") {
  const temporary_folder folder;
  io::npz_writer file;
  file.add<std::uint8_t>("imgs", counted<std::uint8_t>({9, 8, 3}));
  file.add<std::int64_t>("boxes", counted<std::int64_t>({2, 4}));
  file.write(folder / "x.npz");
  const std::vector<char> sound = content(folder / "x.npz");
  const auto try_reading = [&](const std::vector<char>& bytes) {
    overwrite(folder / "y.npz", bytes);
    try {
      static_cast<void>(io::read_case(folder / "y.npz"));
      return true;
    } catch (const error& e) {
      CHECK(std::string(e.what()).find("y.npz") != std::string::npos);
      return false;
    }
  };
  CHECK(try_reading(sound));
  for (std::size_t size = 0; size < sound.size(); size += 3)
    CHECK_FALSE(try_reading({sound.begin(), sound.begin() + static_cast<index_t>(size)}));
  std::mt19937 generator(1);
  for (int attempt = 0; attempt < 300; ++attempt) {
    std::vector<char> bytes = sound;
    bytes[generator() % bytes.size()] ^= static_cast<char>(1 << generator() % 8);
    try_reading(bytes);
  }
}

TEST_CASE("archives that claim more than they hold are refused before memory is spent") {
  CHECK(mentions(
      error_of([] { static_cast<void>(io::npz_reader(data_file("bomb.npz")).read("imgs")); }),
      {"bomb.npz", "'imgs'"}));
}

TEST_CASE("cases: shapes decide, and what does not fit is named") {
  const temporary_folder folder;
  const auto image = counted<std::uint8_t>({6, 5, 3});
  const auto volume = counted<std::uint8_t>({4, 6, 5});
  tensor<std::int32_t> boxes2(shape{1, 4}), boxes3(shape{2, 6});
  boxes2[2] = boxes2[3] = boxes3[3] = boxes3[4] = boxes3[5] = 3;
  io::npz_writer flat, deep, grey;
  flat.add<std::uint8_t>("imgs", image);
  flat.add<std::int32_t>("boxes", boxes2);
  flat.write(folder / "flat.npz");
  deep.add<std::uint8_t>("imgs", volume);
  deep.add<std::int32_t>("boxes", boxes3);
  deep.write(folder / "deep.npz");
  grey.add<std::uint8_t>("imgs", counted<std::uint8_t>({6, 5}));
  grey.add<float>("boxes", counted<float>({1, 4}));
  grey.write(folder / "grey.npz");
  const auto c = io::read_case(folder / "flat.npz");
  CHECK(std::get<io::image_case>(c).prompts[0].box->x1 == 3);
  const auto d = io::read_case(folder / "deep.npz");
  CHECK(std::get<io::volume_case>(d).boxes.size() == 2);
  CHECK(std::get<io::volume_case>(d).boxes[0].z1 == 3);
  const auto g = io::read_case(folder / "grey.npz");
  CHECK(std::get<io::image_case>(g).image.extents() == shape{6, 5, 1});
  CHECK(std::get<io::image_case>(g).prompts[0].box->y0 == 7);

  const fs::path path = folder / "bad.npz";
  CHECK(mentions(case_error(path, counted<float>({6, 5, 3}), boxes2),
                 {"bad.npz", "'imgs'", "uint8"}));
  CHECK(mentions(case_error(path, volume, boxes2), {"'imgs'", "(4, 6, 5)", "(1, 4)"}));
  CHECK(mentions(case_error(path, counted<std::uint8_t>({6}), boxes2), {"'imgs'", "(6)"}));
  CHECK(mentions(case_error(path, counted<std::uint8_t>({0, 5, 3}), boxes2), {"'imgs'", "empty"}));
  CHECK(mentions(case_error(path, image, counted<std::int32_t>({4})), {"'boxes'", "(N, 4)"}));
  CHECK(mentions(case_error(path, image, counted<std::int32_t>({1, 5})), {"'boxes'", "(1, 5)"}));
  tensor<float> half(shape{1, 4});
  half[0] = 0.5f;
  CHECK(mentions(case_error(path, image, half), {"'boxes'", "0.5"}));
  half[0] = std::nanf("");
  CHECK(mentions(case_error(path, image, half), {"'boxes'", "nan"}));
  io::npz_writer lacking;
  lacking.add<std::uint8_t>("imgs", image);
  lacking.write(path);
  CHECK(mentions(error_of([&] { static_cast<void>(io::read_case(path)); }),
                 {"bad.npz", "'boxes'", "missing"}));
}

TEST_CASE("PNG images survive, and damaged ones are refused") {
  const temporary_folder folder;
  const auto image = counted<std::uint8_t>({13, 9, 3});
  io::write_png(folder / "a.png", image);
  const tensor<std::uint8_t> read = io::read_png(folder / "a.png");
  CHECK(read.extents() == image.extents());
  CHECK(std::equal(image.begin(), image.end(), read.begin()));
  const std::vector<char> sound = content(folder / "a.png");
  for (std::size_t size = 0; size + 12 < sound.size(); size += 5) {
    overwrite(folder / "b.png", {sound.begin(), sound.begin() + static_cast<index_t>(size)});
    CHECK(
        mentions(error_of([&] { static_cast<void>(io::read_png(folder / "b.png")); }), {"b.png"}));
  }
  std::mt19937 generator(1);
  for (int attempt = 0; attempt < 200; ++attempt) {
    std::vector<char> bytes = sound;
    bytes[generator() % bytes.size()] ^= static_cast<char>(1 << generator() % 8);
    overwrite(folder / "b.png", bytes);
    try {
      static_cast<void>(io::read_png(folder / "b.png"));
    } catch (const error&) {
    }
  }
}

TEST_CASE("label PNGs hold the labels") {
  const temporary_folder folder;
  label_map labels(shape{4, 5});
  for (index_t i = 0; i < 20; ++i) labels[i] = static_cast<std::uint16_t>(i);
  io::write_label_png(folder / "a.png", labels);
  const tensor<std::uint8_t> seen = io::read_png(folder / "a.png");  // through the palette
  CHECK(int{seen[0]} + seen[1] + seen[2] == 0);
  CHECK(seen[3 * 7] == io::label_color(7).r);
  labels[3] = 300;
  io::write_label_png(folder / "a.png", labels);
  CHECK(folder.files() == 1);
}

TEST_CASE("a failed write leaves what was there, and nothing else") {
  const temporary_folder folder;
  const fs::path blocked = folder / "x.npz";
  fs::create_directories(blocked / "inside");  // a folder cannot be replaced by a file
  io::npz_writer file;
  file.add<std::uint8_t>("a", counted<std::uint8_t>({3}));
  CHECK(mentions(error_of([&] { file.write(blocked); }), {"x.npz"}));
  CHECK(mentions(error_of([&] { replace_file(blocked, {}); }), {"x.npz"}));
  CHECK(mentions(error_of([&] { file.write(folder / "missing" / "x.npz"); }), {"missing"}));
  CHECK(mentions(error_of([&] { replace_file(folder / "missing/x", {}); }), {"missing"}));
  const std::filesystem::path device = "/dev/null";
  if (std::filesystem::exists(device)) {
    CHECK(mentions(error_of([&] { replace_file(device, {}); }), {"not a regular file"}));
    CHECK(std::filesystem::is_character_file(device));
  }
  CHECK(fs::exists(blocked / "inside"));
  CHECK(folder.files() == 1);
}

TEST_CASE("files that several write at once are one's of them, and nothing else stays") {
  const temporary_folder folder;
  const std::filesystem::path path = folder / "x";
  const std::filesystem::path left = folder / ".x.whole";  // by one that was killed
  std::ofstream(left) << "left";
  std::vector<std::thread> writers;
  for (int i = 0; i < 4; ++i)
    writers.emplace_back([&path, i] {
      const std::vector<std::byte> content(100'000 + static_cast<std::size_t>(i), std::byte(i));
      for (int times = 0; times < 50; ++times) replace_file(path, content);
    });
  for (std::thread& t : writers) t.join();
  const whole_file file(path);
  const std::span<const std::byte> bytes = file.bytes();
  REQUIRE(bytes.size() >= 100'000);
  const std::size_t written_by = bytes.size() - 100'000;
  CHECK(std::count(bytes.begin(), bytes.end(), std::byte(written_by)) ==
        static_cast<std::ptrdiff_t>(bytes.size()));
  replace_file(path, {});
  CHECK(whole_file(path).bytes().empty());
  CHECK(folder.files() == 1);
}

TEST_CASE("overlays show image, masks and boxes") {
  tensor<std::uint8_t> image(shape{40, 60, 1});
  std::fill(image.begin(), image.end(), std::uint8_t{100});
  label_map labels(shape{40, 60});
  for (index_t y = 10; y < 30; ++y)
    for (index_t x = 10; x < 30; ++x) labels[y * 60 + x] = 2;
  const io::labelled_box box{{35, 5, 55, 35}, 1};
  const tensor<std::uint8_t> picture = io::make_overlay(image, labels, std::span(&box, 1));
  const index_t zoom = 9;  // the least that gives 512 pixels
  CHECK(picture.extents() == shape{40 * zoom, 60 * zoom, 3});
  const auto pixel = [&](index_t y, index_t x) { return picture.data() + (y * 60 * zoom + x) * 3; };
  CHECK(pixel(0, 0)[0] == 100);
  CHECK(pixel(10 * zoom, 10 * zoom)[0] == io::label_color(2).r);  // border
  CHECK(pixel(20 * zoom, 20 * zoom)[0] != 100);                   // inside
  CHECK(pixel(20 * zoom, 20 * zoom)[0] != io::label_color(2).r);
  CHECK(pixel(5 * zoom, 35 * zoom)[0] != 100);  // corner of the box
  CHECK(pixel(20 * zoom, 45 * zoom)[0] == 100);
}

}  // namespace microtome::tests
