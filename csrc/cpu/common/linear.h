// Linear layers by oneDNN where it is faster than what ATen reaches by itself.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "cpu/instruction_sets.h"

#if AT_PARALLEL_OPENMP
#include <omp.h>
#endif

namespace spectralx::cpu {

// What the products of this dtype are taken in: itself where the processor multiplies it, else
// float.
inline at::ScalarType product_type(at::ScalarType type) {
  if (type == at::kDouble) return at::kDouble;
#if SPECTRALX_X86_TARGETS
  static const bool bfloat16 = __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool bfloat16 = true;
#endif
  return type == at::kBFloat16 && bfloat16 ? at::kBFloat16 : at::kFloat;
}

// x [m, k] times the transpose of weight [n, k], plus bias [n], then GELU if `gelu`, or plus addend
// [m, n]: [m, n]. oneDNN has a fast kernel for plainly laid out weights only, in float for their
// transposes too.
inline at::Tensor linear_layer(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias = std::nullopt, bool gelu = false,
                               const std::optional<at::Tensor>& addend = std::nullopt) {
  using Pointwise = at::Tensor(const at::Tensor&, const at::Tensor&,
                               const std::optional<at::Tensor>&, std::string_view,
                               c10::List<std::optional<at::Scalar>>,
                               std::optional<std::string_view>);
  using Binary = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const std::optional<at::Tensor>&, std::string_view);
  static const std::optional<c10::OperatorHandle> pointwise =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  static const std::optional<c10::OperatorHandle> binary =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", "binary"});
  const auto type = x.scalar_type();
  const bool taken = type == at::kFloat || (type == at::kBFloat16 && product_type(type) == type);
  const bool plain = weight.is_contiguous() || (type == at::kFloat && weight.t().is_contiguous());
  if (taken && pointwise.has_value() && binary.has_value() && x.numel() > 0 && plain &&
      at::globalContext().userEnabledMkldnn()) {
    // oneDNN reads a strided bias as if it were contiguous.
    const std::optional<at::Tensor> dense = bias.has_value() ? bias->contiguous() : bias;
    if (addend.has_value()) {
      return binary->typed<Binary>().call(x, *addend, weight, dense, "add");
    }
    return pointwise->typed<Pointwise>().call(x, weight, dense, gelu ? "gelu" : "none",
                                              c10::List<std::optional<at::Scalar>>(),
                                              gelu ? std::optional<std::string_view>("none")
                                                   : std::nullopt);
  }
  at::Tensor out = at::linear(x, weight, bias);
  if (gelu) return at::gelu(out);
  return addend.has_value() ? out.add_(*addend) : out;
}

// dout [m, n] times weight [n, k]: the gradient of a layer's input. oneDNN's float product takes two
// thirds to nine tenths of the time of ATen's; below float ATen's is oneDNN's.
inline at::Tensor input_gradient(const at::Tensor& dout, const at::Tensor& turned_weight) {
  return dout.scalar_type() == at::kFloat ? linear_layer(dout, turned_weight)
                                          : at::mm(dout, turned_weight.t());
}

// What `input_gradient` takes of a weight [n, k]: [k, n]. No copy: of a weight larger than what comes
// in, that takes as long as the product.
inline at::Tensor turned(const at::Tensor& weight) { return weight.t(); }

// The transpose of dout [m, n] times x [m, k]: the gradient of a layer's weight.
inline at::Tensor weight_gradient(const at::Tensor& dout, const at::Tensor& x) {
  if (dout.scalar_type() != at::kFloat) return at::mm(dout.t(), x);
  return linear_layer(dout.t().contiguous(), x.t());
}

// While it lives, vendors' products of the calling thread are planned for one thread: they may cut their
// sums by the number of threads there could be, even where they run on one.
struct OneThread {
#if AT_PARALLEL_OPENMP
  const int before = omp_get_max_threads();
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
#endif
};

// task(first, last) over `count` tasks in parallel, each on one thread with oneDNN's products in it: the
// number of threads changes no bit.
template <typename F>
void over_products(int64_t count, const F& task) {
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    const OneThread one;
    task(first, last);
  });
}

// [rows, width] of [.., width], and back: a layer's rows as `like` has its dimensions.
inline at::Tensor rows_of(const at::Tensor& x) {
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return x.reshape({rows, x.size(-1)}).contiguous();
}
inline at::Tensor with_last(const at::Tensor& rows, const at::Tensor& like) {
  auto shape = like.sizes().vec();
  shape.back() = rows.size(1);
  return rows.view(shape);
}

// A layer's weight [out, in] and bias [out].
inline void check_layer(const char* name, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, int64_t in) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == in, name, ": got shape ",
                    weight.sizes(), ", expected [out, ", in, "]");
  TORCH_CHECK_VALUE(!bias.has_value() || bias->sizes() == at::IntArrayRef({weight.size(0)}), name,
                    ": got a bias of shape ", bias.has_value() ? bias->sizes() : at::IntArrayRef(),
                    ", expected [", weight.size(0), "]");
}

}  // namespace spectralx::cpu
