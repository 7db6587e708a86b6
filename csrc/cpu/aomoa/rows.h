// Row kernels of AoMoA on the CPU: what lies between its matrix products.
//
// Every function works on `rows` rows that lie behind one another, on the calling thread; the caller
// splits the rows. They are compiled once for each instruction set (rows_*.cpp) and chosen at run
// time, so one binary runs everywhere and uses AVX-512 where there is some.
#pragma once

#include <cstdint>

namespace spectralx::cpu {

template <typename T>
struct RowKernels {
  const char* instruction_set;

  // x [rows, d] -> normed = (x - mean) * rstd and out = normed * weight + bias. normed may be null;
  // mean and rstd have one value a row.
  void (*layer_norm)(const T* x, int64_t rows, int64_t d, const T* weight, const T* bias, T eps,
                     T* normed, T* out, T* mean, T* rstd);

  // out = (x - mean) * rstd * weight + bias; with mean null x is normalised already.
  void (*affine)(const T* x, int64_t rows, int64_t d, const T* mean, const T* rstd, const T* weight,
                 const T* bias, T* out);

  // Gradient of layer_norm: x as in affine; adds to dx if `accumulate`; adds to dweight and dbias
  // [d], which may be null.
  void (*layer_norm_backward)(const T* grad, const T* x, int64_t rows, int64_t d, const T* mean,
                              const T* rstd, const T* weight, bool accumulate, T* dx, T* dweight,
                              T* dbias);

  // h [rows, n] = max(h + bias, 0), NaN kept.
  void (*bias_relu)(T* h, int64_t rows, int64_t n, const T* bias);

  // c [rows, r] = log of the sum over a row's slots s of gate * exp(y[position] + bias[expert]).
  // A row has `slots` entries in experts (-1: none), positions (rows of y) and gates.
  void (*combine)(const T* y, const T* bias, int64_t rows, int64_t r, int64_t slots,
                  const int32_t* experts, const int32_t* positions, const T* gates, T* c);

  // From dc [rows, r]: c as above, y becomes its own gradient, dgates [rows, slots].
  void (*combine_backward)(T* y, const T* bias, int64_t rows, int64_t r, int64_t slots,
                           const int32_t* experts, const int32_t* positions, const T* gates,
                           const T* c, const T* dc, T* dgates);

  // sums [n] += the columns of x [rows, n].
  void (*column_sums)(const T* x, int64_t rows, int64_t n, T* sums);
};

// The best table this processor runs.
template <typename T>
const RowKernels<T>& row_kernels();

// log(2.220446049250313e-16): a row that no expert takes.
constexpr double kLogEpsilon = -36.04365338911715;

}  // namespace spectralx::cpu
