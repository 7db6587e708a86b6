// Run-time choice of the instruction set, for files that are compiled once for each.
//
// A file for one set includes all headers first, then opens SPECTRALX_TARGET: functions of headers
// keep the portable set, so the linker cannot hand an AVX-512 copy of one to older processors.
#pragma once

#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define SPECTRALX_X86_TARGETS 1
#else
#define SPECTRALX_X86_TARGETS 0
#endif

#define SPECTRALX_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SPECTRALX_TARGET(set) \
  SPECTRALX_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define SPECTRALX_TARGET_END SPECTRALX_PRAGMA(clang attribute pop)
#else
#define SPECTRALX_TARGET(set) SPECTRALX_PRAGMA(GCC push_options) SPECTRALX_PRAGMA(GCC target(set))
#define SPECTRALX_TARGET_END SPECTRALX_PRAGMA(GCC pop_options)
#endif

namespace spectralx::cpu {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// What this processor runs; SPECTRALX_CPU_CAPABILITY=baseline|avx2|avx512 lowers it.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    InstructionSet found = InstructionSet::kBaseline;
#if SPECTRALX_X86_TARGETS
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found = InstructionSet::kAvx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found = InstructionSet::kAvx512;
      }
    }
#endif
    const char* wanted = std::getenv("SPECTRALX_CPU_CAPABILITY");
    if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return InstructionSet::kBaseline;
    if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && found != InstructionSet::kBaseline)
      return InstructionSet::kAvx2;
    return found;
  }();
  return chosen;
}

}  // namespace spectralx::cpu
