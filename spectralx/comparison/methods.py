"""The methods that are compared, as changes of an experiment's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spectralx.cli import InputError, one_of
from spectralx.settings import Adapter, Settings


@dataclass(frozen=True)
class Method:
    """What adapts the backbone, and what of it trains.

    Attributes
    ----------
    name : on the command line and in file names.
    title : in tables and pictures.
    adapter, trainable : as in `spectralx.settings.ModelSettings`.
    trains : what trains in stage 2, in words.
    """

    name: str
    title: str
    adapter: Adapter | None
    trainable: Literal["adapters", "all"]
    trains: str


_BASELINE = "adapters of linear layers and patch convolution, norms, decoder"
METHODS: tuple[Method, ...] = (
    Method(
        "spectralx", "SpectralX", "aomoa", "adapters",
        "AoMoA, HyperT's low-rank path, Are-adapter, norms, decoder",
    ),
    Method("lora", "LoRA", "lora", "adapters", _BASELINE),
    Method("slr", "SLR", "slr", "adapters", _BASELINE),
    Method("ia3", "IA3", "ia3", "adapters", _BASELINE),
    Method("frozen", "frozen", None, "adapters", "decoder"),
    Method("full", "full fine-tuning", None, "all", "everything"),
)  # fmt: skip


def chosen_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, in the order of `METHODS`.

    Raises
    ------
    InputError : no name, or one that is no method.
    """
    known = {method.name: method for method in METHODS}
    for name in names:
        if name not in known:
            raise InputError(f"methods: found {name!r}; expected {one_of(name, known)}")
    if not names:
        raise InputError(f"methods: found none; expected some of {', '.join(known)}")
    return [method for method in METHODS if method.name in names]


def method_settings(
    base: Settings, method: Method, *, seed: int, out: Path, backbone: Path | None = None
) -> Settings:
    """The experiment `base` with `method`: nothing else differs between methods.

    Parameters
    ----------
    base : the experiment.
    method : what adapts. ``adapter_options`` of `base` stay with the adapter they were given for.
    seed, out : of this run.
    backbone : file of the weights all methods start from, where `base` names none.
    """
    options = base.model.adapter_options if method.adapter == base.model.adapter else {}
    weights = base.model.backbone_weights if backbone is None else str(backbone)
    model = dataclasses.replace(
        base.model,
        adapter=method.adapter,
        adapter_options=dict(options),
        trainable=method.trainable,
        backbone_weights=weights,
    )
    return dataclasses.replace(base, model=model, seed=seed, out=str(out))
