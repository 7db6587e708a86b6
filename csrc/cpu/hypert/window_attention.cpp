// spectralx::window_attention on the CPU. A task is a head of a window of an image; windows are
// addresses in the map, of which a task copies its rows into its own cache. Padded positions are one
// key that counts as often as there are. Backward makes scores again and keeps nothing.
#include "cpu/torch.h"

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/common/operand_type.h"
#include "cpu/hypert/attention.h"

namespace {

using namespace spectralx::cpu;
using at::Tensor;

struct Sizes {
  int64_t batch, height, width, channels, heads, rows, columns;  // channels: D

  int64_t dim() const { return channels / heads; }
  int64_t across() const { return (width + columns - 1) / columns; }
  int64_t windows() const { return (height + rows - 1) / rows * across(); }
  int64_t tasks() const { return batch * windows() * heads; }
  int64_t most_keys() const {
    const int64_t all = std::min(rows, height) * std::min(columns, width);
    return all + (height % rows != 0 || width % columns != 0 ? 1 : 0);
  }
};

// Where the rows of one task lie.
struct Window {
  int64_t image, head, number;      // number: of the window among those of all images
  int64_t copies;                   // of the padded position
  std::vector<int64_t> positions;   // in the tensor [B * H * W]

  Window(const Sizes& s, int64_t task) : head(task % s.heads), number(task / s.heads) {
    image = number / s.windows();
    const int64_t window = number % s.windows();
    const int64_t top = window / s.across() * s.rows, left = window % s.across() * s.columns;
    const int64_t bottom = std::min(top + s.rows, s.height);
    const int64_t right = std::min(left + s.columns, s.width);
    for (int64_t y = top; y < bottom; ++y) {
      for (int64_t x = left; x < right; ++x) positions.push_back((image * s.height + y) * s.width + x);
    }
    copies = s.rows * s.columns - static_cast<int64_t>(positions.size());
  }
  int64_t queries() const { return static_cast<int64_t>(positions.size()); }
  int64_t keys() const { return queries() + (copies > 0 ? 1 : 0); }
};

Sizes checked(const Tensor& qkv, const std::optional<Tensor>& padding, int64_t num_heads,
              at::IntArrayRef window) {
  TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.size(3) > 0 && qkv.size(3) % 3 == 0,
                    "qkv: got shape ", qkv.sizes(), ", expected [batch, height, width, 3 * channels]");
  TORCH_CHECK_VALUE(num_heads > 0 && qkv.size(3) / 3 % num_heads == 0, "num_heads: got ", num_heads,
                    ", expected a divisor of ", qkv.size(3) / 3);
  TORCH_CHECK_VALUE(window.size() == 2 && window[0] > 0 && window[1] > 0, "window: got ", window,
                    ", expected two sizes of at least 1");
  const Sizes s{qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3,
                num_heads,   window[0],   window[1]};
  const bool divides = s.height % s.rows == 0 && s.width % s.columns == 0;
  TORCH_CHECK_VALUE(divides || (padding.has_value() && padding->numel() == 3 * s.channels),
                    "padding: expected [", 3 * s.channels, "]");
  return s;
}

// One thread's copies of the rows of its task.
template <typename Op>
struct Head {
  using W = Wide<Op>;
  const Sizes& s;
  int64_t dim, padded;  // width of a head, and as products take it
  Tile<Op> tile;
  std::vector<Op> k, v, turned, found;
  std::vector<W> dk, dv, dq;

  Head(const Sizes& sizes, bool backward)
      : s(sizes), dim(s.dim()), padded(padded_depth<Op>(dim)), tile(s.most_keys(), padded, padded, backward),
        k(s.most_keys() * padded), v(k.size()), turned(padded_depth<Op>(s.most_keys()) * padded),
        found(kPanel * padded) {
    if (!backward) return;
    dk.resize(k.size());
    dv.resize(k.size());
    dq.resize(kPanel * padded);
  }

