/// What the CPU that runs this program has, for the dispatch library alone: no kernel needs it.
#pragma once

#include <string>

#if defined(__x86_64__) || defined(__i386__) || (defined(_MSC_VER) && defined(_M_X64))
#define MICROTOME_CPU_X86
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_M_ARM64)
#include <windows.h>
#endif

namespace microtome::kernels::detail {

#if defined(MICROTOME_CPU_X86)

struct cpuid_registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

/// Zeros where the CPU has no such leaf.
inline cpuid_registers cpuid(unsigned leaf, unsigned part) {
  cpuid_registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuid(out, static_cast<int>(leaf & 0x80000000u));
  if (static_cast<unsigned>(out[0]) < leaf) return r;
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(part));
  r = {static_cast<unsigned>(out[0]), static_cast<unsigned>(out[1]), static_cast<unsigned>(out[2]),
       static_cast<unsigned>(out[3])};
#else
  __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

/// The vector state that the operating system saves: XCR0, zero where it saves none.
inline unsigned saved_state() {
  constexpr unsigned osxsave = 1u << 27;
  if (!(cpuid(1, 0).c & osxsave)) return 0;
#if defined(_MSC_VER)
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

/// Intel SDM, CPUID. A vector register that is not saved when another program runs is not there.
inline std::string find_cpu_features() {
  const cpuid_registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const unsigned state = saved_state();
  constexpr unsigned sse_avx = 0x6, avx512_state = 0xe6;
  const bool avx = (state & sse_avx) == sse_avx;
  const bool avx512 = (state & avx512_state) == avx512_state;
  const struct {
    const char* name;
    unsigned word, bit;
    bool usable;
  } features[] = {
      {"sse4_2", one.c, 20, true},
      {"fma", one.c, 12, avx},
      {"f16c", one.c, 29, avx},
      {"bmi1", seven.b, 3, avx},
      {"bmi2", seven.b, 8, avx},
      {"avx2", seven.b, 5, avx},
      {"avx512f", seven.b, 16, avx512},
      {"avx512bw", seven.b, 30, avx512},
      {"avx512dq", seven.b, 17, avx512},
      {"avx512vl", seven.b, 31, avx512},
      {"avx512cd", seven.b, 28, avx512},
      {"avx512_vnni", seven.c, 11, avx512},
      {"avx512_bf16", seven_one.a, 5, avx512},
  };
  std::string found;
  for (const auto& f : features)
    if (f.usable && (f.word >> f.bit & 1)) found.append(found.empty() ? "" : " ").append(f.name);
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

/// Linux, arch/arm64/include/uapi/asm/hwcap.h; written out since older headers lack the last two.
inline std::string find_cpu_features() {
  const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
  std::string found;
  if (one >> 1 & 1) found += "asimd";
  if (one >> 20 & 1) found += " asimddp";
  if (two >> 13 & 1) found += " i8mm";
  if (two >> 14 & 1) found += " bf16";
  return found;
}

#elif defined(__aarch64__) && defined(__APPLE__)

inline bool has(const char* name) {
  int value = 0;
  std::size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}

inline std::string find_cpu_features() {
  std::string found = "asimd";
  if (has("hw.optional.arm.FEAT_DotProd")) found += " asimddp";
  if (has("hw.optional.arm.FEAT_I8MM")) found += " i8mm";
  if (has("hw.optional.arm.FEAT_BF16")) found += " bf16";
  return found;
}

#elif defined(_M_ARM64)

inline std::string find_cpu_features() {
  constexpr DWORD dot_products = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
  return IsProcessorFeaturePresent(dot_products) ? "asimd asimddp" : "asimd";
}

#else

/// Nothing to be found: what is compiled is what runs.
inline std::string find_cpu_features() {
  return "";
}

#endif

}  // namespace microtome::kernels::detail
