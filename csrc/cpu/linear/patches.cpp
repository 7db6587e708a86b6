// spectralx::patch_conv2d on the CPU: patches side by side as rows of a linear layer. Backward cuts the
// patches again, so that nothing is kept but the input. See spectralx_kernels/linear/README.md.
#include "cpu/torch.h"

#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/common/linear.h"

namespace {

using namespace spectralx::cpu;
using at::Tensor;
using Optional = std::optional<Tensor>;

struct Patches {
  int64_t batch, channels, tall, wide, height, width, outs;  // a patch's sides; patches down and across

  Patches(const Tensor& x, const Tensor& weight, const Optional& bias) {
    TORCH_CHECK_VALUE(x.dim() == 4, "x: got shape ", x.sizes(), ", expected [batch, channels, height, width]");
    TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) > 0 &&
                          weight.size(3) > 0,
                      "weight: got shape ", weight.sizes(), ", expected [out, ", x.size(1),
                      ", height, width]");
    batch = x.size(0), channels = x.size(1), outs = weight.size(0);
    tall = weight.size(2), wide = weight.size(3);
    height = x.size(2) / tall, width = x.size(3) / wide;
    TORCH_CHECK_VALUE(!bias.has_value() || bias->sizes() == at::IntArrayRef({outs}), "bias: got shape ",
                      bias.has_value() ? bias->sizes() : at::IntArrayRef(), ", expected [", outs, "]");
  }

  int64_t count() const { return batch * height * width; }
  int64_t size() const { return channels * tall * wide; }
  bool covers(const Tensor& x) const { return height * tall == x.size(2) && width * wide == x.size(3); }

  // A contiguous map [B, C, H, W] to its patches' rows [B h w, C tall wide], or back. The rows of a line of
  // patches stay in the cache while the lines of pixels go by.
  template <bool kBack, typename Bytes>
  void move(Bytes run, const Tensor& map, const Tensor& rows) const {
    const int64_t element = map.element_size(), stride = size() * element;
    auto* pixels = static_cast<char*>(map.mutable_data_ptr());
    auto* values = static_cast<char*>(rows.mutable_data_ptr());
    at::parallel_for(0, batch * height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        for (int64_t at = 0; at < channels * tall; ++at) {
          const int64_t plane = line / height * channels + at / tall, y = line % height * tall + at % tall;
          char* from = pixels + (plane * map.size(2) + y) * map.size(3) * element;
          char* to = values + line * width * stride + at * run;
          for (int64_t x = 0; x < width; ++x, from += run, to += stride)
            std::memcpy(kBack ? from : to, kBack ? to : from, run);
        }
      }
    });
  }
  // By the bytes of a patch's line, known to the compiler where they are few.
  template <bool kBack>
  void moved(const Tensor& map, const Tensor& rows) const {
    const int64_t run = wide * map.element_size();
    if (run == 8) return move<kBack>(std::integral_constant<int64_t, 8>(), map, rows);
    if (run == 16) return move<kBack>(std::integral_constant<int64_t, 16>(), map, rows);
    if (run == 32) return move<kBack>(std::integral_constant<int64_t, 32>(), map, rows);
    if (run == 64) return move<kBack>(std::integral_constant<int64_t, 64>(), map, rows);
    move<kBack>(run, map, rows);
  }
  Tensor rows(const Tensor& x) const {
    const Tensor found = at::empty({count(), size()}, x.options());
    moved<false>(x.contiguous(), found);
    return found;
  }
  // Back to the shape and strides of x; pixels of no whole patch get 0.
  Tensor unite(const Tensor& rows, const Tensor& x) const {
    const Tensor map = covers(x) ? at::empty(x.sizes(), x.options()) : at::zeros(x.sizes(), x.options());
    moved<true>(map, rows);
    return x.is_contiguous() ? map : at::empty_like(x).copy_(map);
  }
  // [B h w, O] to [B, O, h, w], channels last.
  Tensor map(const Tensor& rows) const {
    return rows.view({batch, height, width, outs}).permute({0, 3, 1, 2});
  }
};

Tensor matrix(const Tensor& weight) { return weight.reshape({weight.size(0), -1}); }

Tensor patch_conv2d(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const Patches patches(x, weight, bias);
  return patches.map(linear_layer(patches.rows(x), matrix(weight), bias));
}

std::vector<Tensor> patch_conv2d_backward(const c10::List<Optional>& output_grads, const Tensor& x,
                                          const Tensor& weight, const Optional& bias,
                                          at::TensorList /*saved*/, const c10::List<bool>& mask) {
  TORCH_CHECK(output_grads.size() == 1 && mask.size() == 3,
              "output_grads, output_mask: expected 1 and 3 entries");
  const Patches patches(x, weight, bias);
  const Optional given = output_grads[0];
  const Tensor grad = given.has_value() ? given->permute({0, 2, 3, 1}).reshape({patches.count(), patches.outs})
                                        : at::zeros({patches.count(), patches.outs}, x.options());
  std::vector<Tensor> wanted;
  if (mask[0]) {
    const Tensor rows = input_gradient(grad, turned(matrix(weight)));
    wanted.push_back(patches.unite(rows.contiguous(), x));
  }
  if (mask[1]) {
    const Tensor dweight = weight_gradient(grad, patches.rows(x)).view(weight.sizes());
    wanted.push_back(weight.is_contiguous() ? dweight : at::empty_like(weight).copy_(dweight));
  }
  if (mask[2])
    wanted.push_back(grad.sum(0, false, accumulation_type(grad.scalar_type())).to(bias->scalar_type()));
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("patch_conv2d", &patch_conv2d);
  m.impl("patch_conv2d_backward", &patch_conv2d_backward);
}
