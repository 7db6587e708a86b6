// spectralx::gather_norm and gather_norm_mix on the CPU, with their gradients. Maths:
// spectralx_kernels/refine/README.md, "Folding the gather".
//
// Rows are normed before they are gathered, and their gradients summed by token before the norm's own.
// Sums over keys, tokens and images run in a fixed order: the number of threads changes no bit.
#include "cpu/torch.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/refine/kernels.h"
#include "cpu/refine/types.h"

namespace {

using at::Tensor;
using namespace spectralx::cpu;

constexpr int64_t kRows = 32;      // tokens of a task
constexpr int64_t kColumns = 128;  // columns of a task that sums over keys

// tokens [B, N, H] in the type of the kernels, rows anywhere; match [B, K]; norm wide [H].
struct Gather {
  Tensor tokens, match, weight, bias;
  double eps;
  at::ScalarType stored;  // of the operator's tensors
  int64_t batch, count, width, keys;

  Gather(const Tensor& tokens_, const Tensor& match_, const Tensor& norm_weight,
         const Tensor& norm_bias, double norm_eps)
      : eps(norm_eps), stored(tokens_.scalar_type()) {
    TORCH_CHECK_VALUE(tokens_.dim() == 3 && match_.dim() == 2 && match_.size(0) == tokens_.size(0),
                      "tokens, match: got shapes ", tokens_.sizes(), ", ", match_.sizes(),
                      ", expected [batch, tokens, width] and [batch, keys]");
    batch = tokens_.size(0), count = tokens_.size(1), width = tokens_.size(2);
    keys = match_.size(1);
    const auto type = kernel_type(stored);
    const auto wide = type == at::kDouble ? at::kDouble : at::kFloat;
    tokens = tokens_.to(type);
    if (width > 0 && tokens.stride(2) != 1) tokens = tokens.contiguous();
    match = match_.to(at::kLong).contiguous();
    const int64_t* m = match.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < batch * keys; ++i) {
      TORCH_CHECK_VALUE(m[i] >= 0 && m[i] < count, "match: got ", m[i], ", expected 0 to ",
                        count - 1);
    }
    for (const Tensor* norm : {&norm_weight, &norm_bias}) {
      TORCH_CHECK_VALUE(norm->sizes() == at::IntArrayRef({width}),
                        "norm_weight, norm_bias: got shape ", norm->sizes(), ", expected [", width,
                        "]");
    }
    weight = norm_weight.to(wide).contiguous();
    bias = norm_bias.to(wide).contiguous();
  }

  at::TensorOptions options() const { return tokens.options(); }
  at::TensorOptions wide() const { return weight.options(); }

  template <typename Op>
  const Op* row(int64_t image, int64_t token) const {
    return tokens.const_data_ptr<Op>() + image * tokens.stride(0) + token * tokens.stride(1);
  }
};

template <typename Op>
Tensor normed(const Gather& g) {
  using W = Wide<Op>;
  const auto& kernels = refine_kernels<Op>();
  const Tensor out = at::empty({g.batch, g.count, g.width}, g.options());
  Op* to = out.mutable_data_ptr<Op>();
  at::parallel_for(0, g.batch * g.count, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernels.normalise(g.row<Op>(t / g.count, t % g.count), g.width, static_cast<W>(g.eps),
                        g.weight.const_data_ptr<W>(), g.bias.const_data_ptr<W>(),
                        to + t * g.width);
    }
  });
  return out;
}

// summed [B, N, columns] = for each token the sum of the rows of from [B or 1, K, columns] whose keys
// it matches.
template <typename T, typename W, typename Add>
Tensor sum_by_token(const Gather& g, const Tensor& from, Add add) {
  const int64_t columns = from.size(2), blocks = (columns + kColumns - 1) / kColumns;
  const int64_t stride = from.size(0) == 1 ? 0 : from.stride(0);
  const Tensor summed = at::zeros({g.batch, g.count, columns}, g.wide());
  const int64_t* match = g.match.const_data_ptr<int64_t>();
  W* to = summed.mutable_data_ptr<W>();
  at::parallel_for(0, g.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * kColumns;
      const int64_t width = std::min(kColumns, columns - first);
      const T* rows = from.const_data_ptr<T>() + image * stride + first;
      for (int64_t k = 0; k < g.keys; ++k) {
        const int64_t token = image * g.count + match[image * g.keys + k];
        add(rows + k * columns, width, to + token * columns + first);
      }
    }
  });
  return summed;
}

// From the gradient of the normed rows, wide [B, N, H]: those of tokens (undefined if not wanted),
// weight and bias.
struct NormGradients {
  Tensor tokens, weight, bias;
};

