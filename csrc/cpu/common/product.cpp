// Tile products by oneDNN's micro-kernels where torch was built with them and the processor has
// AVX-512, else by the BLAS behind ATen.
#include "cpu/torch.h"

#include "cpu/common/product.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#include <cpuid.h>
#endif

namespace spectralx::cpu {

namespace {

namespace blas = at::native::cpublas;

// A product of one number, tried once: torch says only by an exception that it lacks the kernels.
template <typename T>
bool micro_kernels_work() {
  if (!at::hasMKLDNN() || !at::globalContext().userEnabledMkldnn()) return false;
  try {
    const T a[2] = {T(3), T(0)}, b[2 * kPanel] = {T(2)};
    float c[kPanel] = {};
    blas::brgemm(1, kPanel, 2, 2, kPanel, kPanel, false, a, b, c);
    blas::brgemm_release(!std::is_same_v<T, float>);
    return c[0] == 6.0f;
  } catch (const c10::Error&) {
    return false;
  }
}

template <typename T>
void by_blas(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
             T* c, int64_t ldc, bool accumulate) {
  const auto matrix = [](const T* values, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<T*>(values), {rows, columns}, {stride, 1},
                         at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  };
  at::Tensor out = matrix(c, m, n, ldc);
  at::addmm_out(out, out, matrix(a, m, k, lda), matrix(b, k, n, ldb), accumulate ? 1 : 0);
}

}  // namespace

bool multiplies_tiles() {
  static const bool there =
      instruction_set() == InstructionSet::kAvx512 && micro_kernels_work<float>();
  return there;
}

bool multiplies_bfloat16() {
#if SPECTRALX_X86_TARGETS
  static const bool there = multiplies_tiles() && __builtin_cpu_supports("avx512bf16") &&
                            micro_kernels_work<c10::BFloat16>();
  return there;
#else
  return false;
#endif
}

bool has_matrix_unit() {
#if SPECTRALX_X86_TARGETS
  static const bool there = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;  // leaf 7, bit 22 of d: AMX-BF16
    return multiplies_bfloat16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1u) != 0;
  }();
  return there;
#else
  return false;
#endif
}

void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (multiplies_tiles()) {
    blas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c);
  } else {
    by_blas(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  }
}

void product(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
             int64_t ldb, double* c, int64_t ldc, bool accumulate) {
  by_blas(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
}

void product(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
             const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  blas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c);
}

void end_products() {
  if (multiplies_tiles()) blas::brgemm_release(multiplies_bfloat16());
}

}  // namespace spectralx::cpu
