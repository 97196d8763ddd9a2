#include <limits>

#include <microtome/microtome.hpp>
#include <microtome/model_file/config.hpp>

#include "../file_builder.hpp"
#include "../model/golden_support.hpp"

namespace microtome::tests {

namespace {

file_builder two_tensors() {
  return file_builder().add("a.weight", {2, 3}, 1, 1.0f).add("b.bias", {5}, 2, 1.0f);
}

/// A sound file, to be changed and composed again.
file_builder parsed(const std::vector<std::byte>& sound) {
  std::uint64_t size = 0;
  std::memcpy(&size, sound.data(), 8);
  const char* text = reinterpret_cast<const char*>(sound.data()) + 8;
  file_builder file;
  file.header = nlohmann::json::parse(text, text + size);
  file.data.assign(sound.begin() + 8 + static_cast<index_t>(size), sound.end());
  return file;
}

std::string parse_error(const std::vector<std::byte>& bytes) {
  return error_of([&] { safetensors(bytes, "some.safetensors"); });
}

/// The error of a file whose header has one value changed.
template <class Change>
std::string changed_error(Change&& change) {
  file_builder file = two_tensors();
  change(file.header);
  return parse_error(file.bytes());
}

std::vector<std::byte> tiny_bytes() {
  const whole_file file(data_file("tiny.safetensors"));
  return {file.bytes().begin(), file.bytes().end()};
}

}  // namespace

TEST_CASE("a sound file is read") {
  const file_builder builder = two_tensors();
  const auto bytes = builder.bytes();
  const safetensors file(bytes);
  CHECK(file.tensors().size() == 2);
  CHECK(file.read("a.weight", {2, 3})[4] == random_tensor({2, 3}, 1)[4]);
}

TEST_CASE("F16 and BF16 are widened exactly") {
  file_builder file;
  const std::uint16_t halves[] = {0x3c00, 0xc000, 0x0001, 0x03ff, 0x7bff, 0x8000};
  const std::uint16_t brains[] = {0x3f80, 0xc040};
  const auto add = [&](const char* name, const char* dtype, std::span<const std::uint16_t> v) {
    const std::size_t begin = file.data.size();
    for (const std::byte b : std::as_bytes(v)) file.data.push_back(b);
    file.header[name] = {
        {"dtype", dtype}, {"shape", {v.size()}}, {"data_offsets", {begin, file.data.size()}}};
  };
  add("half", "F16", halves);
  add("brain", "BF16", brains);
  const auto bytes = file.bytes();
  const safetensors read(bytes);
  const tensor<float> h = read.read("half", {6}), b = read.read("brain", {2});
  CHECK(h[0] == 1.0f);
  CHECK(h[1] == -2.0f);
  CHECK(h[2] == std::ldexp(1.0f, -24));
  CHECK(h[3] == std::ldexp(1023.0f, -24));
  CHECK(h[4] == 65504.0f);
  CHECK(std::signbit(h[5]));
  CHECK(b[0] == 1.0f);
  CHECK(b[1] == -3.0f);
}

TEST_CASE("wrong names, shapes, dtypes and values name file and tensor") {
  file_builder builder = two_tensors();
  tensor<float> bad = random_tensor({3}, 3);
  bad[1] = std::numeric_limits<float>::quiet_NaN();
  builder.add("c.weight", bad);
  builder.header["d"] = {{"dtype", "I32"}, {"shape", {2, 3}}, {"data_offsets", {0, 24}}};
  builder.header.erase("a.weight");
  const auto bytes = builder.bytes();
  const safetensors file(bytes, "m.safetensors");
  const auto read_error = [&](const char* name, shape s) {
    return error_of([&] { static_cast<void>(file.read(name, s)); });
  };
  CHECK(mentions(read_error("none", {4}), {"m.safetensors", "'none'", "(4)", "missing"}));
  CHECK(mentions(read_error("b.bias", {6}), {"m.safetensors", "'b.bias'", "(5)", "expected (6)"}));
  CHECK(mentions(read_error("c.weight", {3}), {"m.safetensors", "'c.weight'", "nan", "element 1"}));
  CHECK(mentions(read_error("d", {2, 3}), {"m.safetensors", "'d'", "I32", "F32"}));
}

TEST_CASE("compressed weights are expanded, and what does not fit is refused") {
  // Elements 1, 2 and 9 of ten.
  const auto file_with = [](std::vector<std::uint8_t> mask, index_t stored,
                            const char* dtype = "U8") {
    file_builder builder;
    tensor<float> values(shape{stored});
    for (index_t i = 0; i < stored; ++i) values[i] = static_cast<float>(i + 1);
    builder.add("w_values", values);
    const std::size_t begin = builder.data.size();
    for (const std::uint8_t b : mask) builder.data.push_back(std::byte{b});
    builder.header["w_mask"] = {
        {"dtype", dtype}, {"shape", {mask.size()}}, {"data_offsets", {begin, builder.data.size()}}};
    return builder;
  };
  const auto bytes = file_with({0b110, 0b10}, 3).bytes();
  const safetensors sound(bytes, "m.safetensors");
  CHECK(sound.compressed("w"));
  CHECK(sound.dtype("w") == "F32");
  const tensor<float> w = sound.read("w", {2, 5});
  const std::vector<float> expected{0, 1, 2, 0, 0, 0, 0, 0, 0, 3};
  CHECK(std::equal(w.begin(), w.end(), expected.begin(), expected.end()));

  const auto error_with = [](const file_builder& builder) {
    const auto broken = builder.bytes();
    return error_of([&] {
      const safetensors file(broken, "m.safetensors");
      static_cast<void>(file.read("w", {2, 5}));
    });
  };
  CHECK(mentions(error_with(file_with({0b110, 0b10}, 4)), {"'w_values'", "(4)", "expected (3)"}));
  CHECK(mentions(error_with(file_with({0b111, 0b11}, 3)), {"'w_values'", "(3)", "expected (5)"}));
  CHECK(mentions(error_with(file_with({0b110, 0b100}, 3)), {"'w_mask'", "past the 10 elements"}));
  CHECK(mentions(error_with(file_with({0b110}, 2)), {"'w_mask'", "(1)", "expected (2)"}));
  CHECK(mentions(error_with(file_with({0b110, 0b10}, 3, "I8")), {"'w_mask'", "I8", "U8"}));
  file_builder twice = file_with({0b110, 0b10}, 3);
  twice.add("w", random_tensor({2, 5}, 1));
  CHECK(mentions(error_with(twice), {"'w'", "twice"}));
  file_builder lost = file_with({0b110, 0b10}, 3);
  lost.header.erase("w_values");
  CHECK(mentions(error_with(lost), {"'w_values'", "missing"}));
  file_builder nested = file_with({0b110, 0b10}, 3);  // values are not compressed once more
  const std::size_t end = nested.data.size();
  nested.data.push_back(std::byte{0b111});
  nested.header["w_values_mask"] = {
      {"dtype", "U8"}, {"shape", {1}}, {"data_offsets", {end, end + 1}}};
  nested.header["w_values_values"] = nested.header["w_values"];
  nested.header.erase("w_values");
  CHECK(mentions(error_with(nested), {"'w_values'", "missing"}));
}

TEST_CASE("a file cut off anywhere is refused") {
  const auto whole = two_tensors().bytes();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    const std::vector<std::byte> cut(whole.begin(), whole.begin() + static_cast<index_t>(size));
    CHECK(parse_error(cut).starts_with("some.safetensors: "));
  }
}

