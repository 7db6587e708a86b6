"""The public function of every operator, from the operator's own arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

import spectralx_kernels as kernels
from spectralx_kernels.hypert.dense import feed_forward, linear_add, norm_linear
from spectralx_kernels.upsample.reference import REDUCTIONS

Named = dict[str, Any]


class Public(NamedTuple):
    """A public function.

    Parameters
    ----------
    call : it, from its arguments by the names that its errors give them, and a backend.
    arguments : those from the operator's; the same names and values by default.
    """

    call: Callable[..., Any]
    arguments: Callable[[Named], Named] = dict


def _without(*names: str) -> Callable[[Named], Named]:
    return lambda named: {name: value for name, value in named.items() if name not in names}


def _residual_halving(backend: str | None, x: Any, eps: float, **flat: Any) -> Any:
    pairs: dict[str, Any] = {}
    for name in ("convolution", "halving", "lift", "norm", "half_norm"):
        weight = flat[f"weight of {name}"]
        pairs[name] = None if weight is None else (weight, flat[f"bias of {name}"])
    return kernels.residual_halving(x, eps=eps, backend=backend, **pairs)


def _halving_arguments(named: Named) -> Named:
    found = {"x": named["x"], "eps": named["eps"]}
    for name, prefix in (
        ("convolution", ""), ("halving", "half_"), ("lift", "lift_"), ("norm", "norm_"),
        ("half_norm", "half_norm_"),
    ):  # fmt: skip
        for part in ("weight", "bias"):
            found[f"{part} of {name}"] = named[prefix + part]
    return found


def _convolution_arguments(named: Named) -> Named:
    found = _without("by_taps", "relu")(named)
    return {**found, "algorithm": "taps" if named["by_taps"] else "map"}


def _norm_of(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def _loss_arguments(named: Named) -> Named:
    found = _without("with_gradient")(named)
    return {**found, "reduction": REDUCTIONS[named["reduction"]]}


def _confusion(backend: str | None, *, ignore_index: int, **given: Any) -> Any:
    return kernels.confusion_matrix_update(**given, ignore_index=ignore_index, backend=backend)


def _layer_norm(x: Any) -> nn.LayerNorm:
    return nn.LayerNorm(x.shape[1]).to(x)


def _norm_arguments(named: Named) -> Named:
    found = _without("weight", "bias", "eps")(named)
    return {**found, "norm": _layer_norm(named["x"])}


def _norm_convolution_arguments(named: Named) -> Named:
    x, weight, transposed = named["x"], named["weight"], named["transposed"]
    ins, outs = weight.shape[:2] if transposed else reversed(weight.shape[:2])
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    sides = {"stride": named["stride"], "padding": named["padding"]}
    convolution = kind(ins, outs, weight.shape[2:], **sides).to(x)
    norm = None if named["norm_weight"] is None else _layer_norm(x)
    given = {name: named[name] for name in ("before", "after")}
    return {"x": x, "norm": norm, "convolution": convolution, **given}


def _grouped_arguments(named: Named) -> Named:
    return {
        "x": named["x"],
        "weight of grouped": named["weight"],
        "bias of grouped": named["bias"],
    }


def _gelu_grouped_conv2d(backend: str | None, x: Any, **flat: Any) -> Any:
    grouped = flat["weight of grouped"], flat["bias of grouped"]
    return kernels.gelu_grouped_conv2d(x, grouped, backend=backend)


PIXEL_PAIRS = ("expand", "grouped", "mix", "project")


def _pixel_arguments(named: Named) -> Named:
    found = {"x": named["x"]}
    for name in PIXEL_PAIRS:
        found[f"weight of {name}"] = named[name]
        found[f"bias of {name}"] = named[f"{name}_bias"]
    return {**found, "keep": named["keep"]}


def _pixel_head(backend: str | None, x: Any, keep: bool, **flat: Any) -> Any:
    pairs = {name: (flat[f"weight of {name}"], flat[f"bias of {name}"]) for name in PIXEL_PAIRS}
    return kernels.pixel_head(x, keep=keep, backend=backend, **pairs)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda backend, **given: function(**given, backend=backend)


PUBLIC: dict[str, Public] = {
    "noisy_topk_gating": Public(_plain(kernels.noisy_topk_gating)),
    "aomoa": Public(_plain(kernels.aomoa)),
    "window_attention": Public(_plain(kernels.window_attention)),
    "attribute_match": Public(_plain(kernels.attribute_match)),
    "norm_linear": Public(_plain(norm_linear)),
    "linear_add": Public(_plain(linear_add)),
    "linear": Public(_plain(kernels.linear)),
    "patch_conv2d": Public(_plain(kernels.patch_conv2d)),
    "feed_forward": Public(_plain(feed_forward)),
    "residual_halving": Public(_residual_halving, _halving_arguments),
    "random_masking": Public(_plain(kernels.random_masking)),
    "gather_tokens": Public(_plain(kernels.gather_tokens)),
    "restore_tokens": Public(_plain(kernels.restore_tokens)),
    "masked_patch_loss": Public(_plain(kernels.masked_patch_loss)),
    "upsampled_l1_loss": Public(_plain(kernels.upsampled_l1_loss)),
    "band_reconstruction_loss": Public(_plain(kernels.band_reconstruction_loss)),
    "channel_norm": Public(_plain(kernels.channel_norm), _norm_arguments),
    "channel_norm_conv2d": Public(_plain(kernels.channel_norm_conv2d), _norm_convolution_arguments),
    "gelu_grouped_conv2d": Public(_gelu_grouped_conv2d, _grouped_arguments),
    "pixel_head": Public(_pixel_head, _pixel_arguments),
    "match_argmax": Public(_plain(kernels.match_argmax)),
    "gather_norm": Public(_plain(kernels.gather_norm)),
    "gather_norm_mix": Public(_plain(kernels.gather_norm_mix)),
    "add_weighted_halves": Public(_plain(kernels.add_weighted_halves)),
    "confusion_matrix_update": Public(_confusion),
    "channel_moments": Public(
        _plain(kernels.batch_norm_relu),
        lambda named: {"x": named["x"], "norm": _norm_of(named["x"].shape[1])},
    ),
    "batch_norm_relu": Public(
        _plain(kernels.batch_norm_relu),
        lambda named: {
            "x": named["x"],
            "norm": _norm_of(named["x"].shape[1]),
            "moments": named["moments"],
            "relu": named["relu"],
        },
    ),
    "upsample_conv2d": Public(
        _plain(kernels.upsample_conv2d),
        lambda named: {**_convolution_arguments(named), "relu": named["relu"]},
    ),
    "upsample_conv2d_moments": Public(
        _plain(kernels.upsample_conv2d),
        lambda named: {
            **_convolution_arguments(named),
            "norm": _norm_of(named["weight"].shape[0]),
        },
    ),
    "upsample_cross_entropy": Public(_plain(kernels.upsample_cross_entropy), _loss_arguments),
    "upsample_cross_entropy_argmax": Public(
        _plain(kernels.upsample_cross_entropy_argmax), _loss_arguments
    ),
    "upsample_argmax": Public(_plain(kernels.upsample_argmax)),
    "upsample_argmax_probability": Public(
        lambda backend, **given: kernels.upsample_argmax(
            **given, return_probability=True, backend=backend
        )
    ),
}
