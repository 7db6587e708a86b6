// spectralx::aomoa on the CPU. Maths: spectralx_kernels/aomoa/README.md.
//
// Matrix products go to the BLAS behind ATen; what lies between them is rows.h. Tokens are taken in
// chunks, so nothing but the output grows with T, and the adapter's contribution is accumulated
// into the frozen product's output (and the frozen product's gradient into the adapter's) by the
// product itself. A row is one attribute of one token: [T, A, d] is [T * A, d].
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/aomoa/gating.h"
#include "cpu/aomoa/rows.h"

namespace {

using at::Tensor;
using spectralx::cpu::accumulation_type;
using spectralx::cpu::row_kernels;
using spectralx::cpu::RowKernels;

constexpr int64_t kChunk = 512;     // tokens whose intermediates exist at a time
constexpr int64_t kRowsOfTask = 64;  // rows of one task, and of one partial column sum

// The inputs after x, weight and bias, in the order of the schema, in the accumulation type.
struct Adapter {
  Tensor scaler, norm1_weight, norm1_bias, down, norm2_weight, norm2_bias, gate, gate_noise;
  std::optional<Tensor> noise;
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias, up;
  int64_t top_k;
  double norm_eps;
  int64_t attributes, experts, hidden, rank, d, out;  // d and out of one attribute

  // [A, out / A, r]: up with the rows of each attribute scaled.
  Tensor scaled_up() const { return scaler.view({attributes, out, 1}) * up; }
};

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

template <typename F>
void over_rows(int64_t rows, const F& task) {
  at::parallel_for(0, rows, kRowsOfTask,
                   [&](int64_t begin, int64_t end) { task(begin, end - begin); });
}

// Sums over rows that do not depend on the number of threads: one partial sum a block of rows,
// the blocks added in order. `task(begin, rows, partial...)` fills partials [n].
template <typename F>
void reduce_rows(int64_t rows, std::vector<Tensor> sums, const F& task) {
  const int64_t blocks = (rows + kRowsOfTask - 1) / kRowsOfTask;
  std::vector<Tensor> partials;
  for (const Tensor& sum : sums) {
    partials.push_back(at::zeros({blocks, sum.numel()}, sum.options()));
  }
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kRowsOfTask;
      task(begin, std::min(kRowsOfTask, rows - begin), block, partials);
    }
  });
  for (size_t i = 0; i < sums.size(); ++i) sums[i].view({-1}).add_(partials[i].sum(0));
}

// Which experts a chunk's rows take, the rows grouped by expert: counting, no sort.
struct Groups {
  int64_t slots;                    // a row's places for experts, top_k
  std::vector<int64_t> first;       // [E + 1], where an expert's group begins
  std::vector<int32_t> experts;     // [rows, slots], -1 where a gate is 0
  std::vector<int32_t> positions;   // [rows, slots], place in the grouped order
  std::vector<int32_t> rows;        // grouped order -> row

  template <typename T>
  Groups(const T* gates, int64_t rows_, int64_t experts_, int64_t slots_, std::vector<T>& values)
      : slots(slots_), first(experts_ + 1, 0), experts(rows_ * slots_, -1),
        positions(rows_ * slots_, 0) {
    values.assign(rows_ * slots_, T(0));
    for (int64_t i = 0; i < rows_; ++i) {
      int64_t slot = i * slots;
      for (int64_t e = 0; e < experts_; ++e) {
        const T gate = gates[i * experts_ + e];
        if (!(gate == T(0))) {  // NaN takes part
          experts[slot] = static_cast<int32_t>(e);
          values[slot++] = gate;
          ++first[e + 1];
        }
      }
    }
    for (int64_t e = 0; e < experts_; ++e) first[e + 1] += first[e];
    rows.resize(first[experts_]);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t s = i * slots; s < (i + 1) * slots; ++s) {
        if (experts[s] < 0) continue;
        positions[s] = static_cast<int32_t>(next[experts[s]]);
        rows[next[experts[s]]++] = static_cast<int32_t>(i);
      }
    }
  }

  Tensor of(const Tensor& grouped, int64_t expert) const {
    return grouped.narrow(0, first[expert], first[expert + 1] - first[expert]);
  }
  int64_t count(int64_t expert) const { return first[expert + 1] - first[expert]; }
};

