// The arguments of spectralx::aomoa as the CPU kernels use them, and how tokens are cut up.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/aomoa/panels.h"
#include "cpu/common/product.h"

namespace spectralx::cpu {

using at::Tensor;

constexpr int64_t kChunk = 512;    // tokens whose intermediates exist at a time
constexpr int64_t kRowBlock = 64;  // rows of a weight, or tokens, that one product takes

// The tensors of the operator, in the order of its schema, and its numbers.
struct Arguments {
  Tensor x, weight, scaler, norm1_weight, norm1_bias, down, norm2_weight, norm2_bias, gate,
      gate_noise, fc1_weight, fc1_bias, fc2_weight, fc2_bias, up;
  std::optional<Tensor> bias, noise;
  int64_t top_k;
  double norm_eps;
};

struct Outputs {
  Tensor out, gates, load, normed, statistics;
};

// Gradients by the names of the schema; only `noise` and `x` may be undefined (not wanted).
struct Gradients {
  Tensor x, scaler, norm1_weight, norm1_bias, down, norm2_weight, norm2_bias, gate, gate_noise,
      noise, fc1_weight, fc1_bias, fc2_weight, fc2_bias, up;
};

// The incoming gradients, what forward kept, and what is wanted.
struct Incoming {
  Tensor out;  // contiguous, of the type of x
  std::optional<Tensor> gates, load;
  Tensor kept_gates, normed, statistics;
  bool want_x, want_noise;
};

// Op float, double, bfloat16: x, out and their gradients in Op, the rest in any type. With
// `frozen` false the frozen layer is left out: of the output and of the gradient of x.
template <typename Op>
Outputs forward(const Arguments& arguments, bool frozen);
template <typename Op>
Gradients backward(const Arguments& arguments, const Incoming& incoming, bool frozen);

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

// Whether grouping tokens by expert pays, or is forced: grouped.cpp.
bool groups_experts(int64_t experts, int64_t top_k);

// Elements of one column of a right operand that belong together.
template <typename Op>
constexpr int64_t kColumn = sizeof(Op) == 2 ? 2 : 1;

// Inner dimension of a part of a long product: 4 KiB a row.
template <typename Op>
constexpr int64_t kDepth = 4096 / sizeof(Op);

// How long products of forward are cut, so that operands stay in the cache while the tiles that share them
// are gone through. Processors with a matrix unit have 2 MiB of L2 cache a core: there a panel meets more
// rows of a weight. The unit is done with a panel before the next part of a weight has come: in bfloat16
// several panels share one.
struct Cut {
  int64_t depth;   // inner dimension of a part
  int64_t rows;    // of the frozen weight that a panel's part meets
  int64_t panels;  // that go through `down` together
};
template <typename Op>
Cut cut_of() {
  if (has_matrix_unit()) return {1024, 128, sizeof(Op) == 2 ? 4 : 1};
  return {kDepth<Op>, kRowBlock, 1};
}

// Asks memory for `width` values of `count` rows that are read or written after the next product.
template <typename Op>
void ask(const Op* rows, int64_t count, int64_t stride, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(Op);  // values of a cache line
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(rows + row * stride + i, 0, 2);
  }
}

// Lanes of a panel of `count` tokens that a product computes: whole vectors. Lanes past the tokens
// hold anything then, and nothing but such products may follow.
inline int64_t lanes_of(int64_t count) { return count <= kPanel / 2 ? kPanel / 2 : kPanel; }

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <typename Op>
struct Layer {
  using W = Wide<Op>;
  static constexpr at::ScalarType kOp = c10::CppTypeToScalarType<Op>::value;
  static constexpr at::ScalarType kWide = c10::CppTypeToScalarType<W>::value;

  const PanelKernels<Op>& k = panel_kernels<Op>();
  Tensor x, weight;                       // of Op, weight wide where `wide`; undefined without the frozen layer
  bool wide = false;                      // products of the frozen layer round its weight as they take it
  Tensor down, fc1, fc2, up;              // of Op: [r, d], [E h, r], [E, r, h], [o, r]
  // Wide, in place where they are stored so, else in `converted`; bias null without one.
  const W *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias, *fc1_bias, *fc2_bias, *scaler, *bias;
  const W* router;                        // [A, scores, r]: gate', then gate_noise' with noise
  Tensor converted;
  std::optional<Tensor> noise;            // wide [A, T, E]
  int64_t tokens, width, attributes, d, rank, hidden, experts, out, top_k, scores;
  W eps;
  bool grouped;  // experts run on the tokens that take them, not on all

