// 3x3 convolutions of stride 1 in fp32 and in int8, as plain sums and by Winograd's algorithm, in
// turns: the median of so many runs of each, and their ratio. (In int8 it is 1 where the CPU has
// products of bytes, and both are plain sums.)
//
//     microtome_bench_convolutions [THREADS [RUNS]]
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <microtome/model_file/safetensors_writer.hpp>
#include <microtome/ops/convolution.hpp>

namespace {

using namespace microtome;
using clock_type = std::chrono::steady_clock;

tensor<float> noise(shape extents, float scale) {
  tensor<float> values(extents);
  std::uint32_t state = 1;
  for (float& v : values) {
    state = state * 1664525u + 1013904223u;
    v = scale * (static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f);
  }
  return values;
}

/// Makes int8 layers of all.
class whole_numbers : public layer_hook {
public:
  void load(layer_weight& layer) override {
    for (float& w : layer.values) w = std::nearbyint(w / 0.05f * 127);
    layer.inputs = precision::int8;
    layer.scale = tensor<float>(shape{layer.out()});
    for (float& s : layer.scale) s = 0.05f / 127;
    layer.input = {{2.0f / 255, 128}};
  }
};

double median(std::vector<double>& times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const int runs = argc > 2 ? std::max(1, std::atoi(argv[2])) : 9;
  struct layer {
    index_t in, out, side;
  };
  std::printf("%47s %31s\n%s\n", "fp32", "int8",
              "channels, map          plain ms  GFLOP/s  Winograd ms  ratio"
              "  plain ms  Winograd ms  ratio");
  for (const layer& l : {layer{32, 32, 256},
                         {64, 64, 128},
                         {64, 256, 128},
                         {128, 128, 64},
                         {128, 512, 64},
                         {256, 256, 64},
                         {256, 1024, 64},
                         {512, 512, 32}}) {
    safetensors_writer writer;
    writer.add("conv.weight", noise({l.out, l.in, 3, 3}, 0.05f));
    const std::vector<std::byte> bytes = writer.bytes();
    const safetensors file(bytes);
    const map_size size{l.side, l.side};
    const tensor<float> x = noise({size.tokens(), l.in}, 1.0f);
    tensor<float> y(shape{size.tokens(), l.out});
    whole_numbers quantized;
    std::array<convolution3x3, 4> ways;  // plain and fast in fp32, then in int8
    std::size_t scratch = 0;
    for (std::size_t way = 0; way < ways.size(); ++way) {
      layer_hook* hook = way >= 2 ? &quantized : nullptr;
      const weights read(file, precision::fp32, hook, sparsity::automatic, way % 2 == 1);
      ways[way] = convolution3x3(read, "conv", l.in, l.out);
      scratch = std::max(scratch, ways[way].scratch_bytes(size));
    }
    workspace ws(threads, ways[1].memory(size), scratch);
    std::array<std::vector<double>, 4> times;
    for (int run = -1; run < runs; ++run)
      for (std::size_t way = 0; way < ways.size(); ++way) {
        const auto start = clock_type::now();
        ways[way](ws, size, x, y);
        const std::chrono::duration<double, std::milli> took = clock_type::now() - start;
        if (run >= 0) times[way].push_back(took.count());
      }
    std::array<double, 4> ms;
    for (std::size_t way = 0; way < ways.size(); ++way) ms[way] = median(times[way]);
    const auto flops = 2e-6 * static_cast<double>(ways[0].macs() * size.tokens());
    std::printf("%4td to %4td, %3td x %3td %8.2f  %7.1f  %11.2f  %5.2f  %8.2f  %11.2f  %5.2f\n",
                l.in, l.out, l.side, l.side, ms[0], flops / ms[0], ms[1], ms[0] / ms[1], ms[2],
                ms[3], ms[2] / ms[3]);
  }
}