template <typename Op>
NormGradients norm_gradients(const Gather& g, const Tensor& grad, bool want_tokens) {
  using W = Wide<Op>;
  const auto& kernels = refine_kernels<Op>();
  NormGradients found;
  if (want_tokens) found.tokens = at::empty({g.batch, g.count, g.width}, g.options());
  const int64_t rows = g.batch * g.count, blocks = (rows + kRows - 1) / kRows;
  const Tensor parts = at::zeros({blocks, 2, g.width}, g.wide());
  const W* from = grad.const_data_ptr<W>();
  Op* to = want_tokens ? found.tokens.mutable_data_ptr<Op>() : nullptr;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      W* part = parts.mutable_data_ptr<W>() + block * 2 * g.width;
      for (int64_t t = block * kRows; t < std::min(rows, (block + 1) * kRows); ++t) {
        kernels.normalise_backward(g.row<Op>(t / g.count, t % g.count), from + t * g.width, g.width,
                                   static_cast<W>(g.eps), g.weight.const_data_ptr<W>(),
                                   to ? to + t * g.width : nullptr, part, part + g.width);
      }
    }
  });
  found.weight = at::zeros({g.width}, g.wide());
  found.bias = at::zeros({g.width}, g.wide());
  for (int64_t block = 0; block < blocks; ++block) {
    const W* part = parts.const_data_ptr<W>() + block * 2 * g.width;
    kernels.add_wide(part, g.width, found.weight.template mutable_data_ptr<W>());
    kernels.add_wide(part + g.width, g.width, found.bias.template mutable_data_ptr<W>());
  }
  return found;
}

void check_grads(const c10::List<std::optional<Tensor>>& output_grads,
                 const c10::List<bool>& output_mask, size_t inputs, at::IntArrayRef shape) {
  TORCH_CHECK(output_grads.size() == 1, "output_grads: got ", output_grads.size(), ", expected 1");
  TORCH_CHECK(output_mask.size() == inputs, "output_mask: got ", output_mask.size(), ", expected ",
              inputs);
  const std::optional<Tensor> grad = output_grads[0];
  TORCH_CHECK_VALUE(!grad.has_value() || grad->sizes() == shape,
                    "output_grads: expected shape ", shape);
}

// The gradients wanted, in the order and dtype of the inputs; zeros where there is none.
std::vector<Tensor> wanted(const c10::List<bool>& mask, at::TensorList inputs,
                           at::TensorList computed, at::IntArrayRef places) {
  std::vector<Tensor> found;
  for (size_t i = 0; i < places.size(); ++i) {
    if (!mask[places[i]]) continue;
    found.push_back(computed.empty() ? at::zeros(inputs[i].sizes(), inputs[i].options())
                                     : computed[i].to(inputs[i].scalar_type()));
  }
  return found;
}

Tensor gather_norm(const Tensor& tokens, const Tensor& match, const Tensor& norm_weight,
                   const Tensor& norm_bias, double norm_eps) {
  const Gather g(tokens, match, norm_weight, norm_bias, norm_eps);
  return with_kernel_type(g.tokens.scalar_type(), [&](auto tag) {
    using Op = decltype(tag);
    const Tensor rows = normed<Op>(g);
    const Tensor out = at::empty({g.batch, g.keys, g.width}, g.options());
    const Op* from = rows.const_data_ptr<Op>();
    Op* to = out.mutable_data_ptr<Op>();
    const int64_t* index = g.match.const_data_ptr<int64_t>();
    at::parallel_for(0, g.batch * g.keys, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        std::memcpy(to + k * g.width, from + (k / g.keys * g.count + index[k]) * g.width,
                    g.width * sizeof(Op));
      }
    });
    return out.to(g.stored);
  });
}

std::vector<Tensor> gather_norm_backward(const c10::List<std::optional<Tensor>>& output_grads,
                                         const Tensor& tokens, const Tensor& match,
                                         const Tensor& norm_weight, const Tensor& norm_bias,
                                         double norm_eps, at::TensorList /*saved*/,
                                         const c10::List<bool>& output_mask) {
  const Gather g(tokens, match, norm_weight, norm_bias, norm_eps);
  check_grads(output_grads, output_mask, 5, {g.batch, g.keys, g.width});
  const std::vector<Tensor> inputs = {tokens, norm_weight, norm_bias};
  const std::optional<Tensor> upstream = output_grads[0];
  if (!upstream.has_value()) return wanted(output_mask, inputs, {}, {0, 2, 3});
  return with_kernel_type(g.tokens.scalar_type(), [&](auto tag) {
    using Op = decltype(tag);
    const Tensor grad = upstream->to(g.tokens.scalar_type()).contiguous();
    const Tensor summed = sum_by_token<Op, Wide<Op>>(g, grad, refine_kernels<Op>().add);
    const NormGradients found = norm_gradients<Op>(g, summed, output_mask[0]);
    return wanted(output_mask, inputs, {found.tokens, found.weight, found.bias}, {0, 2, 3});
  });
}

