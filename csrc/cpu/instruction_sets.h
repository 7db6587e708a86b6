// Run-time choice of the instruction set, for files that are compiled once for each.
//
// A file for one set includes all headers first, then opens SPECTRALX_TARGET: functions of headers
// keep the portable set, so the linker cannot hand an AVX-512 copy of one to older processors.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define SPECTRALX_X86_TARGETS 1
#else
#define SPECTRALX_X86_TARGETS 0
#endif

#define SPECTRALX_AVX2 SPECTRALX_TARGET("avx2,fma")
#define SPECTRALX_AVX512 SPECTRALX_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#define SPECTRALX_AVX512_BF16 \
  SPECTRALX_TARGET("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

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

constexpr const char* name_of(InstructionSet set) {
  return set == InstructionSet::kAvx512 ? "AVX-512"
         : set == InstructionSet::kAvx2 ? "AVX2"
                                        : "baseline";
}

// A room's table of kernels for one set, defined by SPECTRALX_TABLE in that set's file.
template <InstructionSet set, typename Table>
const Table& table_for();

// In a set's file: table_for of Kernels<types>, made by the room's `table`, which is constexpr.
#define SPECTRALX_TABLE(set, Kernels, ...)                                                      \
  template <>                                                                                  \
  const Kernels<__VA_ARGS__>& table_for<InstructionSet::set, Kernels<__VA_ARGS__>>() {          \
    static constexpr Kernels<__VA_ARGS__> kernels = table<__VA_ARGS__>(name_of(InstructionSet::set)); \
    return kernels;                                                                            \
  }

// The best table of kernels on T that this processor runs; of double there is the baseline's alone.
template <typename Table, typename T>
const Table& best_table() {
#if SPECTRALX_X86_TARGETS
  if constexpr (!std::is_same_v<T, double>) {
    if (instruction_set() == InstructionSet::kAvx512)
      return table_for<InstructionSet::kAvx512, Table>();
    if (instruction_set() == InstructionSet::kAvx2) return table_for<InstructionSet::kAvx2, Table>();
  }
#endif
  return table_for<InstructionSet::kBaseline, Table>();
}

// The same for kernels around products of Op. Those of bfloat16 are only for where
// `multiplies_bfloat16`, which implies AVX-512.
template <typename Table, typename Op>
const Table& best_product_table() {
#if SPECTRALX_X86_TARGETS
  if constexpr (sizeof(Op) == 2) return table_for<InstructionSet::kAvx512, Table>();
#endif
  return best_table<Table, Op>();
}

}  // namespace spectralx::cpu
