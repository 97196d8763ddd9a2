#include <kernels/active.hpp>
#include <kernels/reference.hpp>

#include "../support.hpp"

namespace microtome::tests {

TEST_CASE("depthwise 3x3 and 5x5 equal the scalar reference") {
  const kernels::table& kernel = kernels::active();
  for (const index_t side : {3, 5})
    for (const index_t channels : {1, 3, 8, 13, 16, 24, 37, 64})
      for (const index_t stride : {1, 2})
        for (const index_t n_out : {1, 2, 3, 5, 8, 17})
          for (const index_t first : {0, 1})
            for (const int missing : {0, 1, 4, 17, 24}) {  // bit i: row i is outside the map
              CAPTURE(side);
              CAPTURE(channels);
              CAPTURE(stride);
              CAPTURE(n_out);
              CAPTURE(first);
              const index_t n_in = (n_out - 1) * stride + 1 + first;
              const tensor<float> x = random_tensor({side, n_in * channels}, 1);
              const tensor<float> weights = random_tensor({side * side, channels}, 2);
              const tensor<float> bias = random_tensor({channels}, 3);
              tensor<float> fast(shape{n_out, channels}), slow(shape{n_out, channels});
              kernels::depthwise_args args{
                  .rows = {},
                  .n_in = n_in,
                  .n_out = n_out,
                  .first = first,
                  .stride = stride,
                  .channels = channels,
                  .weights = weights.data(),
                  .bias = bias.data(),
                  .out = fast.data(),
                  .act = missing & 1 ? kernels::activation::gelu : kernels::activation::none,
                  .side = side};
              for (int i = 0; i < side; ++i) args.rows[i] = missing >> i & 1 ? nullptr : x.row(i);
              kernel.depthwise(args);
              args.out = slow.data();
              kernels::reference::depthwise(args);
              CHECK(max_error(fast, slow) < 1e-5);
            }
}

}  // namespace microtome::tests