// The experts on one chunk: from z [rows, r] to the combination c [rows, r], and back.
template <typename T>
struct Experts {
  const Adapter& p;
  const RowKernels<T>& kernels = row_kernels<T>();
  Tensor h;        // [rows, E * h] after relu, all experts: one product with wide output
  std::vector<T> gates;
  std::optional<Groups> groups;
  Tensor h_grouped, y;  // [grouped rows, h] and [grouped rows, r], y without its bias

  explicit Experts(const Adapter& adapter) : p(adapter) {}

  // gates_of_rows [rows, E].
  Tensor forward(const Tensor& z, const Tensor& gates_of_rows) {
    const int64_t rows = z.size(0), width = p.experts * p.hidden;
    h = at::mm(z, p.fc1_weight.view({width, p.rank}).t());
    over_rows(rows, [&](int64_t begin, int64_t count) {
      kernels.bias_relu(data<T>(h) + begin * width, count, width, data<T>(p.fc1_bias));
    });
    groups.emplace(data<T>(gates_of_rows), rows, p.experts, p.top_k, gates);
    const int64_t grouped = static_cast<int64_t>(groups->rows.size());
    h_grouped = at::empty({grouped, p.hidden}, z.options());
    y = at::empty({grouped, p.rank}, z.options());
    for (int64_t e = 0; e < p.experts; ++e) {
      if (groups->count(e) == 0) continue;
      for (int64_t i = groups->first[e]; i < groups->first[e + 1]; ++i) {
        const T* from = data<T>(h) + groups->rows[i] * width + e * p.hidden;
        std::copy(from, from + p.hidden, data<T>(h_grouped) + i * p.hidden);
      }
      Tensor y_of = groups->of(y, e);
      at::mm_out(y_of, groups->of(h_grouped, e), p.fc2_weight[e].t());
    }
    Tensor c = at::empty({rows, p.rank}, z.options());
    over_rows(rows, [&](int64_t begin, int64_t count) {
      kernels.combine(data<T>(y), data<T>(p.fc2_bias), count, p.rank, p.top_k,
                      groups->experts.data() + begin * p.top_k,
                      groups->positions.data() + begin * p.top_k, gates.data() + begin * p.top_k,
                      data<T>(c) + begin * p.rank);
    });
    return c;
  }

