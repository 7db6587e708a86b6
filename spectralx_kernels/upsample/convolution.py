"""The convolution of upsampled maps: declaration, argument checks, public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectralx_kernels._checks import check_like, check_map, check_shape, pair
from spectralx_kernels._operator import Operator, Saving
from spectralx_kernels.upsample import reference
from spectralx_kernels.upsample.norm import batch_norm_relu

UPSAMPLE_CONV2D = Operator(
    "upsample_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, SymInt[2] size, SymInt[2] padding, "
    "bool align_corners, bool by_taps, bool relu) -> Tensor",
    reference.upsample_conv2d,
    # ReLU's gradient is told from its output.
    saving=Saving(reference.upsample_conv2d, hidden=0, kept=(0,), only_if=8),
    keep_format=True,
)
UPSAMPLE_CONV2D.add_triton("spectralx_kernels.upsample.triton_convolution")

UPSAMPLE_CONV2D_MOMENTS = Operator(
    "upsample_conv2d_moments",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? addend, SymInt[2] size, SymInt[2] padding, "
    "bool align_corners, bool by_taps) -> (Tensor, Tensor)",
    reference.upsample_conv2d_moments,
    keep_format=True,
    constant=(1,),
)
UPSAMPLE_CONV2D_MOMENTS.add_triton("spectralx_kernels.upsample.triton_convolution")


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


def _few_pixels_on_a_cpu(x: Tensor, weight: Tensor, size: Sequence[int]) -> bool:
    """Whether the map is not resized and has fewer pixels than channels, on a CPU.

    The library's convolution lays the weight out anew in every pass, which takes longer there than
    the products: "taps" needs as many of those and reads the weight as it is. Not asked of a traced
    program, whose batch it would fix.
    """
    if torch.compiler.is_compiling():
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    same = list(x.shape[2:]) == list(size) and weight[0, 0].numel() > 1
    return x.device.type == "cpu" and same and pixels <= x.shape[1]


def _size_of(
    x: Tensor, size: int | Sequence[int] | None, scale_factor: float | Sequence[float] | None
) -> list[int]:
    if (size is None) == (scale_factor is None):
        raise ValueError(f"size: got {size} with scale_factor {scale_factor}, expected one of them")
    if size is not None:
        return pair("size", size, 1)
    assert scale_factor is not None
    factors = (
        [float(scale_factor)] * 2
        if isinstance(scale_factor, int | float)
        else [float(factor) for factor in scale_factor]
    )
    if len(factors) != 2 or min(factors) <= 0:
        raise ValueError(f"scale_factor: got {scale_factor}, expected one or two positive numbers")
    sides = [int(length * factor) for length, factor in zip(x.shape[2:], factors, strict=True)]
    if min(sides) < 1:
        raise ValueError(
            f"scale_factor: got {scale_factor}, which makes {list(x.shape[2:])} {sides}, "
            "expected sides of at least 1"
        )
    return sides


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    padding: int | Sequence[int] | None = None,
    align_corners: bool = False,
    addend: Tensor | None = None,
    norm: nn.BatchNorm2d | None = None,
    relu: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Convolution of the bilinearly upsampled map, stride 1, zero padding.

    Equal to ``conv2d(interpolate(x, size, mode="bilinear"), weight, bias, padding)``, then plus
    `addend`, batch norm and a ReLU if asked for.

    Parameters
    ----------
    x : [B, C, h, w].
    weight : [O, C, ky, kx], ky and kx odd; any strides.
    bias : [O] or None.
    size : height H and width W of the upsampled map; any, smaller ones included.
    scale_factor : instead of `size`, one number or two: H = floor(h * factor). Samples are placed
        by the sizes, as ``interpolate`` does with ``recompute_scale_factor=True``.
    padding : zeros around the upsampled map, rows and columns; half the kernel if None, so that
        the output has the size `size`.
    align_corners : as in ``torch.nn.functional.interpolate``.
    addend : [B, O, H', W'], added to the convolution, or None.
    norm : a plain batch norm of O channels to follow, see `batch_norm_relu`. In training its
        statistics are gathered in the pass that writes the convolution. Who has them fixed folds
        them into the weight once (`fold_batch_norm`).
    relu : the larger of the result and 0.
    algorithm : "map" forms the upsampled map; "taps" takes one 1x1 product a tap on the small
        map, then upsamples, shifts and sums those, never forming the upsampled map; "auto" takes
        "taps" where it needs at most half the multiplications. With "taps" a non-finite value of
        x may spread over its whole map instead of its surroundings.
    backend : overrides the default backend.

    Returns
    -------
    [B, O, H', W'] = [B, O, H + 2 padding - ky + 1, W + 2 padding - kx + 1] in the dtype of `x`,
    ``torch.channels_last`` if `x` is; differentiable in `x`, `weight`, `bias` and `addend`.

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
    out_size = _size_of(x, size, scale_factor)
    pads = [side // 2 for side in kernel] if padding is None else pair("padding", padding, 0)
    for length, pad, side in zip(out_size, pads, kernel, strict=True):
        if length + 2 * pad < side:
            raise ValueError(
                f"size: got {out_size}, expected at least the kernel {kernel} less twice the "
                f"padding {pads}"
            )
    if addend is not None:
        sides = [
            length + 2 * pad - side + 1
            for length, pad, side in zip(out_size, pads, kernel, strict=True)
        ]
        check_shape("addend", addend, (x.shape[0], weight.shape[0], *sides))
        check_like("addend", addend, "x", x)
    if algorithm not in ("auto", "taps", "map"):
        raise ValueError(f"algorithm: got {algorithm!r}, expected 'auto', 'taps' or 'map'")
    by_taps = algorithm == "taps" or (
        algorithm == "auto"
        and (
            taps_are_cheaper(x.shape, weight.shape, out_size, pads)
            or _few_pixels_on_a_cpu(x, weight, out_size)
        )
    )
    given = (x, weight, bias, addend, out_size, pads, align_corners, by_taps)
    out: Tensor
    if norm is None:
        out = UPSAMPLE_CONV2D(*given, relu, backend=backend)
        return out
    moments = None
    if norm.training or norm.running_mean is None:
        out, moments = UPSAMPLE_CONV2D_MOMENTS(*given, backend=backend)
    else:
        out = UPSAMPLE_CONV2D(*given, False, backend=backend)
    return batch_norm_relu(out, norm, relu=relu, moments=moments, backend=backend)


def concat_conv2d(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    size: int | Sequence[int] | None = None,
    padding: int | Sequence[int] | None = None,
    align_corners: bool = False,
    addend: Tensor | None = None,
    norm: nn.BatchNorm2d | None = None,
    relu: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Convolution of the concatenation of maps of any sizes, each resized bilinearly.

    The sum of the maps' own convolutions with their slices of the weight, each map at its own
    scale: nothing is concatenated, and what is upsampled is never formed where "taps" pays.

    Parameters
    ----------
    maps : at least one, each [B, C_i, h_i, w_i].
    weight : [O, sum of C_i, ky, kx], ky and kx odd.
    size : height and width of the resized maps; those of the first map if None.
    bias, padding, align_corners, addend, norm, relu, algorithm, backend : see `upsample_conv2d`.

    Returns
    -------
    [B, O, H', W'], as `upsample_conv2d` returns it.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range.

    Source: SpectralX, stage 2: UPerNet's bottleneck and fusion, which convolve concatenated maps.
    """
    if not maps:
        raise ValueError("maps: got none, expected at least one")
    for position, each in enumerate(maps):
        check_map(f"maps[{position}]", each, "channels")
    widths = [each.shape[1] for each in maps]
    check_shape("weight", weight, ("out", sum(widths), "rows", "columns"))
    out_size = pair("size", tuple(maps[0].shape[2:]) if size is None else size, 1)
    # Maps that are not resized first: an ordinary convolution takes no addend in its pass.
    slices = weight.split(widths, dim=1) if len(maps) > 1 else [weight]
    parts = sorted(
        zip(maps, slices, strict=True),
        key=lambda part: list(part[0].shape[2:]) != out_size,
    )
    for position, (each, slice_) in enumerate(parts):
        last = position == len(parts) - 1
        addend = upsample_conv2d(
            each,
            slice_,
            bias if position == 0 else None,
            size=out_size,
            padding=padding,
            align_corners=align_corners,
            addend=addend,
            norm=norm if last else None,
            relu=relu and last,
            algorithm=algorithm,
            backend=backend,
        )
    assert addend is not None
    return addend
