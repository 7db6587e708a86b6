"""The published implementation's state-dict names, for the modules that have another layout.

A module that names or stacks its parameters otherwise derives from `OfficialNames` and lists the
published names; `load_state_dict` then takes both, and `official_parameters` lists every
parameter and buffer of a model under its published name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class OfficialTensor(NamedTuple):
    """Where a published tensor lives here: `name` in ``state_dict()``, and its row if stacked."""

    name: str
    row: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` (the value or the gradient of `name`) that is the published one."""
        return tensor if self.row is None else tensor[self.row]


class OfficialNames(nn.Module):
    """Base of modules whose state dict also loads from the published names.

    Attributes
    ----------
    official_names : own name -> published name, both relative to the module. ``{}`` in the
        published name counts along dimension 0 of the own tensor. Names that are equal are left
        out.
    official_inert : published name -> shape of tensors that affect neither output nor gradients
        and so do not exist here: accepted and dropped on loading. A property where the shape
        depends on the module's sizes.
    """

    official_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(OfficialNames._translate)

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def from_official(self, own_name: str, tensor: Tensor) -> Tensor:
        """The own tensor of a published one (stacked already); identity unless overridden."""
        return tensor

    def to_official(self, own_name: str, tensor: Tensor) -> Tensor:
        """The published tensor (one of them if stacked) of an own one; inverts `from_official`."""
        return tensor

    @staticmethod
    def _translate(
        module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
    ) -> None:
        assert isinstance(module, OfficialNames)
        for own, official in module.official_names.items():
            if "{}" in official:
                rows: list[Tensor] = []
                while (key := prefix + official.format(len(rows))) in state_dict:
                    rows.append(state_dict.pop(key))
                if rows:
                    state_dict[prefix + own] = module.from_official(own, torch.stack(rows))
            elif prefix + official in state_dict:
                tensor = state_dict.pop(prefix + official)
                state_dict[prefix + own] = module.from_official(own, tensor)
        for official in module.official_inert:
            state_dict.pop(prefix + official, None)


def official_parameters(model: nn.Module) -> dict[str, OfficialTensor]:
    """Published name -> own name and row, for every entry of ``model.state_dict()``."""
    renamed: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, OfficialNames):
            prefix = f"{path}." if path else ""
            for own, official in module.official_names.items():
                renamed[prefix + own] = prefix + official
    listed: dict[str, OfficialTensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        official = renamed.get(name, name)
        if "{}" in official:
            for row in range(tensor.shape[0]):
                listed[official.format(row)] = OfficialTensor(name, row)
        else:
            listed[official] = OfficialTensor(name, None)
    return listed


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every entry of ``model.state_dict()`` as the published one; not those without effect."""
    owners: dict[str, tuple[OfficialNames, str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, OfficialNames):
            prefix = f"{path}." if path else ""
            owners.update({prefix + own: (module, own) for own in module.official_names})
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for official, where in official_parameters(model).items():
        tensor = where.of(own[where.name])
        if where.name in owners:
            owner, name = owners[where.name]
            tensor = owner.to_official(name, tensor)
        state[official] = tensor
    return state


def official_inert(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Published names (with shapes) that the model leaves out because they have no effect."""
    found: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, OfficialNames):
            prefix = f"{path}." if path else ""
            found.update({prefix + name: shape for name, shape in module.official_inert.items()})
    return found