  // Rows from `first` on; those of part 0 (q), 1 (k) or 2 (v) where a position has 3 D channels.
  void gather(const Op* from, int64_t stride, int64_t offset, const Window& window, int64_t first,
              int64_t count, Op* to) const {
    for (int64_t i = 0; i < count; ++i, to += padded) {
      std::memcpy(to, from + window.positions[first + i] * stride + offset, dim * sizeof(Op));
      for (int64_t c = dim; c < padded; ++c) to[c] = Op(0);
    }
  }

  // Keys and values; of which `turned` is the transpose.
  Keys<Op> load(const Op* qkv, const Op* padding, const Window& window, bool turn_keys) {
    const int64_t keys = window.keys(), queries = window.queries(), stride = padded_depth<Op>(keys);
    for (int64_t part = 1; part < 3; ++part) {
      Op* to = part == 1 ? k.data() : v.data();
      const int64_t offset = part * s.channels + window.head * dim;
      gather(qkv, 3 * s.channels, offset, window, 0, queries, to);
      if (keys == queries) continue;
      std::copy(padding + offset, padding + offset + dim, to + queries * padded);
      std::fill(to + queries * padded + dim, to + keys * padded, Op(0));
    }
    tile.keys = keys;
    tile.kernels.transpose(turn_keys ? k.data() : v.data(), keys, padded, padded, stride,
                           turned.data());
    for (int64_t c = 0; c < padded; ++c)
      std::fill(turned.begin() + c * stride + keys, turned.begin() + (c + 1) * stride, Op(0));
    return {keys, padded, padded, k.data(), turned.data(), v.data(), turned.data()};
  }
};

template <typename Op>
void forward(const Sizes& s, const Tensor& qkv, const Tensor& padding, const Tensor& out) {
  using W = Wide<Op>;
  const Op* from = qkv.const_data_ptr<Op>();
  const Op* pad = padding.defined() ? padding.const_data_ptr<Op>() : nullptr;
  Op* to = out.mutable_data_ptr<Op>();
  const W scale = W(1) / std::sqrt(static_cast<W>(s.dim()));
  at::parallel_for(0, s.tasks(), 1, [&](int64_t begin, int64_t end) {
    Head<Op> head(s, false);
    for (int64_t task = begin; task < end; ++task) {
      const Window window(s, task);
      const Keys<Op> keys = head.load(from, pad, window, false);
      const W copies = static_cast<W>(std::max<int64_t>(window.copies, 1));
      const int64_t offset = window.head * head.dim;
      for (int64_t first = 0; first < window.queries(); first += kPanel) {
        const int64_t n = std::min(kPanel, window.queries() - first);
        head.gather(from, 3 * s.channels, offset, window, first, n, head.tile.q.data());
        head.tile.forward(keys, n, scale, copies, head.found.data());
        for (int64_t i = 0; i < n; ++i) {
          const Op* row = head.found.data() + i * head.padded;
          std::copy(row, row + head.dim, to + window.positions[first + i] * s.channels + offset);
        }
      }
    }
    end_products();
  });
}

