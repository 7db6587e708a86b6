// One token's routing, by one thread over a row of E logits in shared memory. Maths:
// spectralx_kernels/aomoa/README.md, "Gating". No array is indexed by a register: the k largest are
// found by k + 1 sweeps, each for the first that comes after the one before.
#pragma once
#include "cuda/common/scalar.cuh"

namespace spectralx::cuda {

constexpr double kNoiseFloor = 0.1;
constexpr double kGateFloor = 1e-4;

// Whether logit a of expert i ranks before b of expert j: NaN first, then the larger, then the lower
// index.
template <typename W>
__device__ __forceinline__ bool before(W a, int i, W b, int j) {
  if (isnan(a) || isnan(b)) return isnan(a) && (!isnan(b) || i < j);
  return a > b || (a == b && i < j);
}

template <typename W>
struct Routing {
  W largest, total;        // softmax over the chosen: exp(logit - largest) / total
  W last, next;            // the k-th and the (k + 1)-th largest logit, with their experts
  int last_expert, next_expert;

  __device__ bool takes(W logit, int expert) const {
    return expert == last_expert || before(logit, expert, last, last_expert);
  }
  // Before the floor; only for an expert that is taken.
  __device__ W weight(W logit) const { return exponential(logit - largest) / total; }
};

template <typename W>
__device__ Routing<W> route(const W* logits, int experts, int top_k) {
  Routing<W> routing{};
  W previous = 0;
  int previous_expert = -1;
  for (int rank = 0; rank < min(top_k + 1, experts); ++rank) {
    W best = 0;
    int best_expert = -1;
    for (int e = 0; e < experts; ++e) {
      const W logit = logits[e];
      if (rank > 0 && !before(previous, previous_expert, logit, e)) continue;
      if (best_expert < 0 || before(logit, e, best, best_expert)) {
        best = logit;
        best_expert = e;
      }
    }
    if (rank == 0) routing.largest = best;
    if (rank < top_k) {
      routing.total += exponential(best - routing.largest);
      routing.last = best;
      routing.last_expert = best_expert;
    } else {
      routing.next = best;
      routing.next_expert = best_expert;
    }
    previous = best;
    previous_expert = best_expert;
  }
  return routing;
}

// A row's gates, 0 where not taken, and what it adds to the load of each expert. `std` is null
// without noise.
template <typename W>
__device__ void gates_of_row(const W* logits, const W* clean, const W* std, int experts, int top_k,
                             W* gates, W* stays) {
  const Routing<W> routing = route(logits, experts, top_k);
  for (int e = 0; e < experts; ++e) {
    const W logit = logits[e];
    const bool taken = routing.takes(logit, e);
    W gate = taken ? routing.weight(logit) : W(0);
    if (gate <= W(kGateFloor)) gate = 0;
    if (std != nullptr && top_k < experts) {
      stays[e] = normal_cdf((clean[e] - (taken ? routing.next : routing.last)) / std[e]);
    } else {
      stays[e] = gate != W(0);
    }
    gates[e] = gate;
  }
}

// Gradients of a row's clean logits, raw deviations and noise. shares[e] is gate times its gradient
// (0 where the gate is 0); load_grad is null where no gradient comes through the load; std is null
// without noise. Outputs: clean_grad, logits_grad (which may be shares) and, with noise, std_grad,
// that of the raw deviation.
template <typename W>
__device__ void route_backward(const W* logits, const W* clean, const W* std, const W* raw_std,
                               const W* noise, const W* shares, const W* load_grad, int experts,
                               int top_k, W* clean_grad, W* std_grad, W* logits_grad) {
  const Routing<W> routing = route(logits, experts, top_k);
  W mean = 0;
  for (int e = 0; e < experts; ++e) mean += shares[e];
  for (int e = 0; e < experts; ++e) {
    const bool taken = routing.takes(logits[e], e);
    logits_grad[e] = taken ? shares[e] - routing.weight(logits[e]) * mean : W(0);
    clean_grad[e] = 0;
    if (std != nullptr) std_grad[e] = 0;
  }
  if (load_grad != nullptr && std != nullptr && top_k < experts) {
    for (int e = 0; e < experts; ++e) {
      const bool taken = routing.takes(logits[e], e);
      const W u = (clean[e] - (taken ? routing.next : routing.last)) / std[e];
      const W through = load_grad[e] * normal_pdf(u) / std[e];
      clean_grad[e] = through;
      logits_grad[taken ? routing.next_expert : routing.last_expert] -= through;
      std_grad[e] = -through * u;
    }
  }
  for (int e = 0; e < experts; ++e) {
    clean_grad[e] += logits_grad[e];
    if (std == nullptr) continue;
    const W slope = W(1) / (W(1) + exponential(-raw_std[e]));
    std_grad[e] = (std_grad[e] + logits_grad[e] * noise[e]) * slope;
  }
}

}  // namespace spectralx::cuda
