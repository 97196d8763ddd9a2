/// LayerNorm over the channels of each token (Ba, Kiros and Hinton, 2016). Three passes over a row
/// that stays in L1; bound by loads.
#pragma once

#include "elementwise.hpp"
#include "reduce.hpp"

namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE {

template <activation Act>
inline void layer_norm_rows(const layer_norm_args& args) {
  const ptrdiff_t c = args.c;
  const float scale = 1.0f / static_cast<float>(c);
  for (ptrdiff_t row = 0; row < args.n; ++row) {
    const float* x = args.x[row];
    float* out = args.out[row];
    const float mean = scale * sum_of(c, x, 0.0f, [](batch sum, batch v) { return sum + v; });
    const batch centre(mean);
    const float squares = sum_of(c, x, mean, [centre](batch sum, batch v) {
      const batch d = v - centre;
      return fused(d, d, sum);
    });
    const float inverse = 1.0f / std::sqrt(std::fma(scale, squares, args.epsilon));

    const batch factor(inverse);
    const auto normalise = [&](batch v, batch gamma, batch beta) {
      return apply_batch<Act>(fused((v - centre) * factor, gamma, beta));
    };
    ptrdiff_t i = 0;
    for (; i + batch_lanes <= c; i += batch_lanes)
      normalise(batch::load_unaligned(x + i), batch::load_unaligned(args.gamma + i),
                batch::load_unaligned(args.beta + i))
          .store_unaligned(out + i);
    if (i < c)
      store_first(c - i,
                  normalise(load_first(c - i, x + i), load_first(c - i, args.gamma + i),
                            load_first(c - i, args.beta + i)),
                  out + i);
  }
}

inline void layer_norm(const layer_norm_args& args) {
  with_activation(args.act, [&]<activation Act>() { layer_norm_rows<Act>(args); });
}

}  // namespace microtome::kernels::MICROTOME_TARGET_NAMESPACE
