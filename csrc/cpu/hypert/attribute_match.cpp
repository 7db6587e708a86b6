// spectralx::attribute_match on the CPU. The key projection is folded into the queries and the value
// projection taken after the weighted sum (spectralx_kernels/hypert/README.md), so the normed
// features are keys and values at once, and a task is 32 queries of one image.
#include "cpu/torch.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/common/linear.h"
#include "cpu/common/operand_type.h"
#include "cpu/hypert/attention.h"

namespace {

using namespace spectralx::cpu;
using at::Tensor;

// The arguments, and what is made of them for both directions.
struct Match {
  int64_t batch, positions, width, padded, queries, inner;
  at::ScalarType type, wide;
  Tensor features, norm_weight, norm_bias;  // rows [B N, F] and [F], as they came
  Tensor mean, rstd;
  Tensor rows;      // normed features [B, N, padded] of operands
  Tensor q, k, v;   // wide: queries [M, d], key and value weights [d, F]
  Tensor folded;    // queries times key weights [M, padded] of operands
  double scale;

  Match(const Tensor& x, const Tensor& queries_, const Tensor& norm_weight_,
        const Tensor& norm_bias_, const Tensor& kv_weight, double norm_eps) {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) > 0, "features: got shape ", x.sizes(),
                      ", expected [batch, positions, width] of at least one position");
    batch = x.size(0), positions = x.size(1), width = x.size(2);
    TORCH_CHECK_VALUE(queries_.dim() == 2 && queries_.size(1) > 0, "queries: got shape ",
                      queries_.sizes(), ", expected [queries, width]");
    queries = queries_.size(0), inner = queries_.size(1);
    TORCH_CHECK_VALUE(kv_weight.sizes() == at::IntArrayRef({2 * inner, width}),
                      "kv_weight: got shape ", kv_weight.sizes(), ", expected [", 2 * inner, ", ",
                      width, "]");
    TORCH_CHECK_VALUE(norm_weight_.numel() == width && norm_bias_.numel() == width,
                      "norm_weight, norm_bias: got ", norm_weight_.numel(), " and ",
                      norm_bias_.numel(), " values, expected ", width);
    type = operand_type(x);
    with_operands(type, [&](auto tag) { padded = padded_depth<decltype(tag)>(width); });
    wide = accumulation_type(x.scalar_type());
    features = x.reshape({batch * positions, width}).contiguous();
    norm_weight = norm_weight_, norm_bias = norm_bias_;
    Tensor normed;
    std::tie(normed, mean, rstd) =
        at::native_layer_norm(features, {width}, norm_weight, norm_bias, norm_eps);
    rows = filled(normed.to(type)).view({batch, positions, padded});
    q = queries_.to(wide).contiguous();
    const Tensor kv = kv_weight.to(wide);
    k = kv.narrow(0, 0, inner).contiguous(), v = kv.narrow(0, inner, inner).contiguous();
    folded = filled(at::mm(q, k).to(type));
    scale = 1 / std::sqrt(static_cast<double>(inner));
  }

  // Rows [.., F] filled up with zeros to `padded`.
  Tensor filled(const Tensor& values) const {
    return padded == width ? values.contiguous() : at::constant_pad_nd(values, {0, padded - width});
  }
  // The first F columns of rows [.., padded].
  Tensor cut(const Tensor& values) const { return values.narrow(-1, 0, width); }
  int64_t tiles() const { return (queries + kPanel - 1) / kPanel; }
};

// The features of one image as keys and values.
template <typename Op>
Keys<Op> keys_of(const Match& m, const Op* rows, const Op* turned) {
  return {m.positions, m.padded, m.padded, rows, turned, rows, turned};
}

// rows [N][padded] to turned [padded][padded_depth(N)].
template <typename Op>
void turn(const Match& m, const Op* rows, Op* turned) {
  const int64_t stride = padded_depth<Op>(m.positions);
  attention_kernels<Op>().transpose(rows, m.positions, m.padded, m.padded, stride, turned);
  for (int64_t c = 0; c < m.padded; ++c)
    std::fill(turned + c * stride + m.positions, turned + (c + 1) * stride, Op(0));
}

// found [B, M, padded]: the weighted sums of normed features. As many images at a time as threads.
template <typename Op>
void forward(const Match& m, const Tensor& found) {
  using W = Wide<Op>;
  const Op* rows = m.rows.const_data_ptr<Op>();
  const Op* folded = m.folded.const_data_ptr<Op>();
  Op* to = found.mutable_data_ptr<Op>();
  const int64_t image = m.positions * m.padded, turned_image = m.padded * padded_depth<Op>(m.positions);
  const int64_t group = std::max<int64_t>(1, std::min<int64_t>(m.batch, at::get_num_threads()));
  const Tensor turned = at::empty({group, turned_image}, m.rows.options());
  Op* turned_rows = turned.mutable_data_ptr<Op>();
  for (int64_t start = 0; start < m.batch; start += group) {
    const int64_t images = std::min(group, m.batch - start);
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        turn(m, rows + (start + i) * image, turned_rows + i * turned_image);
    });
    at::parallel_for(0, images * m.tiles(), 1, [&](int64_t begin, int64_t end) {
      Tile<Op> tile(m.positions, m.padded, m.padded, false);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / m.tiles(), first = task % m.tiles() * kPanel;
        const int64_t n = std::min(kPanel, m.queries - first);
        std::copy_n(folded + first * m.padded, n * m.padded, tile.q.data());
        tile.forward(keys_of(m, rows + (start + i) * image, turned_rows + i * turned_image), n,
                     static_cast<W>(m.scale), W(1),
                     to + ((start + i) * m.queries + first) * m.padded);
      }
      end_products();
    });
  }
}

