"""What follows a bilinear upsampling, in plain PyTorch: the specification of this room and its
``eager`` backend.

SpectralX, stage 2 (arXiv 2508.01731): convolutions of upsampled maps in UPerNet, cross-entropy
and prediction of upsampled logits. Notation in README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")  # by the integer that the operator takes


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resize(x: Tensor, size: list[int], align_corners: bool) -> Tensor:
    """Bilinear, [B, C, h, w] -> [B, C, H, W]; the map itself where it has that size."""
    if list(x.shape[-2:]) == list(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def upsample_conv2d_by_map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: list[int],
    padding: list[int],
    align_corners: bool,
) -> Tensor:
    """The definition: form the upsampled map, convolve it."""
    return F.conv2d(resize(x, size, align_corners), weight, bias, padding=padding)


def tap_matrices(
    length: int, size: int, kernel: int, padding: int, align_corners: bool, like: Tensor
) -> Tensor:
    """One matrix a tap, [kernel, size + 2 padding - kernel + 1, length], in the dtype of `like`.

    Row y of matrix t holds the weights of the small line in position y + t - padding of the
    upsampled line: zeros where that lies in the padding.
    """
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    # The matrix of the interpolation, one column of the identity a channel: [length, size].
    columns = resize(eye.reshape(1, length, length, 1), [size, 1], align_corners)
    rows = F.pad(columns.reshape(length, size).t(), (0, 0, padding, padding))
    return rows.unfold(0, size + 2 * padding - kernel + 1, 1).transpose(1, 2)


def upsample_conv2d_by_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: list[int],
    padding: list[int],
    align_corners: bool,
) -> Tensor:
    """The identity: 1x1 products on the small map, each upsampled, shifted by its tap, summed.

    Upsampling and shift are one matrix for the rows and one for the columns, so the upsampled
    map is never formed.
    """
    wide = accumulation_dtype(x.dtype)
    batch, _, height, width = x.shape
    out_channels, in_channels, kernel_rows, kernel_columns = weight.shape
    like = x.new_empty((), dtype=wide)
    rows = tap_matrices(height, size[0], kernel_rows, padding[0], align_corners, like)
    columns = tap_matrices(width, size[1], kernel_columns, padding[1], align_corners, like)

    taps = weight.permute(0, 2, 3, 1).reshape(-1, in_channels)  # [O * ky * kx, C]
    products = torch.matmul(taps, x.flatten(2)).to(wide)  # [B, O * ky * kx, h * w]
    products = products.reshape(
        batch, out_channels, kernel_rows, kernel_columns, height, width
    ).transpose(3, 4)
    products = products.reshape(batch, out_channels, kernel_rows * height, kernel_columns * width)
    lines = torch.matmul(products, columns.transpose(1, 2).flatten(0, 1))  # [.., ky * h, W']
    out = torch.matmul(rows.transpose(0, 1).flatten(1), lines)  # [B, O, H', W']
    if bias is not None:
        out = out + bias.to(wide).reshape(-1, 1, 1)
    return out.to(x.dtype)


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    size: list[int],
    padding: list[int],
    align_corners: bool,
    by_taps: bool,
    relu: bool,
) -> Tensor:
    """Convolution of the upsampled map, [B, C, h, w] -> [B, O, H', W'], plus `addend`, ReLU.

    Channels last where `x` is that.
    """
    compute = upsample_conv2d_by_taps if by_taps else upsample_conv2d_by_map
    out = compute(x, weight, bias, size, padding, align_corners)
    if addend is not None:
        out = out + addend
    if relu:
        out = torch.relu(out)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _moments(x: Tensor) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    count = max(x.shape[0] * x.shape[2] * x.shape[3], 1)
    mean = wide.sum((0, 2, 3)) / count
    variance = (wide - mean.reshape(-1, 1, 1)).square().sum((0, 2, 3)) / count
    return torch.stack([mean, variance])


def channel_moments(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel of [B, C, H, W]: [2, C], at least float32.

    Without a gradient: `batch_norm_relu` knows what its moments depend on.
    """
    return _moments(x.detach())


def upsample_conv2d_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    size: list[int],
    padding: list[int],
    align_corners: bool,
    by_taps: bool,
) -> tuple[Tensor, Tensor]:
    """`upsample_conv2d` without the ReLU, and the moments of what it returns."""
    out = upsample_conv2d(x, weight, bias, addend, size, padding, align_corners, by_taps, False)
    return out, channel_moments(out)


