#pragma once

#include <kernels/macros_off.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <microtome/core/tensor.hpp>

namespace microtome {

/// Threads that `threads = 0` stands for: what OpenMP would use (OMP_NUM_THREADS, the CPUs
/// allowed), at most 1024, beyond which systems refuse to start more.
inline int default_threads() {
#ifdef _OPENMP
  return std::clamp(omp_get_max_threads(), 1, 1024);
#else
  return 1;
#endif
}

/// Calls f(task, thread) for every task in [0, tasks), 0 <= thread < threads, each task once. Tasks
/// are handed out as threads become free; they write disjoint memory and never reduce across tasks,
/// so results do not depend on the number of threads. What the first f that throws has thrown comes
/// out of here, after all other tasks.
template <class Function>
void parallel_for(int threads, index_t tasks, Function&& f) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
    std::exception_ptr thrown;  // an exception must not leave what OpenMP runs
    std::atomic_flag taken;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (index_t task = 0; task < tasks; ++task) {
      try {
        f(task, omp_get_thread_num());
      } catch (...) {
        if (!taken.test_and_set()) thrown = std::current_exception();
      }
    }
    if (thrown) std::rethrow_exception(thrown);
    return;
  }
#endif
  static_cast<void>(threads);
  for (index_t task = 0; task < tasks; ++task) f(task, 0);
}

}  // namespace microtome

#include <kernels/macros_on.hpp>