  // Gradients of z [rows, r] and of the gates [rows, E]; adds to the experts' weight gradients.
  std::tuple<Tensor, Tensor> backward(const Tensor& z, const Tensor& c, const Tensor& dc,
                                      Tensor& fc1_weight_grad, Tensor& fc1_bias_grad,
                                      Tensor& fc2_weight_grad, Tensor& fc2_bias_grad) {
    const int64_t rows = z.size(0), width = p.experts * p.hidden;
    std::vector<T> gates_grad(rows * p.top_k);
    over_rows(rows, [&](int64_t begin, int64_t count) {
      kernels.combine_backward(
          data<T>(y), data<T>(p.fc2_bias), count, p.rank, p.top_k,
          groups->experts.data() + begin * p.top_k, groups->positions.data() + begin * p.top_k,
          gates.data() + begin * p.top_k, data<T>(c) + begin * p.rank,
          data<T>(dc) + begin * p.rank, gates_grad.data() + begin * p.top_k);
    });
    Tensor dgates = at::zeros({rows, p.experts}, z.options());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t s = i * p.top_k; s < (i + 1) * p.top_k; ++s) {
        if (groups->experts[s] >= 0) {
          data<T>(dgates)[i * p.experts + groups->experts[s]] = gates_grad[s];
        }
      }
    }
    Tensor dh = at::zeros({rows, width}, z.options());
    for (int64_t e = 0; e < p.experts; ++e) {
      if (groups->count(e) == 0) continue;
      const Tensor dy = groups->of(y, e), h_of = groups->of(h_grouped, e);
      fc2_weight_grad[e].addmm_(dy.t(), h_of);
      Tensor bias_grad = fc2_bias_grad[e];
      reduce_rows(dy.size(0), {bias_grad},
                  [&](int64_t begin, int64_t count, int64_t block, std::vector<Tensor>& partials) {
                    kernels.column_sums(data<T>(dy) + begin * p.rank, count, p.rank,
                                        data<T>(partials[0]) + block * p.rank);
                  });
      Tensor dh_of = at::mm(dy, p.fc2_weight[e]);
      for (int64_t i = groups->first[e]; i < groups->first[e + 1]; ++i) {
        const T* from = data<T>(dh_of) + (i - groups->first[e]) * p.hidden;
        const T* active = data<T>(h_grouped) + i * p.hidden;
        T* to = data<T>(dh) + groups->rows[i] * width + e * p.hidden;
        for (int64_t j = 0; j < p.hidden; ++j) to[j] = active[j] > T(0) ? from[j] : T(0);
      }
    }
    fc1_weight_grad.view({width, p.rank}).addmm_(dh.t(), z);
    reduce_rows(rows, {fc1_bias_grad},
                [&](int64_t begin, int64_t count, int64_t block, std::vector<Tensor>& partials) {
                  kernels.column_sums(data<T>(dh) + begin * width, count, width,
                                      data<T>(partials[0]) + block * width);
                });
    return {at::mm(dh, p.fc1_weight.view({width, p.rank})), dgates};
  }
};

// [rows of a chunk, n] -> [A, tokens of the chunk, n] and back.
Tensor by_attribute(const Tensor& rows, int64_t attributes) {
  return rows.view({-1, attributes, rows.size(1)}).transpose(0, 1).contiguous();
}
Tensor by_row(const Tensor& per_attribute) {
  return per_attribute.transpose(0, 1).reshape({-1, per_attribute.size(2)});
}

template <typename T>
void forward_chunk(const Tensor& x, const Adapter& p, const Tensor& scaled_up,
                   const std::optional<Tensor>& noise, Tensor out, Tensor gates, Tensor& load,
                   Tensor normed, Tensor statistics) {
  const auto& kernels = row_kernels<T>();
  const int64_t tokens = x.size(0), rows = tokens * p.attributes;
  const auto options = p.up.options();
  const Tensor wide = x.to(options.dtype()).contiguous();
  Tensor u = at::empty({rows, p.d}, options), z = at::empty({rows, p.rank}, options);
  Tensor moments = at::empty({4, rows}, options);  // mean1, rstd1, mean2, rstd2
  over_rows(rows, [&](int64_t begin, int64_t count) {
    kernels.layer_norm(data<T>(wide) + begin * p.d, count, p.d, data<T>(p.norm1_weight),
                       data<T>(p.norm1_bias), static_cast<T>(p.norm_eps), nullptr,
                       data<T>(u) + begin * p.d, data<T>(moments) + begin,
                       data<T>(moments) + rows + begin);
  });
  const Tensor z0 = at::mm(u, p.down.t());
  over_rows(rows, [&](int64_t begin, int64_t count) {
    kernels.layer_norm(data<T>(z0) + begin * p.rank, count, p.rank, data<T>(p.norm2_weight),
                       data<T>(p.norm2_bias), static_cast<T>(p.norm_eps),
                       data<T>(normed) + begin * p.rank, data<T>(z) + begin * p.rank,
                       data<T>(moments) + 2 * rows + begin, data<T>(moments) + 3 * rows + begin);
  });
  for (int64_t row = 0; row < 3; ++row) {
    statistics[row].copy_(moments[row < 2 ? row : 3].view({tokens, p.attributes}).t());
  }

  const Tensor z_by_attribute = by_attribute(z, p.attributes);
  std::optional<Tensor> raw_std;
  if (noise.has_value()) raw_std = at::bmm(z_by_attribute, p.gate_noise);
  const auto [chunk_gates, chunk_load] = spectralx::cpu::noisy_topk_gating(
      at::bmm(z_by_attribute, p.gate), raw_std, noise, p.top_k);
  gates.copy_(chunk_gates);
  load.add_(chunk_load);

  const Tensor c = Experts<T>(p).forward(z, by_row(chunk_gates));
  const Tensor c_of = c.view({tokens, p.attributes, p.rank});
  for (int64_t a = 0; a < p.attributes; ++a) {
    Tensor slice = out.narrow(1, a * p.out, p.out);
    if (out.scalar_type() == c.scalar_type()) {
      slice.addmm_(c_of.select(1, a), scaled_up[a].t());
    } else {
      const Tensor adapted = at::mm(c_of.select(1, a), scaled_up[a].t());
      slice.copy_(adapted.add_(slice));
    }
  }
}

