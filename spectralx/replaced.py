"""What `spectralx.adapt` replaced, as a table to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


def described(layer: nn.Module) -> str:
    """Kind and widths of a linear layer or a convolution, in a few words."""
    if isinstance(layer, nn.Conv2d):
        kernel = "x".join(map(str, layer.kernel_size))
        return f"{type(layer).__name__} {layer.in_channels} -> {layer.out_channels}, {kernel}"
    assert isinstance(layer, nn.Linear)
    return f"{type(layer).__name__} {layer.in_features} -> {layer.out_features}"


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, frozen ones too."""
    return sum(parameter.numel() for parameter in module.parameters())


class ReplacedLayer(NamedTuple):
    """A row of `Replaced`: name, what the layer was, its adapter, and what that added.

    ``parameters`` is 0 where the layer is shared and counted under its first name.
    """

    name: str
    was: str
    adapter: str
    parameters: int


@dataclass(frozen=True)
class Replaced:
    """What `adapt` did; ``print`` shows a table.

    Attributes
    ----------
    method : as given.
    layers : a row for each replaced layer, in the order of the model.
    total : parameters of the whole model now.
    """

    method: str
    layers: tuple[ReplacedLayer, ...]
    total: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the replaced layers, in the order of the model."""
        return tuple(layer.name for layer in self.layers)

    @property
    def parameters(self) -> int:
        """How many parameters were added."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        share = 100 * self.parameters / max(self.total, 1)
        heading = (
            f"{self.method} on {len(self.layers)} layers, {self.parameters:,} parameters added "
            f"({share:.2f} % of {self.total:,})"
        )
        rows = [(*layer[:3], f"{layer.parameters:,}") for layer in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False))
            + "  "
            + row[3].rjust(widths[3])
            for row in rows
        )
        return "\n  ".join([heading, *lines])