TEST_CASE("hostile headers are refused") {
  auto bytes = two_tensors().bytes();
  for (const std::uint64_t size :
       {std::uint64_t{1} << 40, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
    std::memcpy(bytes.data(), &size, 8);
    CHECK(mentions(parse_error(bytes), {"some.safetensors", "header claims"}));
  }
  const file_builder sound = two_tensors();
  for (const char* text : {"", "{", "[]", "7", "{\"a\": 3}", "{\"a\": {}}", "\xff\xfe"})
    CHECK(parse_error(sound.with_header(text)).starts_with("some.safetensors"));
  CHECK(mentions(parse_error(sound.with_header(std::string(100000, '['))), {"nests deeper"}));
  CHECK(
      mentions(parse_error(sound.with_header("{\"__metadata__\": {\"a\": 3}}")), {"metadata 'a'"}));
}

TEST_CASE("hostile shapes and offsets are refused") {
  using json = nlohmann::json;
  CHECK(mentions(changed_error([](json& h) {
                   h["a.weight"]["shape"] = {1ull << 62, 1ull << 62};
                 }),
                 {"'a.weight'", "larger than the file"}));
  CHECK(mentions(changed_error([](json& h) {
                   h["a.weight"]["shape"] = {-2, -3};
                 }),
                 {"'a.weight'", "negative"}));
  CHECK(mentions(changed_error([](json& h) {
                   h["a.weight"]["shape"] = {2.5, 3};
                 }),
                 {"'a.weight'", "fractional"}));
  CHECK(mentions(changed_error([](json& h) {
                   h["a.weight"]["shape"] = {2, 4};
                 }),
                 {"'a.weight'", "takes 32 bytes", "24"}));
  CHECK(mentions(changed_error([](json& h) {
                   h["a.weight"]["shape"] = {1, 1, 1, 1, 6};
                 }),
                 {"'a.weight'", "four dimensions"}));
  CHECK(mentions(changed_error([](json& h) {
                   h["a.weight"]["data_offsets"] = {0, 1ull << 60};
                 }),
                 {"'a.weight'", "truncated"}));
  CHECK(mentions(changed_error([](json& h) {
                   h["a.weight"]["data_offsets"] = {24, 0};
                 }),
                 {"'a.weight'"}));
  CHECK(mentions(changed_error([](json& h) {
                   h["b.bias"]["data_offsets"] = {4, 24};
                 }),
                 {"'a.weight'", "'b.bias'", "overlap"}));
  CHECK(mentions(changed_error([](json& h) { h["a.weight"]["dtype"] = "F99"; }),
                 {"'a.weight'", "F99"}));
}

TEST_CASE(
    "no flipped bit of a model's header or of its sizes goes unpunished by more than an error") {
  // Every outcome but an error or a model that loads is a crash, which the sanitizers would show.
  const std::vector<std::byte> sound = tiny_bytes();
  std::uint64_t header = 0;
  std::memcpy(&header, sound.data(), 8);
  std::mt19937 generator(1);
  int refused = 0;
  for (int attempt = 0; attempt < 150; ++attempt) {
    std::vector<std::byte> bytes = sound;
    const std::size_t at = generator() % (8 + header);
    bytes[at] ^= std::byte{1} << generator() % 8;
    try {
      static_cast<void>(sam::load(bytes));
    } catch (const error&) {
      ++refused;
    }
  }
  CHECK(refused > 100);
}

TEST_CASE("a model file of version 1 says what it lacks") {
  const auto plain = two_tensors().bytes();
  CHECK(mentions(error_of([&] { static_cast<void>(sam::load(plain)); }),
                 {"model in memory", "'format'", "convert.py"}));

  const std::vector<std::byte> sound = tiny_bytes();
  const auto load = [&](const char* key, auto value) {
    file_builder file = parsed(sound);
    nlohmann::json config =
        nlohmann::json::parse(file.header["__metadata__"]["config"].get<std::string>());
    config[nlohmann::json::json_pointer(key)] = value;
    file.header["__metadata__"]["config"] = config.dump();
    const auto bytes = file.bytes();
    static_cast<void>(sam::load(bytes));
  };
  const auto changed = [&](const char* key, auto value) {
    return error_of([&] { load(key, value); });
  };
  CHECK(mentions(changed("/image_size", 1 << 30), {"image_size", "1073741824"}));
  CHECK(mentions(changed("/image_size", "big"), {"image_size"}));
  CHECK(mentions(changed("/stages/1/heads", 7), {"stages[1]", "7 heads"}));
  CHECK(mentions(changed("/stages/1/window", 1000), {"stages[1]", "window"}));
  CHECK(mentions(changed("/stages/1/depth", 3), {"layers.1.blocks.2", "missing"}));
  CHECK(mentions(changed("/stages/0/dim", 24), {"image_encoder", "expected"}));
  CHECK(mentions(changed("/stages/0/stride", 1), {"masks"}));
  CHECK(mentions(changed("/decoder/heads", 5), {"heads"}));
  CHECK(mentions(changed("/decoder/depth", 0), {"decoder.depth"}));
  CHECK(mentions(changed("/decoder", 3), {"decoder"}));
  // What has a place in version 2 alone does not count.
  CHECK_NOTHROW(load("/image_encoder", 3));
  CHECK_NOTHROW(load("/input", "area"));
}

namespace {

/// The tiny model, whose file is of version 1, as one of version 2, with one value of its
/// configuration changed.
std::vector<std::byte> version2(const char* key = nullptr, const nlohmann::json& value = {}) {
  file_builder file = parsed(tiny_bytes());
  nlohmann::json& metadata = file.header["__metadata__"];
  const nlohmann::json old = nlohmann::json::parse(metadata["config"].get<std::string>());
  nlohmann::json config;
  config["mask_in_chans"] = old["mask_in_chans"];
  config["decoder"] = old["decoder"];
  config["decoder"]["norm_epsilon"] = 1e-5;
  for (const char* moved : {"image_size", "pixel_channels", "stages", "embed_dim"})
    config["image_encoder"][moved] = old[moved];
  config["image_encoder"]["kind"] = "tiny_vit";
  config["image_encoder"]["stem"] = "pointwise";
  config["input"] = {{"frame", old["image_size"]},
                     {"resize", "area"},
                     {"normalize", "range"},
                     {"coordinates", "truncated"}};
  if (key) config[nlohmann::json::json_pointer(key)] = value;
  metadata["config"] = config.dump();
  metadata["format_version"] = "2";
  return file.bytes();
}

}  // namespace

TEST_CASE("a model file of version 2 is the same model, and says what is wrong with it") {
  const std::vector<std::byte> same = version2();
  CHECK(answer_of(sam::load(same)) == answer_of(sam::load(tiny_bytes())));

  const auto refused = [](const char* key, const nlohmann::json& value) {
    const std::vector<std::byte> bytes = version2(key, value);
    return error_of([&] { static_cast<void>(sam::load(bytes)); });
  };
  CHECK(mentions(refused("/image_encoder/kind", "resnet"),
                 {"image_encoder.kind", "'resnet'", "tiny_vit"}));
  CHECK(mentions(refused("/image_encoder/stem", "conical"),
                 {"image_encoder.stem", "pointwise, strided"}));
  CHECK(mentions(refused("/image_encoder/stem", "strided"), {"image_size is 52", "16"}));
  CHECK(mentions(refused("/image_encoder", 3), {"image_encoder"}));
  CHECK(mentions(refused("/input/frame", 51), {"input.frame", "51", "52"}));
  CHECK(mentions(refused("/input/frame", 0), {"input.frame"}));
  CHECK(mentions(refused("/input/frame", nullptr), {"input.frame"}));
  CHECK(mentions(refused("/input/resize", "nearest"), {"input.resize", "area, antialiased"}));
  CHECK(mentions(refused("/input/coordinates", 1), {"input.coordinates"}));
  CHECK(mentions(refused("/input/normalize", "statistics"), {"input.mean"}));
  nlohmann::json input = {{"frame", 52},
                          {"resize", "area"},
                          {"normalize", "statistics"},
                          {"coordinates", "exact"},
                          {"mean", {1, 2, 3}},
                          {"deviation", {1, 0, 1}}};
  CHECK(mentions(refused("/input", input), {"input.deviation", "[1,0,1]", "3 numbers"}));
  input["deviation"] = {1, 2, 1};
  const std::vector<std::byte> good = version2("/input", input);
  CHECK(sam::load(good).config.input.normalize->deviation[1] == 2);
  CHECK(mentions(refused("/decoder/norm_epsilon", "1e-5"), {"decoder.norm_epsilon"}));
}

TEST_CASE("files that cannot be opened") {
  CHECK(mentions(error_of([] { safetensors{std::filesystem::path("/nowhere/m.safetensors")}; }),
                 {"/nowhere/m.safetensors", "No such file"}));
  CHECK(mentions(error_of([] { safetensors{std::filesystem::temp_directory_path()}; }),
                 {"directory"}));
}

}  // namespace microtome::tests
