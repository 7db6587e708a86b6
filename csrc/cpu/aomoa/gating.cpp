// spectralx::noisy_topk_gating on the CPU. Maths: spectralx_kernels/aomoa/README.md, "Gating".
//
// One pass over the rows of [A, T, E]; a row is E logits. The load is summed over fixed blocks of
// tokens and the blocks in order, so its bits do not depend on the number of threads.
#include "cpu/torch.h"

#include "cpu/aomoa/gating.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using spectralx::cpu::accumulation_type;

constexpr double kNoiseFloor = 0.1;
constexpr double kGateFloor = 1e-4;
constexpr int64_t kBlock = 256;  // tokens of one partial sum of the load

template <typename T>
T softplus(T x) {
  return x > T(20) ? x : std::log1p(std::exp(x));
}

template <typename T>
T normal_cdf(T x) {
  return T(0.5) * std::erfc(-x * T(M_SQRT1_2));
}

template <typename T>
T normal_pdf(T x) {
  return T(0.3989422804014327) * std::exp(T(-0.5) * x * x);
}

// NaN sorts above everything, as in torch.sort.
template <typename T>
bool greater(T a, T b) {
  return a > b || (std::isnan(a) && !std::isnan(b));
}

// What one row needs, allocated once a thread.
template <typename T>
struct Row {
  std::vector<T> logits, std, gates;
  std::vector<int64_t> order;  // the k + 1 (or E) largest logits, ties to the lowest index
  std::vector<char> taken;     // among them

  explicit Row(int64_t experts)
      : logits(experts), std(experts), gates(experts), order(experts), taken(experts) {}

  // Fills logits, std (with noise) and the first `top_k` + 1 entries of order; gates of order[0..k)
  // before the floor.
  void route(const T* clean, const T* raw_std, const T* noise, int64_t experts, int64_t top_k) {
    for (int64_t e = 0; e < experts; ++e) {
      if (noise != nullptr) {
        std[e] = softplus(raw_std[e]) + T(kNoiseFloor);
        logits[e] = clean[e] + noise[e] * std[e];
      } else {
        logits[e] = clean[e];
      }
      taken[e] = 0;
    }
    const int64_t ranked = std::min(top_k + 1, experts);
    for (int64_t rank = 0; rank < ranked; ++rank) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts; ++e) {
        if (!taken[e] && (best < 0 || greater(logits[e], logits[best]))) best = e;
      }
      taken[best] = 1;
      order[rank] = best;
    }
    const T largest = logits[order[0]];
    T total = 0;
    for (int64_t rank = 0; rank < top_k; ++rank) {
      gates[rank] = std::exp(logits[order[rank]] - largest);
      total += gates[rank];
    }
    for (int64_t rank = 0; rank < top_k; ++rank) gates[rank] /= total;
  }
};

struct Sizes {
  int64_t attributes, tokens, experts;
};

template <typename T>
void forward(const T* clean, const T* raw_std, const T* noise, Sizes s, int64_t top_k, T* gates,
             T* load) {
  const int64_t blocks = (s.tokens + kBlock - 1) / kBlock;
  const bool smooth_load = noise != nullptr && top_k < s.experts;
  std::vector<T> partial(s.attributes * blocks * s.experts, T(0));
  at::parallel_for(0, s.attributes * blocks, 1, [&](int64_t begin, int64_t end) {
    Row<T> row(s.experts);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t attribute = block / blocks;
      const int64_t first = (block % blocks) * kBlock;
      T* sum = partial.data() + block * s.experts;
      for (int64_t t = first; t < std::min(first + kBlock, s.tokens); ++t) {
        const int64_t at = (attribute * s.tokens + t) * s.experts;
        row.route(clean + at, raw_std ? raw_std + at : nullptr, noise ? noise + at : nullptr,
                  s.experts, top_k);
        std::fill(gates + at, gates + at + s.experts, T(0));
        for (int64_t rank = 0; rank < top_k; ++rank) {
          const T gate = row.gates[rank] <= T(kGateFloor) ? T(0) : row.gates[rank];
          gates[at + row.order[rank]] = gate;
          if (!smooth_load) sum[row.order[rank]] += gate != T(0);
        }
        if (!smooth_load) continue;
        for (int64_t e = 0; e < s.experts; ++e) row.taken[e] = 0;
        for (int64_t rank = 0; rank < top_k; ++rank) row.taken[row.order[rank]] = 1;
        for (int64_t e = 0; e < s.experts; ++e) {
          const T threshold = row.logits[row.order[row.taken[e] ? top_k : top_k - 1]];
          sum[e] += normal_cdf((clean[at + e] - threshold) / row.std[e]);
        }
      }
    }
  });
  std::fill(load, load + s.attributes * s.experts, T(0));
  for (int64_t block = 0; block < s.attributes * blocks; ++block) {
    for (int64_t e = 0; e < s.experts; ++e) {
      load[(block / blocks) * s.experts + e] += partial[block * s.experts + e];
    }
  }
}

