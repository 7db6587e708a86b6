"""Convolution of an upsampled map: declaration, argument checks, public function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spectralx_kernels._checks import check_like, check_map, check_shape, pair
from spectralx_kernels._operator import Operator
from spectralx_kernels.upsample import reference

UPSAMPLE_CONV2D = Operator(
    "upsample_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt[2] size, SymInt[2] padding, "
    "bool align_corners, bool by_taps) -> Tensor",
    reference.upsample_conv2d,
)


def taps_are_cheaper(
    x_shape: Sequence[int], weight_shape: Sequence[int], size: Sequence[int], padding: Sequence[int]
) -> bool:
    """Whether `upsample_conv2d` takes its "taps" algorithm by itself.

    It does where that needs at most half the multiplications of "map": its small products run
    at a lower rate.
    """
    _, channels, height, width = x_shape
    _, _, kernel_rows, kernel_columns = weight_shape
    out_rows = size[0] + 2 * padding[0] - kernel_rows + 1
    out_columns = size[1] + 2 * padding[1] - kernel_columns + 1
    lines = kernel_rows * height
    by_map = channels * kernel_rows * kernel_columns * out_rows * out_columns
    by_taps = channels * lines * kernel_columns * width  # 1x1 products
    by_taps += lines * kernel_columns * width * out_columns  # columns
    by_taps += out_rows * lines * out_columns  # rows
    return 2 * by_taps <= by_map


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: int | Sequence[int],
    padding: int | Sequence[int] | None = None,
    align_corners: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Convolution of the bilinearly upsampled map, stride 1, zero padding.

    Equal to ``conv2d(interpolate(x, size, mode="bilinear"), weight, bias, padding)``.

    Parameters
    ----------
    x : [B, C, h, w].
    weight : [O, C, ky, kx], ky and kx odd. The "taps" algorithm reads it without a copy in
        ``torch.channels_last`` format.
    bias : [O] or None.
    size : height H and width W of the upsampled map; any, smaller ones included.
    padding : zeros around the upsampled map, rows and columns; half the kernel if None, so that
        the output has the size `size`.
    align_corners : as in ``torch.nn.functional.interpolate``.
    algorithm : "map" forms the upsampled map; "taps" takes one 1x1 product a tap on the small
        map, then upsamples and shifts them by small matrices, never forming the upsampled map;
        "auto" takes "taps" where it needs at most half the multiplications. With "taps" a
        non-finite value of x spreads over its whole map instead of its surroundings.
    backend : overrides the default backend.

    Returns
    -------
    [B, O, H + 2 padding - ky + 1, W + 2 padding - kx + 1] in the dtype of `x`, differentiable
    in `x`, `weight` and `bias`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range.

    Source: SpectralX, stage 2: UPerNet's convolutions after a resize.
    """
    check_map("x", x, "channels")
    check_shape("weight", weight, ("out", x.shape[1], "rows", "columns"))
    check_like("weight", weight, "x", x)
    kernel = list(weight.shape[2:])
    if weight.shape[0] == 0 or any(side % 2 == 0 for side in kernel):
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, expected at least 1 output channel and "
            f"odd kernel sides"
        )
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_like("bias", bias, "x", x)
    out_size = pair("size", size, 1)
    pads = [side // 2 for side in kernel] if padding is None else pair("padding", padding, 0)
    for length, pad, side in zip(out_size, pads, kernel, strict=True):
        if length + 2 * pad < side:
            raise ValueError(
                f"size: got {out_size}, expected at least the kernel {kernel} less twice the "
                f"padding {pads}"
            )
    if algorithm not in ("auto", "taps", "map"):
        raise ValueError(f"algorithm: got {algorithm!r}, expected 'auto', 'taps' or 'map'")
    by_taps = algorithm == "taps" or (
        algorithm == "auto" and taps_are_cheaper(x.shape, weight.shape, out_size, pads)
    )
    out: Tensor = UPSAMPLE_CONV2D(
        x, weight, bias, out_size, pads, align_corners, by_taps, backend=backend
    )
    return out
