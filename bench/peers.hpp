/// Other libraries' matrix products, where they were found: C (m, n) = A (m, k) B (k, n) + bias in
/// fp32 on one thread, B prepared beforehand as each library likes it.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#ifdef MICROTOME_BENCH_OPENBLAS
#include <cblas.h>
#endif
#ifdef MICROTOME_BENCH_ONEDNN
#include <oneapi/dnnl/dnnl.hpp>
#endif
#ifdef MICROTOME_BENCH_XNNPACK
#include <xnnpack.h>
#endif

#include "support.hpp"

namespace microtome::bench {

struct gemm_operands {
  index_t m, n, k;
  const float *a, *b, *bias;
  float* c;
};

struct gemm_peer {
  const char* name;
  /// Prepares a product; the result computes it.
  std::function<void()> (*prepare)(const gemm_operands&);
};

#ifdef MICROTOME_BENCH_OPENBLAS
inline std::function<void()> openblas(const gemm_operands& o) {
  openblas_set_num_threads(1);
  return [o] {
    for (index_t i = 0; i < o.m; ++i) std::copy_n(o.bias, o.n, o.c + i * o.n);
    const auto m = static_cast<int>(o.m), n = static_cast<int>(o.n), k = static_cast<int>(o.k);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, k, 1.0f, o.a, k, o.b, n, 1.0f, o.c,
                n);
  };
}
#endif

#ifdef MICROTOME_BENCH_ONEDNN
inline std::function<void()> onednn(const gemm_operands& o) {
  using namespace dnnl;
  using tag = memory::format_tag;
  const engine cpu(engine::kind::cpu, 0);
  const auto type = memory::data_type::f32;
  const memory::desc a({o.m, o.k}, type, tag::ab), c({o.m, o.n}, type, tag::ab);
  const memory::desc bias({o.n}, type, tag::a), b({o.n, o.k}, type, tag::ba);
  const memory::desc any({o.n, o.k}, type, tag::any);
  const inner_product_forward::primitive_desc description(
      inner_product_forward::desc(prop_kind::forward_inference, a, any, bias, c), cpu);
  memory packed(description.weights_desc(), cpu);
  stream queue(cpu);
  memory plain(b, cpu, const_cast<float*>(o.b));
  reorder(plain, packed).execute(queue, plain, packed);
  queue.wait();
  const std::unordered_map<int, memory> arguments{
      {DNNL_ARG_SRC, memory(a, cpu, const_cast<float*>(o.a))},
      {DNNL_ARG_WEIGHTS, packed},
      {DNNL_ARG_BIAS, memory(bias, cpu, const_cast<float*>(o.bias))},
      {DNNL_ARG_DST, memory(c, cpu, o.c)}};
  return [product = inner_product_forward(description), queue, arguments]() mutable {
    product.execute(queue, arguments);
    queue.wait();
  };
}
#endif

#ifdef MICROTOME_BENCH_XNNPACK
inline std::function<void()> xnnpack(const gemm_operands& o) {
  xnn_initialize(nullptr);
  const auto n = static_cast<std::size_t>(o.n), k = static_cast<std::size_t>(o.k);
  xnn_operator_t raw = nullptr;
  const float infinity = std::numeric_limits<float>::infinity();
  xnn_create_fully_connected_nc_f32(k, n, k, n, o.b, o.bias, -infinity, infinity,
                                    XNN_FLAG_TRANSPOSE_WEIGHTS, &raw);
  const std::shared_ptr<xnn_operator> product(raw, xnn_delete_operator);
  xnn_setup_fully_connected_nc_f32(raw, static_cast<std::size_t>(o.m), o.a, o.c, nullptr);
  return [product] { xnn_run_operator(product.get(), nullptr); };
}
#endif

inline const std::vector<gemm_peer>& gemm_peers() {
  static const std::vector<gemm_peer> all{
#ifdef MICROTOME_BENCH_ONEDNN
      {"onednn", onednn},
#endif
#ifdef MICROTOME_BENCH_OPENBLAS
      {"openblas", openblas},
#endif
#ifdef MICROTOME_BENCH_XNNPACK
      {"xnnpack", xnnpack},
#endif
  };
  return all;
}

/// Times a peer, after its result was compared with ours.
inline void run_peer(benchmark::State& state, const gemm_peer& peer, index_t m, index_t n,
                     index_t k) {
  const tensor<float> a = values({m, k}), b = values({k, n}), bias = values({n});
  tensor<float> c(shape{m, n}), ours(shape{m, n});
  const auto product = peer.prepare({m, n, k, a.data(), b.data(), bias.data(), c.data()});
  product();
  tensor<std::byte> packed(shape{kernel.matrix(kernels::precision::fp32).packed_bytes(k, n)});
  kernel.matrix(kernels::precision::fp32).pack_b(k, n, b.data(), n, 1, nullptr, packed.data());
  const auto a_rows = rows_of(a.data(), m, k);
  const auto c_rows = rows_of(ours.data(), m, n);
  kernel.matrix(kernels::precision::fp32)
      .gemm({.m = m,
             .n = n,
             .k = k,
             .a = a_rows.data(),
             .b = packed.data(),
             .c = c_rows.data(),
             .bias = bias.data()});
  for (index_t i = 0; i < c.size(); ++i)
    if (!(std::abs(c[i] - ours[i]) < 1e-3f)) {
      state.SkipWithError("computes something else");
      return;
    }
  measure(state, {2.0 * static_cast<double>(m * n * k), floats(m * k + k * n + m * n)}, product);
}

}  // namespace microtome::bench
