"""Put adapters into any model by the names of its layers, and freeze the rest.

`adapt` replaces linear layers and patch convolutions of any ``nn.Module`` (ours, timm's, those of
transformers) with adapted ones; `freeze` leaves trainable what SpectralX trains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from spectralx.adapters import (
    ConvAdapter,
    IA3Conv2d,
    IA3Linear,
    LinearAdapter,
    LoRAConv2d,
    LoRALinear,
    SLRConv2d,
    SLRLinear,
)
from spectralx_kernels import AoMoALinear, HyperT

Method = Literal["aomoa", "lora", "slr", "ia3"]
METHODS: tuple[Method, ...] = get_args(Method)

LINEAR: Mapping[Method, Callable[..., nn.Module]] = {
    "aomoa": AoMoALinear,
    "lora": LoRALinear,
    "slr": SLRLinear,
    "ia3": IA3Linear,
}
CONVOLUTION: Mapping[Method, Callable[..., nn.Module]] = {
    "lora": LoRAConv2d,
    "slr": SLRConv2d,
    "ia3": IA3Conv2d,
}
# Adapter -> name of the frozen layer inside it.
_WRAPPED: Mapping[type[nn.Module], str] = {
    AoMoALinear: "linear",
    LinearAdapter: "linear",
    ConvAdapter: "proj",
}
_ADAPTERS = tuple(_WRAPPED)
_NORMS = (nn.LayerNorm, nn.RMSNorm)

TARGETS: Mapping[Method, str] = {
    "aomoa": r"(^|\.)(fc1|fc2)$",
    "lora": r"(^|\.)(qkv|proj|fc1|fc2)$",
    "slr": r"(^|\.)(qkv|proj|fc1|fc2)$",
    "ia3": r"(^|\.)(qkv|proj|fc1|fc2)$",
}
"""What each method adapts unless told otherwise, in the names of timm's vision transformers."""


class Replaced(NamedTuple):
    """What `adapt` did: the method, the names of the layers it replaced and what it added."""

    method: str
    names: tuple[str, ...]
    parameters: int

    def __str__(self) -> str:
        return (
            f"{self.method} on {len(self.names)} layers, {self.parameters:,} parameters added: "
            + ", ".join(self.names)
        )


def adapter_blocks(depth: int) -> list[int]:
    """Blocks that SpectralX adapts: every sixth (5, 11, 17 and 23 of 24), the last of fewer."""
    return list(range(5, depth, 6)) or [depth - 1]


def check_method(method: str) -> Method:
    """`method` itself if it is one of `METHODS`, else a ValueError."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    return method


def _block_of(name: str) -> int | None:
    """The index of the block a layer is in: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions by name, those inside adapters and HyperT left out."""
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(closed):
            continue
        if isinstance(module, (*_ADAPTERS, HyperT)):
            closed += (f"{name}." if name else "",)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and name:
            yield name, module


def _adapted(name: str, layer: nn.Module, method: Method, options: Mapping[str, Any]) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        if method not in CONVOLUTION:
            raise ValueError(f"targets: {name} is a convolution, which {method} cannot adapt")
        return CONVOLUTION[method](layer, **options)
    if method == "aomoa" and type(layer).forward is not nn.Linear.forward:
        raise ValueError(
            f"targets: {name} is a {type(layer).__name__}, expected a plain nn.Linear for aomoa"
        )
    return LINEAR[method](layer, **options)


def adapt(
    model: nn.Module,
    *,
    method: Method,
    targets: str | None = None,
    blocks: Collection[int] | None = None,
    **options: Any,
) -> Replaced:
    """Replace layers of a model with adapted ones, in place.

    The frozen layer lives on inside its adapter. Other parameters keep their state; see `freeze`.
    A layer that several modules share stays shared.

    Parameters
    ----------
    model : any module that holds the layers; layers already adapted are left alone.
    method : "aomoa" (the paper's mixture of adapters), "lora", "slr" or "ia3".
    targets : regular expression, searched for in the dotted name of each ``nn.Linear`` and
        ``nn.Conv2d``, for example ``r"mlp\\.fc[12]$"``. The default of each method is in `TARGETS`.
    blocks : only layers of these blocks, the block being the first number in a name
        (``blocks.5.mlp.fc1``, ``encoder.layer.5.output.dense``). All layers where None.
    options : keywords of the adapter, for example ``rank=8`` or ``experts=8, top_k=2``.

    Returns
    -------
    What was replaced, in the order of the model's layers.

    Raises
    ------
    ValueError : unknown method; no layer matches, or none in one of `blocks`; a layer the method
        cannot adapt.

    Source: SpectralX, sections on AoMoA and on the baselines.
    """
    check_method(method)
    pattern = re.compile(TARGETS[method] if targets is None else targets)
    found = [
        (name, layer)
        for name, layer in _layers(model)
        if pattern.search(name) and (blocks is None or _block_of(name) in blocks)
    ]
    if not found:
        within = "" if blocks is None else f" in blocks {sorted(blocks)}"
        raise ValueError(
            f"targets: {pattern.pattern!r} matches no linear or convolution layer{within} of "
            f"{type(model).__name__}"
        )
    missing = set(blocks or ()) - {_block_of(name) for name, _ in found}
    if missing:
        raise ValueError(
            f"blocks: got {sorted(missing)}, which hold no layer that {pattern.pattern!r} matches"
        )
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in found:
        if layer not in made:
            made[layer] = _adapted(name, layer, method, options).train(layer.training)
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[layer])
    added = sum(
        sum(p.numel() for p in adapter.parameters()) - sum(p.numel() for p in layer.parameters())
        for layer, adapter in made.items()
    )
    return Replaced(method, tuple(name for name, _ in found), added)


def freeze(model: nn.Module, *, norms: bool = True, keep: str | None = None) -> list[str]:
    """Freeze a model but for what SpectralX trains.

    Trainable stay: adapters (not the layers inside them), norm layers whose name holds "norm",
    and what `keep` names. `HyperT` is left as its own ``trainable`` argument set it.

    Parameters
    ----------
    model : the model; its parameters' ``requires_grad`` is set.
    norms : whether norm layers outside adapters train.
    keep : regular expression, searched for in dotted parameter names, of what else trains.

    Returns
    -------
    Names of the trainable parameters.

    Source: SpectralX, section on the two stages; names as in the published implementation.
    """
    pattern = None if keep is None else re.compile(keep)

    def visit(module: nn.Module, path: str) -> None:
        if isinstance(module, HyperT):
            return
        if isinstance(module, _ADAPTERS):
            module.requires_grad_(True)
            wrapped = next(name for kind, name in _WRAPPED.items() if isinstance(module, kind))
            module.get_submodule(wrapped).requires_grad_(False)
            return
        is_norm = isinstance(module, _NORMS) and "norm" in path.rpartition(".")[2]
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            kept = pattern is not None and pattern.search(prefix + name) is not None
            parameter.requires_grad_(kept or (norms and is_norm))
        for name, child in module.named_children():
            visit(child, prefix + name)

    visit(model, "")
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