Adapter adapter(const Tensor& x, const Tensor& scaler, const Tensor& norm1_weight,
                const Tensor& norm1_bias, const Tensor& down, const Tensor& norm2_weight,
                const Tensor& norm2_bias, const Tensor& gate, const Tensor& gate_noise,
                const std::optional<Tensor>& noise, const Tensor& fc1_weight,
                const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias,
                const Tensor& up, int64_t top_k, double norm_eps) {
  const auto type = accumulation_type(x.scalar_type());
  const auto wide = [&](const Tensor& tensor) { return tensor.to(type).contiguous(); };
  TORCH_CHECK(x.dim() == 2, "x: got ", x.dim(), " dimensions, expected [tokens, in]");
  TORCH_CHECK(gate.dim() == 3, "gate: got ", gate.dim(),
              " dimensions, expected [attributes, rank, experts]");
  TORCH_CHECK(fc1_weight.dim() == 3, "fc1_weight: got ", fc1_weight.dim(),
              " dimensions, expected [experts, hidden, rank]");
  Adapter p{wide(scaler),       wide(norm1_weight), wide(norm1_bias), wide(down),
            wide(norm2_weight), wide(norm2_bias),   wide(gate),       wide(gate_noise),
            std::nullopt,       wide(fc1_weight),   wide(fc1_bias),   wide(fc2_weight),
            wide(fc2_bias),     wide(up),           top_k,            norm_eps,
            gate.size(0),       gate.size(2),       fc1_weight.size(1), gate.size(1),
            down.size(1),       up.size(0)};
  TORCH_CHECK(x.size(1) == p.attributes * p.d, "x: got width ", x.size(1), ", expected ",
              p.attributes * p.d);
  TORCH_CHECK(scaler.numel() == p.attributes * p.out, "scaler: got ", scaler.numel(),
              " values, expected ", p.attributes * p.out);
  TORCH_CHECK(down.size(0) == p.rank && up.size(1) == p.rank && fc1_weight.size(2) == p.rank,
              "down, up, fc1_weight: expected rank ", p.rank, " as gate");
  TORCH_CHECK(fc1_weight.size(0) == p.experts && fc2_weight.size(0) == p.experts,
              "fc1_weight, fc2_weight: expected ", p.experts, " experts as gate");
  if (noise.has_value()) {
    TORCH_CHECK(noise->sizes() == at::IntArrayRef({p.attributes, x.size(0), p.experts}),
                "noise: got shape ", noise->sizes(), ", expected [", p.attributes, ", ", x.size(0),
                ", ", p.experts, "]");
    p.noise = wide(*noise);
  }
  return p;
}

