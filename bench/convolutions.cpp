// 3x3 convolutions of stride 1, as plain sums and by Winograd's algorithm, in turns: the median of
// so many runs of each, and their ratio.
//
//     microtome_bench_convolutions [THREADS [RUNS]]
#include <algorithm>
#include <array>
#include <chrono>
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
  std::printf("channels, map            plain ms  GFLOP/s  Winograd ms   ratio\n");
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
    std::array<convolution3x3, 2> ways;
    for (const bool winograd : {false, true})
      ways[winograd] =
          convolution3x3(weights(file, precision::fp32, nullptr, sparsity::automatic, winograd),
                         "conv", l.in, l.out);
    workspace ws(threads, ways[1].memory(size), 0);
    std::array<std::vector<double>, 2> ms;
    for (int run = -1; run < runs; ++run)
      for (std::size_t way = 0; way < 2; ++way) {
        const auto start = clock_type::now();
        ways[way](ws, size, x, y);
        const std::chrono::duration<double, std::milli> took = clock_type::now() - start;
        if (run >= 0) ms[way].push_back(took.count());
      }
    const double plain = median(ms[0]), fast = median(ms[1]);
    std::printf("%4td to %4td, %3td x %3td    %8.2f  %7.1f  %11.2f  %6.2f\n", l.in, l.out, l.side,
                l.side, plain, 2e-6 * static_cast<double>(ways[0].macs() * size.tokens()) / plain,
                fast, plain / fast);
  }
}
