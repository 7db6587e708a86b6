"""Put adapters into any model by the names of its layers, take them out, and freeze the rest.

`adapt` replaces linear layers and patch convolutions of any ``nn.Module`` (ours, timm's, those of
transformers) with adapted ones; `unadapt` puts the layers back; `freeze` leaves trainable what
SpectralX trains.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

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
from spectralx.replaced import Replaced, ReplacedLayer, described, parameter_count
from spectralx.targets import (
    EVERYTHING,
    MLP,
    Block,
    check_called,
    fused_parts,
    in_block,
    missing_blocks,
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
_ADAPTABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
# Attribute of an adapter: which parameters of its frozen layer trained before `adapt`.
_TRAINED = "trained_before_adapt"

TARGETS: Mapping[Method, str] = {
    "aomoa": MLP,
    "lora": EVERYTHING,
    "slr": EVERYTHING,
    "ia3": EVERYTHING,
}
"""What each method adapts unless told otherwise, in the names of `spectralx.targets`."""


def adapter_blocks(depth: int) -> list[int]:
    """Blocks that SpectralX adapts: every sixth (5, 11, 17 and 23 of 24), the last of fewer."""
    return list(range(5, depth, 6)) or [depth - 1]


def check_method(method: str) -> Method:
    """`method` itself if it is one of `METHODS`, else a ValueError."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    return method