std::optional<Tensor> chunk_of(const std::optional<Tensor>& noise, int64_t first, int64_t tokens) {
  if (!noise.has_value()) return std::nullopt;
  return noise->narrow(1, first, tokens).contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> aomoa(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& scaler, const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& down,
    const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& gate,
    const Tensor& gate_noise, const std::optional<Tensor>& noise, const Tensor& fc1_weight,
    const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& up,
    int64_t top_k, double norm_eps) {
  const Adapter p = adapter(x, scaler, norm1_weight, norm1_bias, down, norm2_weight, norm2_bias,
                            gate, gate_noise, noise, fc1_weight, fc1_bias, fc2_weight, fc2_bias, up,
                            top_k, norm_eps);
  const int64_t tokens = x.size(0);
  const auto options = p.up.options();
  Tensor out = at::linear(x, weight, bias);
  Tensor gates = at::empty({p.attributes, tokens, p.experts}, options);
  Tensor load = at::zeros({p.attributes, p.experts}, options);
  Tensor normed = at::empty({tokens, p.attributes, p.rank}, options);
  Tensor statistics = at::empty({3, p.attributes, tokens}, options);
  const Tensor scaled_up = p.scaled_up();
  for (int64_t first = 0; first < tokens; first += kChunk) {
    const int64_t count = std::min(kChunk, tokens - first);
    AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "aomoa", [&] {
      forward_chunk<scalar_t>(x.narrow(0, first, count), p, scaled_up,
                              chunk_of(p.noise, first, count), out.narrow(0, first, count),
                              gates.narrow(1, first, count), load, normed.narrow(0, first, count),
                              statistics.narrow(2, first, count));
    });
  }
  return {out, gates, load, normed, statistics};
}

// Gradients of the adapter's tensors, in the order of the schema from scaler on.
struct Gradients {
  Tensor norm1_weight, norm1_bias, down, norm2_weight, norm2_bias, gate, gate_noise, noise,
      fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  Tensor r;  // [A, out / A, r], dout' * c by attribute: up's and scaler's gradients follow from it

  Gradients(const Adapter& p, bool want_noise)
      : norm1_weight(at::zeros_like(p.norm1_weight)), norm1_bias(at::zeros_like(p.norm1_bias)),
        down(at::zeros_like(p.down)), norm2_weight(at::zeros_like(p.norm2_weight)),
        norm2_bias(at::zeros_like(p.norm2_bias)), gate(at::zeros_like(p.gate)),
        gate_noise(at::zeros_like(p.gate_noise)),
        noise(want_noise ? at::empty_like(*p.noise) : Tensor()),
        fc1_weight(at::zeros_like(p.fc1_weight)), fc1_bias(at::zeros_like(p.fc1_bias)),
        fc2_weight(at::zeros_like(p.fc2_weight)), fc2_bias(at::zeros_like(p.fc2_bias)),
        r(at::zeros({p.attributes, p.out, p.rank}, p.up.options())) {}
};

