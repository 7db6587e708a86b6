// Products of one tile on the calling thread: C [m, n] = A [m, k] B [k, n], or added to C.
//
// A is row-major. B is a panel: [k][ldb] for float and double; for bfloat16, whose products take
// pairs of k, [k / 2][ldb][2] with k even. C is in the type sums are formed in.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

namespace spectralx::cpu {

// Columns of a panel: two vectors of sixteen floats.
constexpr int64_t kPanel = 32;

// What sums, norms, softmaxes and logarithms of T are formed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether float tiles are multiplied by micro-kernels rather than by a BLAS, call by call.
bool multiplies_tiles();

// Whether this processor multiplies bfloat16 itself; elsewhere float products are faster.
bool multiplies_bfloat16();

// Whether it does so in a matrix unit (AMX), whose tiles hold 32 of the inner dimension.
bool has_matrix_unit();

// The inner dimension, k or more, that suits products of Op: whole pairs of bfloat16, or whole tiles of a
// matrix unit, where 394 takes nine times as long as 416. What is more than k has to be zeros, in one operand
// at least, and finite in the other.
template <typename Op>
int64_t padded_depth(int64_t k) {
  const int64_t step = sizeof(Op) != 2 ? 1 : has_matrix_unit() && k > kPanel ? kPanel : 2;
  return (k + step - 1) / step * step;
}

void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool accumulate);
void product(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b,
             int64_t ldb, double* c, int64_t ldc, bool accumulate);
void product(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
             const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate);

// To be called by a thread after its last product: gives a matrix unit's tiles back.
void end_products();

}  // namespace spectralx::cpu