def _check_options(method: Method, options: Mapping[str, Any]) -> None:
    """Every option is a keyword of the method's adapter."""
    parameters = inspect.signature(LINEAR[method]).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise ValueError(f"options of {method}: got {name!r}, expected {expected}")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions by name, those inside adapters and HyperT left out.

    Adapters are yielded too: they stand for the layer inside them.
    """
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(closed):
            continue
        if isinstance(module, (*_ADAPTERS, HyperT)):
            closed += (f"{name}." if name else "",)
        if name and isinstance(module, _ADAPTABLE + _ADAPTERS):
            yield name, module


def _adapted(name: str, layer: nn.Module, method: Method, options: Mapping[str, Any]) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        if method not in CONVOLUTION:
            raise ValueError(f"targets: {name} is a convolution, which {method} cannot adapt")
        make = CONVOLUTION[method]
    else:
        make = LINEAR[method]
        if method == "aomoa":
            options = {"parts": fused_parts(name), **options}
    try:
        return make(layer, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _found(
    model: nn.Module, pattern: re.Pattern[str], blocks: Collection[Block] | None
) -> list[tuple[str, nn.Module]]:
    """The layers to adapt, or an error that says why there are none."""
    matched = [
        (name, layer)
        for name, layer in _layers(model)
        if pattern.search(name)
        and (blocks is None or any(in_block(name, block) for block in blocks))
    ]
    within = "" if blocks is None else f" in blocks {sorted(blocks, key=str)}"
    if not matched:
        raise ValueError(
            f"targets: {pattern.pattern!r} matches no linear or convolution layer{within} of "
            f"{type(model).__name__}"
        )
    missing = missing_blocks([name for name, _ in matched], blocks or ())
    if missing:
        raise ValueError(
            f"blocks: got {missing}, which hold no layer that {pattern.pattern!r} matches"
        )
    found = [(name, layer) for name, layer in matched if not isinstance(layer, _ADAPTERS)]
    if not found:
        raise ValueError(
            f"targets: {pattern.pattern!r} matches only layers{within} that are adapted already, "
            f"{matched[0][0]} the first; expected one that is not (unadapt puts the layers back)"
        )
    return found


def adapt(
    model: nn.Module,
    *,
    method: Method,
    targets: str | None = None,
    blocks: Collection[Block] | None = None,
    example: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    **options: Any,
) -> Replaced:
    """Replace layers of a model with adapted ones, in place.

    The frozen layer lives on inside its adapter, under ``.linear`` or ``.proj``: load weights
    before. Other parameters keep their ``requires_grad``; see `freeze`. A layer that several
    modules share stays shared. Layers that are adapted already are left alone, and a call that
    finds no others is an error.

    Parameters
    ----------
    model : any module that holds the layers. One that `torch.compile` wrapped is fine too.
    method : "aomoa" (the paper's mixture of adapters), "lora", "slr" or "ia3".
    targets : regular expression, searched for in the dotted name of each ``nn.Linear`` and
        ``nn.Conv2d``, for example ``r"mlp\\.fc[12]$"``. The default of each method is in `TARGETS`.
    blocks : only layers of these blocks: the first number in a name (5 of ``blocks.5.mlp.fc1`` and
        ``encoder.layer.5.output.dense``), or the first ones as a tuple ((2, 0) of
        ``layers.2.blocks.0.mlp.fc1`` in a Swin). All layers where None.
    example : what the model is called with: a tensor, positional arguments or keywords. It then
        runs once, in evaluation and without gradients, to see that every adapter is called; some
        models read the weight of a layer past it.
    options : keywords of the adapter, for example ``rank=8`` or ``experts=8, top_k=2``. AoMoA's
        ``parts`` follows from the name of a fused layer (3 of ``qkv``).

    Returns
    -------
    What was replaced, in the order of the model's layers; print it.

    Raises
    ------
    ValueError : unknown method or option; no layer matches, none in one of `blocks`, or only
        adapted ones; a layer the method cannot adapt, or that the model does not call. The model is
        unchanged.

    Source: SpectralX, sections on AoMoA and on the baselines.
    """
    check_method(method)
    _check_options(method, options)
    found = _found(model, re.compile(TARGETS[method] if targets is None else targets), blocks)
    trained = {
        layer: [name for name, p in layer.named_parameters() if p.requires_grad]
        for _, layer in found
    }
    made: dict[nn.Module, nn.Module] = {}
    try:
        for name, layer in found:
            parent = model.get_submodule(name.rpartition(".")[0])
            by_weight = method == "aomoa" and isinstance(layer, nn.Linear)
            check_called(name, layer, parent, by_weight=by_weight)
            if layer not in made:
                made[layer] = _adapted(name, layer, method, options).train(layer.training)
        for name, layer in found:
            _replace(model, name, made[layer])
        if example is not None:
            _check_runs(model, {name: made[layer] for name, layer in found}, example)
    except BaseException:
        for name, layer in found:
            _replace(model, name, layer)
            _train_again(layer, trained[layer])
        raise
    rows = []
    counted: set[nn.Module] = set()
    for name, layer in found:
        adapter = made[layer]
        setattr(adapter, _TRAINED, trained[layer])
        added = 0 if layer in counted else parameter_count(adapter) - parameter_count(layer)
        counted.add(layer)
        parts = getattr(adapter, "parts", 1)
        kind = type(adapter).__name__ + (f" of {parts} parts" if parts > 1 else "")
        rows.append(ReplacedLayer(name, described(layer), kind, added))
    return Replaced(method, tuple(rows), parameter_count(model))


def _train_again(layer: nn.Module, names: Collection[str]) -> None:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in names)


def _check_runs(
    model: nn.Module,
    adapters: Mapping[str, nn.Module],
    example: Tensor | Sequence[Any] | Mapping[str, Any],
) -> None:
    """Run the model on `example`; raise for adapters that it did not call."""
    called: set[nn.Module] = set()
    hooks = [
        adapter.register_forward_pre_hook(lambda module, _: called.add(module))
        for adapter in set(adapters.values())
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*((example,) if isinstance(example, Tensor) else example))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    passed_by = [name for name, adapter in adapters.items() if adapter not in called]
    if passed_by:
        raise ValueError(
            f"targets: {type(model).__name__} does not call {', '.join(passed_by)} on the example; "
            "expected layers that it calls (it may read their weight alone)"
        )


def unadapt(model: nn.Module) -> list[str]:
    """Take all adapters out of a model, in place: each frozen layer takes its place again.

    A layer trains as it did before `adapt`; one that was put into its adapter by hand stays
    frozen. What `freeze` did to other layers stays. `HyperT` is no adapter and stays.

    Parameters
    ----------
    model : holds adapters; without any, nothing happens.

    Returns
    -------
    Names of the layers that are back.
    """
    found = [(name, m) for name, m in _layers(model) if isinstance(m, _ADAPTERS)]
    for name, adapter in found:
        layer = _wrapped(adapter)
        _train_again(layer, getattr(adapter, _TRAINED, ()))
        _replace(model, name, layer.train(adapter.training))
    return [name for name, _ in found]


def _wrapped(adapter: nn.Module) -> nn.Module:
    """The frozen layer inside an adapter."""
    name = next(name for kind, name in _WRAPPED.items() if isinstance(adapter, kind))
    return adapter.get_submodule(name)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once: ``AdamW(trainableparameter_count(model))``.

    Raises
    ------
    ValueError : there is none.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError(
            f"model: got a {type(model).__name__} that is frozen, expected some that trains"
        )
    return found


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
            _wrapped(module).requires_grad_(False)
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