def batch_norm_relu(
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    batch: bool,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias by channel, then ReLU if asked.

    With `batch` the moments are those of `x`: they are formed again, so that autograd sees what
    they depend on. Kernels read `moments` and know it.
    """
    wide = accumulation_dtype(x.dtype)
    taken = (_moments(x) if batch else moments).to(wide).reshape(2, -1, 1, 1)
    out = (x.to(wide) - taken[0]) * (taken[1] + eps).rsqrt()
    if weight is not None:
        out = out * weight.to(wide).reshape(-1, 1, 1)
    if bias is not None:
        out = out + bias.to(wide).reshape(-1, 1, 1)
    if relu:
        out = torch.relu(out)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return out.to(x.dtype).contiguous(memory_format=layout)


def cross_entropy(
    upsampled: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    """Cross-entropy of upsampled logits [B, K, H, W] against labels [B, H, W]."""
    wide, classes = upsampled.dtype, upsampled.shape[1]
    log_p = torch.log_softmax(upsampled, dim=1)
    target = target.long()
    valid = target != ignore_index
    known = valid & (target >= 0) & (target < classes)
    label = torch.where(known, target, torch.zeros_like(target)).unsqueeze(1)

    if weight is None:
        weight = torch.ones(classes, dtype=wide, device=upsampled.device)
    weight = weight.to(wide)
    pixel_weight = weight[label.squeeze(1)]
    losses = -log_p.gather(1, label).squeeze(1) * pixel_weight
    if label_smoothing > 0:
        smooth = -(log_p * weight.reshape(1, -1, 1, 1)).sum(dim=1)
        losses = (1 - label_smoothing) * losses + label_smoothing / classes * smooth
    # A label that is neither a class nor ignored makes loss and gradient NaN, never a number.
    wrong = valid & ~known
    losses = losses * torch.where(wrong, torch.nan, torch.ones_like(losses))
    zero = torch.zeros_like(losses)
    losses = torch.where(valid, losses, zero)
    if REDUCTIONS[reduction] == "none":
        return losses
    loss = losses.sum()
    if REDUCTIONS[reduction] == "mean":
        total = torch.where(valid, pixel_weight, zero).sum()
        loss = loss / torch.where(total == 0, torch.ones_like(total), total)
    return loss


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: list[int],
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    align_corners: bool,
    with_gradient: bool = False,
) -> Tensor:
    """Cross-entropy of the upsampled logits.

    `with_gradient` lets a kernel keep the gradient of the logits; here autograd has its own ways.
    """
    upsampled = resize(logits.to(accumulation_dtype(logits.dtype)), size, align_corners)
    loss = cross_entropy(upsampled, target, weight, ignore_index, label_smoothing, reduction)
    return loss.to(logits.dtype)


def upsample_argmax(logits: Tensor, size: list[int], align_corners: bool) -> Tensor:
    """Most probable class [B, H, W] of the upsampled logits, the lowest on ties."""
    wide = accumulation_dtype(logits.dtype)
    return resize(logits.detach().to(wide), size, align_corners).argmax(dim=1)


def upsample_cross_entropy_argmax(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    confusion: Tensor | None,
    size: list[int],
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    align_corners: bool,
    with_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, most probable class [B, H, W], and `confusion` plus the counts of both; or [0, 0]."""
    upsampled = resize(logits.to(accumulation_dtype(logits.dtype)), size, align_corners)
    loss = cross_entropy(upsampled, target, weight, ignore_index, label_smoothing, reduction)
    loss, label = loss.to(logits.dtype), upsampled.detach().argmax(dim=1)
    if confusion is None:
        return loss, label, label.new_empty(0, 0)
    return loss, label, confusion_matrix_update(confusion, label, target, ignore_index)


def upsample_argmax_probability(
    logits: Tensor, size: list[int], align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Softmax probability [B, H, W] of the most probable class, and that class [B, H, W]."""
    wide = accumulation_dtype(logits.dtype)
    upsampled = resize(logits.to(wide), size, align_corners)
    label = upsampled.argmax(dim=1)
    best = upsampled.gather(1, label.unsqueeze(1)).squeeze(1)
    return (best - upsampled.logsumexp(dim=1)).exp().to(logits.dtype), label


def confusion_matrix_update(
    confusion: Tensor, prediction: Tensor, target: Tensor, ignore_index: int
) -> Tensor:
    """`confusion` [K, K] plus the count of pixels of class row predicted as class column."""
    classes = confusion.shape[0]
    prediction, target = prediction.long().flatten(), target.long().flatten()
    counted = (target != ignore_index) & (target >= 0) & (target < classes)
    counted = counted & (prediction >= 0) & (prediction < classes)
    # What is not counted goes to one cell past the end.
    cell = torch.where(
        counted, target * classes + prediction, torch.full_like(target, classes * classes)
    )
    counts = confusion.new_zeros(classes * classes + 1).scatter_add(
        0, cell, torch.ones_like(cell, dtype=confusion.dtype)
    )
    return confusion + counts[:-1].reshape(classes, classes)