  Layer(const Arguments& p, bool frozen)
      : tokens(p.x.size(0)), width(p.x.size(1)), attributes(p.gate.size(0)), d(p.down.size(1)),
        rank(p.gate.size(1)), hidden(p.fc1_weight.size(1)), experts(p.gate.size(2)),
        out(p.up.size(0)), top_k(p.top_k), eps(static_cast<W>(p.norm_eps)),
        grouped(groups_experts(experts, top_k)) {
    const auto operand = [](const Tensor& t) { return t.to(kOp).contiguous(); };
    x = operand(p.x);
    wide = frozen && p.weight.scalar_type() == kWide && kWide != kOp;
    if (frozen) weight = wide ? p.weight.contiguous() : operand(p.weight);
    down = operand(p.down);
    fc1 = operand(p.fc1_weight);
    fc2 = operand(p.fc2_weight);
    up = operand(p.up);
    if (p.noise.has_value()) noise = p.noise->to(kWide).contiguous();
    scores = noise.has_value() ? 2 * experts : experts;
    convert(p, frozen);
  }

  // The vectors and the router. One tensor for all that is not wide: a conversion by ATen takes longer
  // to call than to do.
  void convert(const Arguments& p, bool frozen) {
    const Tensor none;
    const std::pair<const Tensor&, const W*&> vectors[] = {
        {p.norm1_weight, norm1_weight}, {p.norm1_bias, norm1_bias}, {p.norm2_weight, norm2_weight},
        {p.norm2_bias, norm2_bias},     {p.fc1_bias, fc1_bias},     {p.fc2_bias, fc2_bias},
        {p.scaler, scaler},             {frozen && p.bias.has_value() ? *p.bias : none, bias}};
    int64_t size = attributes * scores * rank;
    for (const auto& [from, to] : vectors) size += from.defined() ? from.numel() : 0;
    converted = wide_empty({size});
    W* next = data<W>(converted);
    for (const auto& [from, to] : vectors) {
      to = from.defined() ? widened(from, next) : nullptr;
      if (to == next) next += from.numel();
    }
    router = next;
    const Tensor gates[2] = {p.gate.contiguous(), p.gate_noise.contiguous()};
    for (int64_t i = 0; i < scores / experts; ++i) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gates[i].scalar_type(), "aomoa", [&] {
        const scalar_t* from = gates[i].const_data_ptr<scalar_t>();
        for (int64_t a = 0; a < attributes; ++a) {
          W* to = next + (a * scores + i * experts) * rank;
          for (int64_t j = 0; j < rank; ++j)
            for (int64_t e = 0; e < experts; ++e) to[e * rank + j] = static_cast<W>(*from++);
        }
      });
    }
  }

  // The values of a vector or matrix: where they are, or wide in `to`.
  static const W* widened(const Tensor& tensor, W* to) {
    const Tensor from = tensor.contiguous();
    if (from.is_same(tensor) && from.scalar_type() == kWide) return from.const_data_ptr<W>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, from.scalar_type(), "aomoa", [&] {
      std::copy_n(from.const_data_ptr<scalar_t>(), from.numel(), to);
    });
    return to;
  }

  Tensor wide_zeros(at::IntArrayRef shape) const { return at::zeros(shape, x.options().dtype(kWide)); }
  Tensor wide_empty(at::IntArrayRef shape) const { return at::empty(shape, x.options().dtype(kWide)); }
  Tensor op_empty(at::IntArrayRef shape) const { return at::empty(shape, x.options()); }
};

// A chunk of tokens, in panels: panel q = a B + b holds up to 32 tokens from 32 b on, attribute a. Of two
// attributes' panels two threads take as much each, the short last ones included.
struct Chunk {
  int64_t first, tokens, blocks, panels;

  Chunk(int64_t first_, int64_t all, int64_t attributes)
      : first(first_), tokens(std::min(kChunk, all - first_)), blocks(blocks_of(tokens, kPanel)),
        panels(blocks * attributes) {}

  int64_t padded() const { return blocks * kPanel; }
  int64_t block(int64_t q) const { return q % blocks; }
  int64_t start(int64_t q) const { return block(q) * kPanel; }  // in the chunk
  int64_t attribute(int64_t q) const { return q / blocks; }
  int64_t count(int64_t q) const { return std::min(kPanel, tokens - start(q)); }

  // A part [A, tokens, n] of a tensor [A, T, n].
  Tensor of(const Tensor& whole) const { return whole.narrow(1, first, tokens); }
  std::optional<Tensor> of(const std::optional<Tensor>& whole) const {
    if (!whole.has_value()) return std::nullopt;
    return of(*whole).contiguous();
  }
};

// task(q) for q < count, in parallel; tiles of a matrix unit are given back at the end.
template <typename F>
void over(int64_t count, const F& task) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    task(begin, end);
    end_products();
  });
}

}  // namespace spectralx::cpu
