// spectralx::aomoa on CUDA: checks, memory, the vendor's matrix products and, through kernels.h, our
// launches. No synchronisation with the host.
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/common/glue.h"
#include "cuda/aomoa/kernels.h"

namespace {

using namespace spectralx::cuda;

enum Argument {  // places in the operator's schema
  kX, kWeight, kBias, kScaler, kNorm1Weight, kNorm1Bias, kDown, kNorm2Weight, kNorm2Bias, kGate,
  kGateNoise, kNoise, kFc1Weight, kFc1Bias, kFc2Weight, kFc2Bias, kUp, kTensors,
  kArguments = kTensors + 2
};

constexpr const char* kNames[kTensors] = {
    "x", "weight", "bias", "scaler", "norm1_weight", "norm1_bias", "down", "norm2_weight",
    "norm2_bias", "gate", "gate_noise", "noise", "fc1_weight", "fc1_bias", "fc2_weight",
    "fc2_bias", "up"};

// The arguments, contiguous, and their description for the kernels; what either needs on the way.
struct Layer {
  std::vector<Tensor> tensors;  // by Argument; noise in the wide type
  SpectralxAomoa kernels{};
  int64_t rows;

  const Tensor& operator[](Argument argument) const { return tensors[argument]; }

  Layer(std::vector<Tensor> given, int64_t top_k, double norm_eps) : tensors(std::move(given)) {
    const Tensor& x = tensors[kX];
    for (int i = 0; i < kTensors; ++i) {
      Tensor& tensor = tensors[i];
      if (!tensor.defined()) continue;
      TORCH_CHECK(tensor.device() == x.device(), kNames[i], ": got device ", tensor.device(),
                  ", expected ", x.device(), " as x");
      if (i == kNoise) tensor = tensor.to(wide_type(x));
      TORCH_CHECK(i == kNoise || tensor.scalar_type() == x.scalar_type(), kNames[i],
                  ": got dtype ", tensor.scalar_type(), ", expected ", x.scalar_type(), " as x");
      tensor = tensor.contiguous();
    }
    const Tensor &gate = tensors[kGate], &fc1 = tensors[kFc1Weight], &weight = tensors[kWeight];
    TORCH_CHECK(x.dim() == 2 && gate.dim() == 3 && fc1.dim() == 3 && weight.dim() == 2,
                "x, gate, fc1_weight, weight: got ", x.dim(), ", ", gate.dim(), ", ", fc1.dim(),
                ", ", weight.dim(), " dimensions, expected 2, 3, 3, 2");
    SpectralxAomoa& k = kernels;
    k.type = type_code(x);
    k.tokens = x.size(0);
    k.attributes = gate.size(0);
    k.width = x.size(1) / k.attributes;
    k.out = weight.size(0) / k.attributes;
    k.rank = gate.size(1);
    k.hidden = fc1.size(1);
    k.experts = gate.size(2);
    k.top_k = top_k;
    k.eps = norm_eps;
    rows = k.tokens * k.attributes;
    TORCH_CHECK(top_k >= 1 && top_k <= k.experts, "top_k: got ", top_k, ", expected 1 to ",
                k.experts);
    TORCH_CHECK(rows <= std::numeric_limits<int>::max(), "x: got ", x.size(0),
                " tokens, expected fewer");
    const void** inputs[] = {&k.x,          nullptr,         nullptr,        &k.scaler,
                             &k.norm1_weight, &k.norm1_bias, &k.down,        &k.norm2_weight,
                             &k.norm2_bias, &k.gate,         &k.gate_noise,  &k.noise,
                             &k.fc1_weight, &k.fc1_bias,     &k.fc2_weight,  &k.fc2_bias,
                             &k.up};
    for (int i = 0; i < kTensors; ++i) {
      if (inputs[i] != nullptr) *inputs[i] = pointer(tensors[i]);
    }
  }

  // Memory in the type of x, or in the wide one.
  Tensor plain(at::IntArrayRef shape) const { return at::empty(shape, tensors[kX].options()); }
  Tensor wide(at::IntArrayRef shape) const {
    return at::empty(shape, tensors[kX].options().dtype(wide_type(tensors[kX])));
  }
  void fits(int64_t blocks) const {
    TORCH_CHECK(blocks > 0, "aomoa: got rank ", kernels.rank, ", hidden ", kernels.hidden,
                ", experts ", kernels.experts, ", top_k ", kernels.top_k,
                ", expected sizes that fit in a multiprocessor's shared memory; use another backend");
  }
};

// A product accumulated, and kept, in the wide type.
Tensor wide_mm(const Tensor& a, const Tensor& b) {
  const auto wide = wide_type(a);
  return a.scalar_type() == wide ? at::mm(a, b) : at::mm(a, b, wide);
}

Tensor wide_bmm(const Tensor& a, const Tensor& b) {
  const auto wide = wide_type(a);
  return a.scalar_type() == wide ? at::bmm(a, b) : at::bmm(a, b, wide);
}

// What both passes fold into weights; lives as long as the launches that read it are queued.
struct Prepared {
  Tensor folded, scaled_up, column_sums, shift, counter;