// One chunk of tokens: adds to the weight gradients and, where dx is defined, to dx.
template <typename T>
void backward_chunk(const Tensor& x, const Tensor& dout, const Adapter& p, const Tensor& scaled_up,
                    const std::optional<Tensor>& noise, const Tensor& gates, const Tensor& normed,
                    const Tensor& statistics, const std::optional<Tensor>& gates_grad,
                    const std::optional<Tensor>& load_grad, Gradients& grads, Tensor noise_grad,
                    Tensor dx) {
  const auto& kernels = row_kernels<T>();
  const int64_t tokens = x.size(0), rows = tokens * p.attributes;
  const auto options = p.up.options();
  const Tensor wide = x.to(options.dtype()).contiguous(), g = dout.to(options.dtype());
  const Tensor moments = statistics.transpose(1, 2).contiguous().view({3, rows});
  const T *mean1 = data<T>(moments), *rstd1 = mean1 + rows, *rstd2 = rstd1 + rows;

  Tensor z = at::empty({rows, p.rank}, options);
  over_rows(rows, [&](int64_t begin, int64_t count) {
    kernels.affine(data<T>(normed) + begin * p.rank, count, p.rank, nullptr, nullptr,
                   data<T>(p.norm2_weight), data<T>(p.norm2_bias), data<T>(z) + begin * p.rank);
  });
  Experts<T> experts(p);
  const Tensor c = experts.forward(z, by_row(gates));
  const Tensor c_of = c.view({tokens, p.attributes, p.rank});
  Tensor dc = at::empty({tokens, p.attributes, p.rank}, options);
  for (int64_t a = 0; a < p.attributes; ++a) {
    const Tensor part = g.narrow(1, a * p.out, p.out);
    grads.r[a].addmm_(part.t(), c_of.select(1, a));
    Tensor dc_of = dc.select(1, a);
    at::mm_out(dc_of, part, scaled_up[a]);
  }

  auto [dz, dgates] = experts.backward(z, c, dc.view({rows, p.rank}), grads.fc1_weight,
                                       grads.fc1_bias, grads.fc2_weight, grads.fc2_bias);
  dgates = by_attribute(dgates, p.attributes);
  if (gates_grad.has_value()) dgates.add_(*gates_grad);
  const Tensor z_by_attribute = by_attribute(z, p.attributes);
  std::optional<Tensor> raw_std;
  if (noise.has_value()) raw_std = at::bmm(z_by_attribute, p.gate_noise);
  const auto routing = spectralx::cpu::noisy_topk_gating_gradients(
      dgates, load_grad, at::bmm(z_by_attribute, p.gate), raw_std, noise, p.top_k,
      noise.has_value(), noise_grad.defined());
  if (noise_grad.defined()) noise_grad.copy_(routing.noise);
  grads.gate.baddbmm_(z_by_attribute.transpose(1, 2), routing.clean);
  Tensor dz_routing = at::bmm(routing.clean, p.gate.transpose(1, 2));  // [A, tokens, r]
  if (noise.has_value()) {
    grads.gate_noise.baddbmm_(z_by_attribute.transpose(1, 2), routing.raw_std);
    dz_routing.baddbmm_(routing.raw_std, p.gate_noise.transpose(1, 2));
  }
  dz.view({tokens, p.attributes, p.rank}).add_(dz_routing.transpose(0, 1));

  Tensor dz0 = at::empty({rows, p.rank}, options);
  reduce_rows(rows, {grads.norm2_weight, grads.norm2_bias},
              [&](int64_t begin, int64_t count, int64_t block, std::vector<Tensor>& partials) {
                kernels.layer_norm_backward(
                    data<T>(dz) + begin * p.rank, data<T>(normed) + begin * p.rank, count, p.rank,
                    nullptr, rstd2 + begin, data<T>(p.norm2_weight), false,
                    data<T>(dz0) + begin * p.rank, data<T>(partials[0]) + block * p.rank,
                    data<T>(partials[1]) + block * p.rank);
              });

  Tensor u = at::empty({rows, p.d}, options);
  over_rows(rows, [&](int64_t begin, int64_t count) {
    kernels.affine(data<T>(wide) + begin * p.d, count, p.d, mean1 + begin, rstd1 + begin,
                   data<T>(p.norm1_weight), data<T>(p.norm1_bias), data<T>(u) + begin * p.d);
  });
  grads.down.addmm_(dz0.t(), u);
  const Tensor du = at::mm(dz0, p.down);
  const bool in_place = dx.defined() && dx.scalar_type() == options.dtype().toScalarType();
  Tensor dx_rows = in_place ? dx.view({rows, p.d}) : at::empty({rows, p.d}, options);
  reduce_rows(rows, {grads.norm1_weight, grads.norm1_bias},
              [&](int64_t begin, int64_t count, int64_t block, std::vector<Tensor>& partials) {
                kernels.layer_norm_backward(
                    data<T>(du) + begin * p.d, data<T>(wide) + begin * p.d, count, p.d,
                    mean1 + begin, rstd1 + begin, data<T>(p.norm1_weight), in_place,
                    data<T>(dx_rows) + begin * p.d, data<T>(partials[0]) + block * p.d,
                    data<T>(partials[1]) + block * p.d);
              });
  if (dx.defined() && !in_place) dx.copy_(dx_rows.view_as(dx).add_(dx));
}

