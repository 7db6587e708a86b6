"""The stem's operator: declaration, argument checks, public function."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralx_kernels._checks import check_like, check_map, check_shape
from spectralx_kernels._operator import Operator, Saving
from spectralx_kernels.hypert import stem_reference

RESIDUAL_HALVING = Operator(
    "residual_halving",
    "(Tensor x, Tensor? lift_weight, Tensor? lift_bias, Tensor weight, Tensor bias, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor half_weight, Tensor half_bias, "
    "Tensor? half_norm_weight, Tensor? half_norm_bias, float eps, bool keep) "
    "-> (Tensor out, Tensor table, Tensor half_table, Tensor convolved, Tensor halved)",
    stem_reference.residual_halving,
    saving=Saving(stem_reference.residual_halving_saving, 4, (1, 2, 3, 4), shown=2),
    keep_format=True,
)
RESIDUAL_HALVING.add_triton("spectralx_kernels.hypert.triton_stem")

Pair = tuple[Tensor, Tensor]  # a weight and a bias


def residual_halving(
    x: Tensor,
    convolution: Pair,
    halving: Pair,
    *,
    lift: Pair | None = None,
    norm: Pair | None = None,
    half_norm: Pair | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A residual 3x3 convolution and a 2x2 convolution of stride 2, each with its batch norm.

    ``BN(conv2x2/2(a + GELU(BN(conv3x3(a)))))`` with ``a = conv1x1(x)``, or ``a = x``. Batch norms
    take the statistics of this batch; running ones are folded into the convolutions beforehand.

    Parameters
    ----------
    x : [B, C, H, W] with H and W even; a floating-point dtype.
    convolution : weight [M, M, 3, 3] and bias [M]; zero padding.
    halving : weight [N, M, 2, 2] and bias [N].
    lift : weight [M, C, 1, 1] and bias [M], or None where C = M channels come in.
    norm : weight and bias [M] of the batch norm after the 3x3 convolution, or None.
    half_norm : weight and bias [N] of that after the halving, or None.
    eps : of both batch norms.
    backend : overrides the default backend.

    Returns
    -------
    out : [B, N, H/2, W/2] in the dtype of `x`, ``torch.channels_last`` but from ``eager``.
    table : [4, M] in float32 (float64 for float64), of `norm`: mean, variance (divided by the
        count), scale and shift of ``(x - mean) * scale + shift``; [4, 0] without. Not
        differentiable.
    half_table : [4, N], of `half_norm`; the same.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX (arXiv 2508.01731), stem of the hyper tokenizer.
    """
    check_map("x", x, "channels")
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: got {x.shape[2]} x {x.shape[3]} pixels, expected even sides")
    inner = x.shape[1] if lift is None else lift[0].shape[0]
    outer = halving[0].shape[0]
    shapes: dict[str, tuple[Pair | None, tuple[int | str, ...]]] = {
        "lift": (lift, ("channels", x.shape[1], 1, 1)),
        "convolution": (convolution, (inner, inner, 3, 3)),
        "norm": (norm, (inner,)),
        "halving": (halving, ("channels", inner, 2, 2)),
        "half_norm": (half_norm, (outer,)),
    }
    for name, (pair, shape) in shapes.items():
        if pair is None:
            continue
        check_shape(f"weight of {name}", pair[0], shape)
        check_shape(f"bias of {name}", pair[1], (pair[0].shape[0],))
        for part, tensor in zip(("weight", "bias"), pair, strict=True):
            check_like(f"{part} of {name}", tensor, "x", x)
    tensors = [
        x,
        *(lift or (None, None)),
        *convolution,
        *(norm or (None, None)),
        *halving,
        *(half_norm or (None, None)),
    ]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out, table, half_table = RESIDUAL_HALVING(*tensors, eps, keep, backend=backend)
    return out, table, half_table