template <typename T>
void backward(const T* gates_grad, const T* load_grad, const T* clean, const T* raw_std,
              const T* noise, Sizes s, int64_t top_k, T* clean_grad, T* raw_std_grad,
              T* noise_grad) {
  const bool smooth_load = load_grad != nullptr && noise != nullptr && top_k < s.experts;
  at::parallel_for(0, s.attributes * s.tokens, kBlock, [&](int64_t begin, int64_t end) {
    Row<T> row(s.experts);
    std::vector<T> logits_grad(s.experts), std_grad(s.experts);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * s.experts;
      row.route(clean + at, raw_std ? raw_std + at : nullptr, noise ? noise + at : nullptr,
                s.experts, top_k);
      std::fill(logits_grad.begin(), logits_grad.end(), T(0));
      std::fill(std_grad.begin(), std_grad.end(), T(0));
      std::fill(clean_grad + at, clean_grad + at + s.experts, T(0));
      if (gates_grad != nullptr) {
        T mean = 0;
        for (int64_t rank = 0; rank < top_k; ++rank) {
          if (!(row.gates[rank] <= T(kGateFloor))) {
            mean += row.gates[rank] * gates_grad[at + row.order[rank]];
          }
        }
        for (int64_t rank = 0; rank < top_k; ++rank) {
          const bool passes = !(row.gates[rank] <= T(kGateFloor));
          const T grad = passes ? gates_grad[at + row.order[rank]] : T(0);
          logits_grad[row.order[rank]] = row.gates[rank] * (grad - mean);
        }
      }
      if (smooth_load) {
        const T* grad = load_grad + (t / s.tokens) * s.experts;
        for (int64_t e = 0; e < s.experts; ++e) row.taken[e] = 0;
        for (int64_t rank = 0; rank < top_k; ++rank) row.taken[row.order[rank]] = 1;
        for (int64_t e = 0; e < s.experts; ++e) {
          const int64_t threshold = row.order[row.taken[e] ? top_k : top_k - 1];
          const T u = (clean[at + e] - row.logits[threshold]) / row.std[e];
          const T through = grad[e] * normal_pdf(u) / row.std[e];
          clean_grad[at + e] += through;
          logits_grad[threshold] -= through;
          std_grad[e] -= through * u;
        }
      }
      for (int64_t e = 0; e < s.experts; ++e) {
        clean_grad[at + e] += logits_grad[e];
        if (noise == nullptr) continue;
        if (noise_grad != nullptr) noise_grad[at + e] = logits_grad[e] * row.std[e];
        if (raw_std_grad != nullptr) {
          const T slope = T(1) / (T(1) + std::exp(-raw_std[at + e]));
          raw_std_grad[at + e] = (std_grad[e] + logits_grad[e] * noise[at + e]) * slope;
        }
      }
    }
  });
}

