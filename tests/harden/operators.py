"""Every operator of the library with a way to draw its arguments: what rows 1 to 5 share.

`REGISTRY` holds an `Entry` for each name in ``torch.ops.spectralx``; `missing` lists those that
have none. Arguments are drawn in float64; a row casts them and gives them layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spectralx_kernels import _backends
from spectralx_kernels._operator import Operator
from spectralx_kernels.aomoa.ops import AOMOA, GATING
from spectralx_kernels.hypert.attention import ATTRIBUTE_MATCH, WINDOW_ATTENTION
from spectralx_kernels.hypert.dense import FEED_FORWARD, LINEAR_ADD, NORM_LINEAR
from spectralx_kernels.hypert.stem import RESIDUAL_HALVING
from spectralx_kernels.linear.ops import LINEAR, PATCH_CONV2D
from spectralx_kernels.reconstruction.heads import (
    CHANNEL_NORM,
    CHANNEL_NORM_CONV2D,
    GELU_GROUPED_CONV2D,
    PIXEL_HEAD,
)
from spectralx_kernels.reconstruction.masking import (
    GATHER_TOKENS,
    RANDOM_MASKING,
    RESTORE_TOKENS,
)
from spectralx_kernels.reconstruction.ops import (
    BAND_RECONSTRUCTION_LOSS,
    MASKED_PATCH_LOSS,
    UPSAMPLED_L1_LOSS,
)
from spectralx_kernels.refine.ops import ADD_WEIGHTED, GATHER_NORM, GATHER_NORM_MIX, MATCH
from spectralx_kernels.upsample.confusion import CONFUSION_MATRIX_UPDATE
from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D, UPSAMPLE_CONV2D_MOMENTS
from spectralx_kernels.upsample.norm import BATCH_NORM_RELU, CHANNEL_MOMENTS
from spectralx_kernels.upsample.prediction import (
    UPSAMPLE_ARGMAX,
    UPSAMPLE_ARGMAX_PROBABILITY,
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_CROSS_ENTROPY_ARGMAX,
)
from spectralx_kernels.upsample.reference import accumulation_dtype, channel_moments
from tests.harden import calls
from tests.harden.draws import Draw

# Whose class weights no kernel of a GPU differentiates.
WEIGHTED = (UPSAMPLE_CROSS_ENTROPY, UPSAMPLE_CROSS_ENTROPY_ARGMAX)


def as_drawn(args: list[Any]) -> list[Any]:
    return args


@dataclass(frozen=True)
class Entry:
    """An operator and how its arguments are drawn.

    Parameters
    ----------
    operator : of the library.
    draw : its positional arguments, floating point in float64.
    constants : places of arguments that are not differentiated.
    complete : fills in, just before the call, arguments that are functions of others.
    """

    operator: Operator
    draw: Callable[[Draw], Sequence[Any]]
    constants: tuple[int, ...] = ()
    complete: Callable[[list[Any]], list[Any]] = as_drawn

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def names(self) -> list[str]:
        """Of the arguments, as the schema has them."""
        return [argument.name for argument in self.operator.op._schema.arguments]

    def on(self, device: str) -> Entry:
        """As it can be differentiated there: no kernel of a GPU does class weights."""
        if device == "cpu" or self.operator not in WEIGHTED:
            return self
        return replace(self, constants=(*self.constants, self.names.index("weight")))

    @property
    def differentiable(self) -> bool:
        return hasattr(self.operator, "backward_op")


def own_moments(args: list[Any]) -> list[Any]:
    """Moments are those of x where the operator is told so, and as wide as sums are."""
    x, given, *rest = args
    given = channel_moments(x) if rest[-1] else given.to(accumulation_dtype(x.dtype))
    return [x, given, *rest]


ENTRIES = (
    Entry(GATING, calls.gating),
    Entry(AOMOA, calls.aomoa),
    Entry(WINDOW_ATTENTION, calls.window_attention),
    Entry(ATTRIBUTE_MATCH, calls.attribute_match),
    Entry(NORM_LINEAR, calls.norm_linear),
    Entry(LINEAR_ADD, calls.linear_add),
    Entry(LINEAR, calls.linear),
    Entry(PATCH_CONV2D, calls.patch_conv2d),
    Entry(FEED_FORWARD, calls.feed_forward),
    Entry(RESIDUAL_HALVING, calls.residual_halving),
    Entry(RANDOM_MASKING, calls.random_masking),
    Entry(GATHER_TOKENS, calls.gather_tokens),
    Entry(RESTORE_TOKENS, calls.restore_tokens),
    Entry(MASKED_PATCH_LOSS, calls.masked_patch_loss),
    Entry(UPSAMPLED_L1_LOSS, calls.upsampled_l1_loss),
    Entry(BAND_RECONSTRUCTION_LOSS, calls.band_reconstruction_loss),
    Entry(CHANNEL_NORM, calls.channel_norm),
    Entry(CHANNEL_NORM_CONV2D, calls.channel_norm_conv2d),
    Entry(GELU_GROUPED_CONV2D, calls.gelu_grouped_conv2d),
    Entry(PIXEL_HEAD, calls.pixel_head),
    Entry(MATCH, calls.match_argmax),
    Entry(GATHER_NORM, calls.gather_norm),
    Entry(GATHER_NORM_MIX, calls.gather_norm_mix),
    Entry(ADD_WEIGHTED, calls.add_weighted_halves),
    Entry(CONFUSION_MATRIX_UPDATE, calls.confusion_matrix_update),
    Entry(CHANNEL_MOMENTS, calls.moments),
    Entry(BATCH_NORM_RELU, calls.batch_norm_relu, constants=(1,), complete=own_moments),
    Entry(UPSAMPLE_CONV2D, calls.upsample_conv2d),
    Entry(UPSAMPLE_CONV2D_MOMENTS, calls.upsample_conv2d_moments),
    Entry(UPSAMPLE_CROSS_ENTROPY, calls.upsample_cross_entropy),
    Entry(UPSAMPLE_CROSS_ENTROPY_ARGMAX, calls.upsample_cross_entropy_argmax),
    Entry(UPSAMPLE_ARGMAX, calls.upsample_argmax),
    Entry(UPSAMPLE_ARGMAX_PROBABILITY, calls.upsample_argmax),
)
REGISTRY: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
DIFFERENTIABLE = tuple(entry for entry in ENTRIES if entry.differentiable)


def missing() -> list[str]:
    """Operators of the dispatcher's namespace that `REGISTRY` does not hold.

    Backward operators and overloads for Triton belong to the operator they are named after.
    """
    schemas = torch._C._jit_get_all_schemas()
    defined = {schema.name for schema in schemas if schema.name.startswith("spectralx::")}
    names = {name.removeprefix("spectralx::").removesuffix("_backward") for name in defined}
    return sorted((names | set(_backends.operators())) - REGISTRY.keys())