// From dfound [B, M, padded]: found again, the gradient of the normed features [B, N, padded] and, by
// image, that of the folded queries [B, M, padded]. A task is an image.
template <typename Op>
void backward(const Match& m, const Tensor& dfound, const Tensor& found, const Tensor& drows,
              const Tensor& dfolded) {
  using W = Wide<Op>;
  const Op* rows = m.rows.const_data_ptr<Op>();
  const Op* folded = m.folded.const_data_ptr<Op>();
  const Op* upstream = dfound.const_data_ptr<Op>();
  Op* sums = found.mutable_data_ptr<Op>();
  W* to = drows.mutable_data_ptr<W>();
  W* to_folded = dfolded.mutable_data_ptr<W>();
  at::parallel_for(0, m.batch, 1, [&](int64_t begin, int64_t end) {
    Tile<Op> tile(m.positions, m.padded, m.padded, true);
    std::vector<Op> turned(m.padded * padded_depth<Op>(m.positions));
    for (int64_t image = begin; image < end; ++image) {
      const Op* image_rows = rows + image * m.positions * m.padded;
      W* drow = to + image * m.positions * m.padded;
      turn(m, image_rows, turned.data());
      const Keys<Op> keys = keys_of(m, image_rows, turned.data());
      for (int64_t first = 0; first < m.queries; first += kPanel) {
        const int64_t n = std::min(kPanel, m.queries - first);
        const int64_t at = (image * m.queries + first) * m.padded;
        std::copy_n(folded + first * m.padded, n * m.padded, tile.q.data());
        std::copy_n(upstream + at, n * m.padded, tile.dout.data());
        tile.forward(keys, n, static_cast<W>(m.scale), W(1), sums + at);
        tile.backward(keys, n, static_cast<W>(m.scale), W(1), drow, drow, to_folded + at);
      }
    }
    end_products();
  });
}

Tensor attribute_match(const Tensor& features, const Tensor& queries, const Tensor& norm_weight,
                       const Tensor& norm_bias, const Tensor& kv_weight, double norm_eps) {
  const Match m(features, queries, norm_weight, norm_bias, kv_weight, norm_eps);
  const Tensor found = at::empty({m.batch * m.queries, m.padded}, m.rows.options());
  with_operands(m.type, [&](auto tag) { forward<decltype(tag)>(m, found); });
  return linear_layer(m.cut(found).contiguous(), m.v.to(m.type))
      .to(features.scalar_type())
      .view({m.batch, m.queries, m.inner});
}

std::vector<Tensor> attribute_match_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& features,
    const Tensor& queries, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& kv_weight, double norm_eps, at::TensorList /*saved*/,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 6,
              "output_grads, output_mask: expected 1 and 6 entries");
  const std::optional<Tensor> grad = output_grads[0];
  const Tensor inputs[] = {features, queries, norm_weight, norm_bias, kv_weight};
  std::vector<Tensor> wanted;
  if (!grad.has_value()) {
    for (int64_t i = 0; i < 5; ++i)
      if (output_mask[i]) wanted.push_back(at::zeros(inputs[i].sizes(), inputs[i].options()));
    return wanted;
  }
  const Match m(features, queries, norm_weight, norm_bias, kv_weight, norm_eps);
  const auto wide = m.rows.options().dtype(accumulation_type(m.type));
  const Tensor dout = grad->reshape({m.batch * m.queries, m.inner}).to(m.type);
  const Tensor dfound = m.filled(at::mm(dout, m.v.to(m.type)));
  const Tensor found = at::empty({m.batch * m.queries, m.padded}, m.rows.options());
  const Tensor drows = at::zeros({m.batch * m.positions, m.padded}, wide);
  const Tensor parts = at::empty({m.batch, m.queries * m.padded}, wide);
  with_operands(m.type, [&](auto tag) {
    backward<decltype(tag)>(m, dfound, found, drows, parts);
  });
  const Tensor dfolded = m.cut(parts.sum(0).view({m.queries, m.padded}));
  const auto type = features.scalar_type();
  auto [dfeatures, dweight, dbias] = at::native_layer_norm_backward(
      m.cut(drows).to(type).contiguous(), m.features, {m.width}, m.mean, m.rstd, m.norm_weight,
      m.norm_bias, {output_mask[0], output_mask[2], output_mask[3]});
  if (output_mask[0]) wanted.push_back(dfeatures.view(features.sizes()));
  if (output_mask[1]) wanted.push_back(at::mm(dfolded, m.k.t()).to(type));
  if (output_mask[2]) wanted.push_back(dweight.to(type));
  if (output_mask[3]) wanted.push_back(dbias.to(type));
  if (output_mask[4]) {
    const Tensor dv = at::mm(dout.t(), m.cut(found)).to(m.wide);
    wanted.push_back(at::cat({at::mm(m.q.t(), dfolded), dv}).to(type));
  }
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("attribute_match", &attribute_match);
  m.impl("attribute_match_backward", &attribute_match_backward);
}