void check_mixing(const Gather& g, const Tensor& mixing) {
  TORCH_CHECK_VALUE(mixing.dim() == 2 && mixing.size(1) == g.keys, "mixing: got shape ",
                    mixing.sizes(), ", expected [mixed, ", g.keys, "]");
}

// The columns of mixing [T, K] added up by token and transposed: [B, N, T], rounded to the type of the
// kernels.
template <typename Op>
Tensor folded(const Gather& g, const Tensor& mixing) {
  using W = Wide<Op>;
  const Tensor columns = mixing.t().to(g.wide().dtype()).contiguous().unsqueeze(0);
  return sum_by_token<W, W>(g, columns, refine_kernels<Op>().add_wide).to(g.options().dtype());
}

Tensor gather_norm_mix(const Tensor& tokens, const Tensor& match, const Tensor& norm_weight,
                       const Tensor& norm_bias, const Tensor& mixing, double norm_eps) {
  const Gather g(tokens, match, norm_weight, norm_bias, norm_eps);
  check_mixing(g, mixing);
  return with_kernel_type(g.tokens.scalar_type(), [&](auto tag) {
    using Op = decltype(tag);
    const Tensor mixed = at::bmm(folded<Op>(g, mixing).transpose(1, 2), normed<Op>(g));
    return mixed.to(g.stored).contiguous();
  });
}

// mixing's gradient [T, K]: column k is the sum over the images of by_token [B, N, T] at k's token.
template <typename W, typename Add>
Tensor mixing_gradient(const Gather& g, const Tensor& by_token, Add add) {
  const int64_t mixed = by_token.size(2);
  const Tensor columns = at::zeros({g.keys, mixed}, g.wide());
  const int64_t* match = g.match.const_data_ptr<int64_t>();
  at::parallel_for(0, g.keys, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t image = 0; image < g.batch; ++image) {
        add(by_token.const_data_ptr<W>() + (image * g.count + match[image * g.keys + k]) * mixed,
            mixed, columns.mutable_data_ptr<Wide<W>>() + k * mixed);
      }
    }
  });
  return columns.t().contiguous();
}

std::vector<Tensor> gather_norm_mix_backward(const c10::List<std::optional<Tensor>>& output_grads,
                                             const Tensor& tokens, const Tensor& match,
                                             const Tensor& norm_weight, const Tensor& norm_bias,
                                             const Tensor& mixing, double norm_eps,
                                             at::TensorList /*saved*/,
                                             const c10::List<bool>& output_mask) {
  const Gather g(tokens, match, norm_weight, norm_bias, norm_eps);
  check_mixing(g, mixing);
  check_grads(output_grads, output_mask, 6, {g.batch, mixing.size(0), g.width});
  const std::vector<Tensor> inputs = {tokens, norm_weight, norm_bias, mixing};
  const std::optional<Tensor> upstream = output_grads[0];
  if (!upstream.has_value()) return wanted(output_mask, inputs, {}, {0, 2, 3, 4});
  return with_kernel_type(g.tokens.scalar_type(), [&](auto tag) {
    using Op = decltype(tag);
    const Tensor grad = upstream->to(g.tokens.scalar_type()).contiguous();
    NormGradients found;
    Tensor mixing_grad;
    if (output_mask[0] || output_mask[2] || output_mask[3]) {
      const Tensor summed = at::bmm(folded<Op>(g, mixing), grad);
      found = norm_gradients<Op>(g, summed.to(g.wide().dtype()), output_mask[0]);
    }
    if (output_mask[4]) {
      const Tensor by_token = at::bmm(normed<Op>(g), grad.transpose(1, 2)).contiguous();
      mixing_grad = mixing_gradient<Op>(g, by_token, refine_kernels<Op>().add);
    }
    return wanted(output_mask, inputs, {found.tokens, found.weight, found.bias, mixing_grad},
                  {0, 2, 3, 4});
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("gather_norm", &gather_norm);
  m.impl("gather_norm_backward", &gather_norm_backward);
  m.impl("gather_norm_mix", &gather_norm_mix);
  m.impl("gather_norm_mix_backward", &gather_norm_mix_backward);
}