  explicit Prepared(Layer& layer) {
    SpectralxAomoa& k = layer.kernels;
    folded = layer.plain({k.rank, k.width});
    scaled_up = layer.plain({k.attributes, k.out, k.rank});
    column_sums = layer.wide({k.rank});
    shift = layer.wide({k.rank});
    counter = at::empty({1}, layer[kX].options().dtype(at::kInt));
    k.folded = pointer(folded);
    k.scaled_up = pointer(scaled_up);
    k.column_sums = pointer(column_sums);
    k.shift = pointer(shift);
    k.counter = pointer(counter);
    check_launch("aomoa", spectralx_aomoa_prepare(&k, current_stream()));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> aomoa(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& scaler,
    const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& down,
    const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& gate,
    const Tensor& gate_noise, const OptionalTensor& noise, const Tensor& fc1_weight,
    const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& up,
    int64_t top_k, double norm_eps) {
  const c10::cuda::CUDAGuard guard(x.device());
  Layer layer({x, weight, bias.value_or(Tensor()), scaler, norm1_weight, norm1_bias, down,
               norm2_weight, norm2_bias, gate, gate_noise, noise.value_or(Tensor()), fc1_weight,
               fc1_bias, fc2_weight, fc2_bias, up},
              top_k, norm_eps);
  SpectralxAomoa& k = layer.kernels;
  Tensor gates = layer.wide({k.attributes, k.tokens, k.experts});
  Tensor load = layer.wide({k.attributes, k.experts});
  Tensor normed = layer.wide({k.tokens, k.attributes, k.rank});
  Tensor statistics = layer.wide({3, k.attributes, k.tokens});
  const Tensor transposed = layer[kWeight].t();
  Tensor out = bias.has_value() ? at::addmm(layer[kBias], layer[kX], transposed)
                                : at::mm(layer[kX], transposed);
  if (k.tokens == 0) return {out, gates, load.zero_(), normed, statistics};

  k.statistics = pointer(statistics);
  k.normed = pointer(normed);
  k.gates = pointer(gates);
  k.load = pointer(load);
  const Prepared prepared(layer);
  const Tensor products = wide_mm(layer[kX].view({layer.rows, k.width}), prepared.folded.t());
  const Tensor mixed = layer.plain({k.tokens, k.attributes, k.rank});
  const int64_t blocks = spectralx_aomoa_forward_blocks(&k);
  layer.fits(blocks);
  const Tensor partial = layer.wide({blocks, k.attributes, k.experts});
  k.products = pointer(products);
  k.mixed = pointer(mixed);
  k.load_partial = pointer(partial);
  check_launch("aomoa", spectralx_aomoa_forward(&k, current_stream()));
  out.view({k.tokens, k.attributes, k.out})
      .transpose(0, 1)
      .baddbmm_(mixed.transpose(0, 1), prepared.scaled_up.transpose(1, 2));
  return {out, gates, load, normed, statistics};
}

std::vector<Tensor> aomoa_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const Tensor& scaler, const Tensor& norm1_weight,
    const Tensor& norm1_bias, const Tensor& down, const Tensor& norm2_weight,
    const Tensor& norm2_bias, const Tensor& gate, const Tensor& gate_noise,
    const OptionalTensor& noise, const Tensor& fc1_weight, const Tensor& fc1_bias,
    const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& up, int64_t top_k,
    double norm_eps, at::TensorList saved, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 3, "output_grads: got ", output_grads.size(), ", expected 3");
  TORCH_CHECK(saved.size() == 3, "saved: got ", saved.size(),
              ", expected gates, normed and statistics");
  TORCH_CHECK(output_mask.size() == kArguments, "output_mask: got ", output_mask.size(),
              ", expected ", int{kArguments});
  const c10::cuda::CUDAGuard guard(x.device());
  Layer layer({x, weight, bias.value_or(Tensor()), scaler, norm1_weight, norm1_bias, down,
               norm2_weight, norm2_bias, gate, gate_noise, noise.value_or(Tensor()), fc1_weight,
               fc1_bias, fc2_weight, fc2_bias, up},
              top_k, norm_eps);
  SpectralxAomoa& k = layer.kernels;
  std::vector<Tensor> grads(kTensors), wanted;
  const auto collect = [&] {
    for (int i = 0; i < kTensors; ++i) {
      if (!output_mask[i]) continue;
      // Only the noise may have another dtype than its gradient was computed in.
      wanted.push_back(i == kNoise ? grads[i].to(noise->scalar_type()) : grads[i]);
    }
    return wanted;
  };
  if (k.tokens == 0) {
    for (int i = 0; i < kTensors; ++i) {
      if (output_mask[i]) grads[i] = at::zeros_like(layer.tensors[i]);
    }
    return collect();
  }
  const auto wide = wide_type(x);
  Tensor out_grad = prepared(output_grads[0], x.scalar_type());
  if (!out_grad.defined()) out_grad = at::zeros({k.tokens, k.attributes * k.out}, x.options());
  const Tensor gates_grad = prepared(output_grads[1], wide),
               load_grad = prepared(output_grads[2], wide), normed = saved[1].contiguous(),
               statistics = saved[2].contiguous();  // routing is cheaper done again than read
  k.gates_grad = pointer(gates_grad);
  k.load_grad = pointer(load_grad);
  k.normed = pointer(normed);
  const Prepared prepared_(layer);  // no statistics yet: they are saved
  k.statistics = pointer(statistics);
  const Tensor by_attribute =
      out_grad.view({k.tokens, k.attributes, k.out}).transpose(0, 1);  // [A, T, o]
  const Tensor mixed_grad = at::bmm(by_attribute, prepared_.scaled_up);
  k.mixed_grad = pointer(mixed_grad);

