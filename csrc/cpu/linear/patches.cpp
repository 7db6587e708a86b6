// spectralx::patch_conv2d on the CPU: patches side by side as rows of a linear layer. Backward cuts the
// patches again, so that nothing is kept but the input. See spectralx_kernels/linear/README.md.
#include "cpu/torch.h"

#include <optional>
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

  // The pixels that make up whole patches.
  Tensor whole(const Tensor& x) const {
    return x.narrow(2, 0, height * tall).narrow(3, 0, width * wide);
  }
  // [B, C, H, W] to [B, h, w, C, tall, wide], a view.
  Tensor cut(const Tensor& x) const {
    return whole(x).unflatten(3, {width, wide}).unflatten(2, {height, tall}).permute({0, 2, 4, 1, 3, 5});
  }
  Tensor rows(const Tensor& x) const { return cut(x).reshape({count(), size()}); }
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
    const bool covered = patches.whole(x).sizes() == x.sizes();  // else pixels of no patch, without gradient
    const Tensor dx = covered ? at::empty_like(x) : at::zeros_like(x);
    const Tensor rows = input_gradient(grad, turned(matrix(weight)));
    patches.cut(dx).copy_(rows.view({patches.batch, patches.height, patches.width, patches.channels,
                                     patches.tall, patches.wide}));
    wanted.push_back(dx);
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