std::optional<Tensor> prepared(const std::optional<Tensor>& tensor, at::ScalarType type) {
  if (!tensor.has_value()) return std::nullopt;
  return tensor->to(type).contiguous();
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

void check(const Tensor& clean, const std::optional<Tensor>& raw_std,
           const std::optional<Tensor>& noise, int64_t top_k) {
  TORCH_CHECK(clean.dim() == 3, "clean: got ", clean.dim(),
              " dimensions, expected [attributes, tokens, experts]");
  TORCH_CHECK(top_k >= 1 && top_k <= clean.size(2), "top_k: got ", top_k, ", expected 1 to ",
              clean.size(2));
  TORCH_CHECK(raw_std.has_value() == noise.has_value(),
              "noise and raw_std: got one of them, expected both or neither");
  for (const auto* tensor : {&raw_std, &noise}) {
    TORCH_CHECK(!tensor->has_value() || (*tensor)->sizes() == clean.sizes(),
                "raw_std, noise: expected the shape of clean, ", clean.sizes());
  }
}

// output_mask names the four inputs (clean, raw_std, noise, top_k); the wanted gradients come in
// that order.
std::vector<Tensor> backward_operator(const c10::List<std::optional<Tensor>>& output_grads,
                                      const Tensor& clean, const std::optional<Tensor>& raw_std,
                                      const std::optional<Tensor>& noise, int64_t top_k,
                                      at::TensorList /*saved*/,
                                      const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 2, "output_grads: got ", output_grads.size(), ", expected 2");
  TORCH_CHECK(output_mask.size() == 4, "output_mask: got ", output_mask.size(), ", expected 4");
  const auto grads = spectralx::cpu::noisy_topk_gating_gradients(
      output_grads[0], output_grads[1], clean, raw_std, noise, top_k, output_mask[1],
      output_mask[2]);
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(grads.clean.to(clean.scalar_type()));
  if (output_mask[1]) wanted.push_back(grads.raw_std.to(raw_std->scalar_type()));
  if (output_mask[2]) wanted.push_back(grads.noise.to(noise->scalar_type()));
  return wanted;
}

}  // namespace

namespace spectralx::cpu {

using at::Tensor;

std::tuple<Tensor, Tensor> noisy_topk_gating(const Tensor& clean,
                                             const std::optional<Tensor>& raw_std,
                                             const std::optional<Tensor>& noise, int64_t top_k) {
  check(clean, raw_std, noise, top_k);
  const auto type = accumulation_type(clean.scalar_type());
  const Sizes s{clean.size(0), clean.size(1), clean.size(2)};
  const auto clean_ = prepared(clean, type), raw_std_ = prepared(raw_std, type),
             noise_ = prepared(noise, type);
  const auto options = clean.options().dtype(type);
  Tensor gates = at::empty({s.attributes, s.tokens, s.experts}, options);
  Tensor load = at::empty({s.attributes, s.experts}, options);
  AT_DISPATCH_FLOATING_TYPES(type, "noisy_topk_gating", [&] {
    forward<scalar_t>(data<scalar_t>(clean_), data<scalar_t>(raw_std_), data<scalar_t>(noise_), s,
                      top_k, gates.mutable_data_ptr<scalar_t>(), load.mutable_data_ptr<scalar_t>());
  });
  return {gates, load};
}

GatingGradients noisy_topk_gating_gradients(const std::optional<Tensor>& gates_grad,
                                            const std::optional<Tensor>& load_grad,
                                            const Tensor& clean,
                                            const std::optional<Tensor>& raw_std,
                                            const std::optional<Tensor>& noise, int64_t top_k,
                                            bool want_raw_std, bool want_noise) {
  check(clean, raw_std, noise, top_k);
  const auto type = accumulation_type(clean.scalar_type());
  const Sizes s{clean.size(0), clean.size(1), clean.size(2)};
  const auto clean_ = prepared(clean, type), raw_std_ = prepared(raw_std, type),
             noise_ = prepared(noise, type), gates_grad_ = prepared(gates_grad, type),
             load_grad_ = prepared(load_grad, type);
  GatingGradients grads;
  grads.clean = at::empty(clean.sizes(), clean.options().dtype(type));
  if (want_raw_std) grads.raw_std = at::empty_like(grads.clean);
  if (want_noise) grads.noise = at::empty_like(grads.clean);
  AT_DISPATCH_FLOATING_TYPES(type, "noisy_topk_gating_backward", [&] {
    backward<scalar_t>(data<scalar_t>(gates_grad_), data<scalar_t>(load_grad_),
                       data<scalar_t>(clean_), data<scalar_t>(raw_std_), data<scalar_t>(noise_), s,
                       top_k, grads.clean.mutable_data_ptr<scalar_t>(),
                       want_raw_std ? grads.raw_std.mutable_data_ptr<scalar_t>() : nullptr,
                       want_noise ? grads.noise.mutable_data_ptr<scalar_t>() : nullptr);
  });
  return grads;
}

}  // namespace spectralx::cpu

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("noisy_topk_gating", &spectralx::cpu::noisy_topk_gating);
  m.impl("noisy_topk_gating_backward", &backward_operator);
}