// Every value of dqkv [B, H, W, 3D] is written once. padding_parts [B * windows, 3D], or undefined.
template <typename Op>
void backward(const Sizes& s, const Tensor& dout, const Tensor& qkv, const Tensor& padding,
              const Tensor& dqkv, const Tensor& padding_parts) {
  using W = Wide<Op>;
  const Op* from = qkv.const_data_ptr<Op>();
  const Op* pad = padding.defined() ? padding.const_data_ptr<Op>() : nullptr;
  const Op* upstream = dout.const_data_ptr<Op>();
  Op* to = dqkv.mutable_data_ptr<Op>();
  W* parts = padding_parts.defined() ? padding_parts.mutable_data_ptr<W>() : nullptr;
  const W scale = W(1) / std::sqrt(static_cast<W>(s.dim()));
  at::parallel_for(0, s.tasks(), 1, [&](int64_t begin, int64_t end) {
    Head<Op> head(s, true);
    Tile<Op>& tile = head.tile;
    for (int64_t task = begin; task < end; ++task) {
      const Window window(s, task);
      const Keys<Op> keys = head.load(from, pad, window, true);
      const W copies = static_cast<W>(std::max<int64_t>(window.copies, 1));
      const int64_t offset = window.head * head.dim, queries = window.queries();
      std::fill(head.dk.begin(), head.dk.end(), W(0));
      std::fill(head.dv.begin(), head.dv.end(), W(0));
      const auto put = [&](const W* rows, int64_t first, int64_t count, int64_t part) {
        for (int64_t i = 0; i < count; ++i) {
          tile.kernels.store(rows + i * head.padded, head.dim,
                             to + window.positions[first + i] * 3 * s.channels +
                                 part * s.channels + offset);
        }
      };
      for (int64_t first = 0; first < queries; first += kPanel) {
        const int64_t n = std::min(kPanel, queries - first);
        head.gather(from, 3 * s.channels, offset, window, first, n, tile.q.data());
        head.gather(upstream, s.channels, offset, window, first, n, tile.dout.data());
        tile.backward(keys, n, scale, copies, head.dk.data(), head.dv.data(), head.dq.data());
        put(head.dq.data(), first, n, 0);
      }
      put(head.dk.data(), 0, queries, 1);
      put(head.dv.data(), 0, queries, 2);
      if (parts == nullptr || window.copies == 0) continue;
      W* part = parts + window.number * 3 * s.channels + offset;
      std::copy_n(head.dk.data() + queries * head.padded, head.dim, part + s.channels);
      std::copy_n(head.dv.data() + queries * head.padded, head.dim, part + 2 * s.channels);
    }
    end_products();
  });
}

Tensor window_attention(const Tensor& qkv, const std::optional<Tensor>& padding, int64_t num_heads,
                        at::IntArrayRef window) {
  const Sizes s = checked(qkv, padding, num_heads, window);
  const auto type = operand_type(qkv);
  const Tensor rows = operands(qkv, type), pad = operands(padding, type);
  const Tensor out = at::empty({s.batch, s.height, s.width, s.channels}, rows.options());
  with_operands(type, [&](auto tag) { forward<decltype(tag)>(s, rows, pad, out); });
  return out.to(qkv.scalar_type());
}

std::vector<Tensor> window_attention_backward(const c10::List<std::optional<Tensor>>& output_grads,
                                              const Tensor& qkv,
                                              const std::optional<Tensor>& padding,
                                              int64_t num_heads, at::IntArrayRef window,
                                              at::TensorList /*saved*/,
                                              const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 4,
              "output_grads, output_mask: expected 1 and 4 entries");
  const Sizes s = checked(qkv, padding, num_heads, window);
  const auto type = operand_type(qkv);
  const std::optional<Tensor> grad = output_grads[0];
  const bool padded = s.height % s.rows != 0 || s.width % s.columns != 0;
  Tensor dqkv, parts;
  if (grad.has_value()) {
    TORCH_CHECK_VALUE(grad->sizes() ==
                          at::IntArrayRef({s.batch, s.height, s.width, s.channels}),
                      "output_grads: got shape ", grad->sizes());
    const Tensor rows = operands(qkv, type), pad = operands(padding, type);
    const Tensor dout = operands(grad, type);
    dqkv = at::empty(rows.sizes(), rows.options());
    if (output_mask[1] && padded) {
      parts = at::zeros({s.batch * s.windows(), 3 * s.channels},
                        rows.options().dtype(accumulation_type(type)));
    }
    with_operands(type, [&](auto tag) { backward<decltype(tag)>(s, dout, rows, pad, dqkv, parts); });
  }
  std::vector<Tensor> wanted;
  if (output_mask[0]) {
    wanted.push_back(dqkv.defined() ? dqkv.to(qkv.scalar_type())
                                    : at::zeros(qkv.sizes(), qkv.options()));
  }
  if (output_mask[1]) {
    wanted.push_back(parts.defined() ? parts.sum(0).to(padding->scalar_type())
                                     : at::zeros(padding->sizes(), padding->options()));
  }
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("window_attention", &window_attention);
  m.impl("window_attention_backward", &window_attention_backward);
}
