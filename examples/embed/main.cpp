// Segments one object of a PPM image (binary, "P6") and writes its mask as a PGM image:
//
//     embed model.safetensors image.ppm x0 y0 x1 y1 mask.pgm
#include <cstdlib>
#include <fstream>
#include <iostream>

#include <microtome/microtome.hpp>

int main(int argc, char** argv) try {
  if (argc != 8) throw microtome::error("usage: embed MODEL IMAGE.ppm X0 Y0 X1 Y1 MASK.pgm");
  std::ifstream in(argv[2], std::ios::binary);
  std::string magic;
  microtome::index_t width = 0, height = 0, largest = 0;
  in >> magic >> width >> height >> largest;
  in.get();
  if (!in || magic != "P6" || width < 1 || height < 1 || largest != 255 || width * height > 1 << 28)
    microtome::fail(argv[2], ": expected a binary PPM image of 8 bits");
  microtome::tensor<std::uint8_t> image(microtome::shape{height, width, 3});
  if (!in.read(reinterpret_cast<char*>(image.data()), image.size()))
    microtome::fail(argv[2], ": is cut off");

  const microtome::lite_medsam model = microtome::lite_medsam::load(argv[1]);
  microtome::session session(model);
  const microtome::pixel_box box{std::atol(argv[3]), std::atol(argv[4]), std::atol(argv[5]),
                                 std::atol(argv[6])};
  const microtome::label_map mask = microtome::segment(session, image, std::span(&box, 1));

  std::ofstream out(argv[7], std::ios::binary);
  out << "P5\n" << width << ' ' << height << "\n255\n";
  for (const std::uint16_t label : mask) out.put(label ? '\xff' : '\0');
  if (!out.flush()) microtome::fail(argv[7], ": cannot be written");
} catch (const std::exception& e) {
  std::cerr << e.what() << '\n';
  return 1;
}