// output_mask names the inputs in the order of the schema; the wanted gradients come in that order.
std::vector<Tensor> aomoa_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& scaler, const Tensor& norm1_weight,
    const Tensor& norm1_bias, const Tensor& down, const Tensor& norm2_weight,
    const Tensor& norm2_bias, const Tensor& gate, const Tensor& gate_noise,
    const std::optional<Tensor>& noise, const Tensor& fc1_weight, const Tensor& fc1_bias,
    const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& up, int64_t top_k,
    double norm_eps, at::TensorList saved, const c10::List<bool>& output_mask) {
  const Adapter p = adapter(x, scaler, norm1_weight, norm1_bias, down, norm2_weight, norm2_bias,
                            gate, gate_noise, noise, fc1_weight, fc1_bias, fc2_weight, fc2_bias, up,
                            top_k, norm_eps);
  TORCH_CHECK(output_grads.size() == 3, "output_grads: got ", output_grads.size(), ", expected 3");
  TORCH_CHECK(output_mask.size() == 19, "output_mask: got ", output_mask.size(), ", expected 19");
  TORCH_CHECK(saved.size() == 3, "saved: got ", saved.size(), " tensors, expected 3");
  const Tensor &gates = saved[0], &normed = saved[1], &statistics = saved[2];
  const int64_t tokens = x.size(0), width = p.attributes * p.out;
  const auto type = p.up.scalar_type();
  const auto incoming = [&](size_t i) -> std::optional<Tensor> {
    const std::optional<Tensor> grad = output_grads[i];
    if (!grad.has_value()) return std::nullopt;
    return grad->to(i == 0 ? x.scalar_type() : type).contiguous();
  };
  const std::optional<Tensor> given = incoming(0), gates_grad = incoming(1), load_grad = incoming(2);
  const Tensor dout = given.has_value() ? *given : at::zeros({tokens, width}, x.options());

  // The frozen product first, so that the adapter is added to it row by row.
  Tensor dx = output_mask[0] ? at::mm(dout, weight) : Tensor();
  Gradients grads(p, output_mask[11]);
  const Tensor scaled_up = p.scaled_up();
  for (int64_t first = 0; first < tokens; first += kChunk) {
    const int64_t count = std::min(kChunk, tokens - first);
    const auto part = [&](const std::optional<Tensor>& whole) -> std::optional<Tensor> {
      if (!whole.has_value()) return std::nullopt;
      return whole->narrow(1, first, count);
    };
    AT_DISPATCH_FLOATING_TYPES(type, "aomoa_backward", [&] {
      backward_chunk<scalar_t>(
          x.narrow(0, first, count), dout.narrow(0, first, count), p, scaled_up,
          chunk_of(p.noise, first, count), gates.narrow(1, first, count),
          normed.narrow(0, first, count), statistics.narrow(2, first, count), part(gates_grad),
          load_grad, grads, grads.noise.defined() ? grads.noise.narrow(1, first, count) : Tensor(),
          dx.defined() ? dx.narrow(0, first, count) : Tensor());
    });
  }

  const std::array<Tensor, 17> inputs = {
      x, weight, bias.value_or(Tensor()), scaler, norm1_weight, norm1_bias, down, norm2_weight,
      norm2_bias, gate, gate_noise, noise.value_or(Tensor()), fc1_weight, fc1_bias, fc2_weight,
      fc2_bias, up};
  const std::array<Tensor, 17> computed = {
      dx,
      output_mask[1] ? at::mm(dout.t(), x) : Tensor(),
      output_mask[2] ? dout.sum(0, false, type) : Tensor(),
      output_mask[3] ? (grads.r * p.up).sum(2).view({width}) : Tensor(),
      grads.norm1_weight,
      grads.norm1_bias,
      grads.down,
      grads.norm2_weight,
      grads.norm2_bias,
      grads.gate,
      grads.gate_noise,
      grads.noise,
      grads.fc1_weight,
      grads.fc1_bias,
      grads.fc2_weight,
      grads.fc2_bias,
      output_mask[16] ? (p.scaler.view({p.attributes, p.out, 1}) * grads.r).sum(0) : Tensor()};
  std::vector<Tensor> wanted;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (output_mask[i]) wanted.push_back(computed[i].to(inputs[i].scalar_type()));
  }
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("aomoa", &aomoa);
  m.impl("aomoa_backward", &aomoa_backward);
}