  k.row_blocks = spectralx_aomoa_backward_blocks(&k);
  layer.fits(k.row_blocks);
  const int64_t per_row = k.dense ? k.experts : k.top_k;
  const Tensor mixed = layer.plain({k.tokens, k.attributes, k.rank});
  const Tensor normed_grad = layer.plain({layer.rows, k.rank});
  const Tensor hidden_rows = layer.plain({layer.rows, per_row, k.hidden});
  const Tensor hidden_grad = layer.plain({layer.rows, per_row, k.hidden});
  const Tensor output_grad = layer.plain({layer.rows, per_row, k.rank});
  const Tensor router_grad = layer.plain({layer.rows, 2 * k.experts});
  const Tensor z_grad = layer.wide({layer.rows, k.rank});
  const Tensor row_terms = layer.wide({layer.rows, 2});
  const Tensor norm_partial = layer.wide({k.row_blocks, 4, k.rank});
  const Tensor slots = at::empty({layer.rows, per_row}, x.options().dtype(at::kShort));
  if (output_mask[kNoise]) {
    grads[kNoise] = layer.wide({k.attributes, k.tokens, k.experts});
    k.noise_grad = pointer(grads[kNoise]);
  }
  k.mixed = pointer(mixed);
  k.normed_grad = pointer(normed_grad);
  k.hidden_rows = pointer(hidden_rows);
  k.hidden_grad = pointer(hidden_grad);
  k.output_grad = pointer(output_grad);
  k.router_grad = pointer(router_grad);
  k.z_grad = pointer(z_grad);
  k.row_terms = pointer(row_terms);
  k.norm_partial = pointer(norm_partial);
  k.slots = pointer(slots);
  check_launch("aomoa_backward", spectralx_aomoa_backward(&k, current_stream()));

  const std::pair<Argument, void**> targets[] = {
      {kScaler, &k.scaler_grad},          {kUp, &k.up_grad},
      {kNorm1Weight, &k.norm1_weight_grad}, {kNorm1Bias, &k.norm1_bias_grad},
      {kDown, &k.down_grad},              {kNorm2Weight, &k.norm2_weight_grad},
      {kNorm2Bias, &k.norm2_bias_grad},   {kGate, &k.gate_grad},
      {kGateNoise, &k.gate_noise_grad},   {kFc1Weight, &k.fc1_weight_grad},
      {kFc1Bias, &k.fc1_bias_grad},       {kFc2Weight, &k.fc2_weight_grad},
      {kFc2Bias, &k.fc2_bias_grad}};
  bool any_part = false;
  for (const auto& [argument, target] : targets) {
    if (!output_mask[argument]) continue;
    grads[argument] = at::empty_like(layer[argument]);
    *target = pointer(grads[argument]);
    any_part = any_part || (argument != kScaler && argument != kUp);
  }
  Tensor parts, up_products, down_products;
  if (any_part) {
    k.splits = spectralx_aomoa_splits(&k);
    parts = layer.wide({k.splits, spectralx_aomoa_partial_size(&k)});
    k.weight_partial = pointer(parts);
    check_launch("aomoa_backward", spectralx_aomoa_gradients(&k, current_stream()));
  }
  const Tensor x_rows = layer[kX].view({layer.rows, k.width});
  if (k.up_grad != nullptr || k.scaler_grad != nullptr) {
    up_products = wide_bmm(by_attribute.transpose(1, 2), mixed.transpose(0, 1));
    k.up_products = pointer(up_products);
  }
  if (k.down_grad != nullptr || k.norm1_weight_grad != nullptr || k.norm1_bias_grad != nullptr) {
    down_products = wide_mm(normed_grad.t(), x_rows);
    k.down_products = pointer(down_products);
  }
  if (output_mask[kX]) {
    grads[kX] = at::mm(out_grad, layer[kWeight]);
    grads[kX].view({layer.rows, k.width}).addmm_(normed_grad, prepared_.folded);
    k.x_grad = pointer(grads[kX]);
  }
  check_launch("aomoa_backward", spectralx_aomoa_finish(&k, current_stream()));
  if (output_mask[kWeight]) grads[kWeight] = at::mm(out_grad.t(), layer[kX]);
  if (output_mask[kBias]) grads[kBias] = out_grad.sum(0);
  return collect();
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("aomoa", &aomoa);
  m.impl("aomoa_backward", &aomoa_backward);
}
