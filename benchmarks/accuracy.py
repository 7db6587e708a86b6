"""No number without agreement: each implementation against the reference, in the same run.

The truth is the reference in float64 on exactly the values the timed dtype holds. An
implementation's error to it may be a few times the reference's own error in that dtype, plus
round-off: the factors and round-off of ``tests/tolerances.py``. Whole models are held against the
reference in float32 instead, where float64 would cost more than the measuring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, GOLDEN_FLOOR, ROUND_OFF

GRADIENT = "gradient"
# Indices may differ in this share of places, beyond the reference's own: near-ties.
INDEX_SLACK = 1e-4
# A whole model has ReLUs and best matches that fall on the other side where a value is within
# round-off of the kink: a share f of them moves its gradients by about sqrt(f), which measured up
# to 1e-3 of a part in float32. A wrong gradient is out by about 1.
KINKS = 1e-2
# A gradient that cancels to nothing is measured against this share of the largest one.
VANISHING = 1e-3


@dataclass(frozen=True)
class Comparison:
    """An output or gradient held against the truth."""

    name: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.2e}, expected at most {self.bound:.2e}"


def error(found: Tensor, exact: Tensor, least_norm: float = 0.0) -> float:
    """Distance of `found` to `exact`.

    The norm of the difference over the norm of `exact` (or over `least_norm`, if that is larger);
    for indices the share of places that differ. Infinite for another shape or a lone NaN.
    """
    if found.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    if not exact.is_floating_point():
        return float((found != exact).double().mean())
    exact = exact.double()
    distance = float((found.double() - exact).norm()) / max(float(exact.norm()), least_norm, 1e-30)
    return math.inf if math.isnan(distance) else distance


def by_part(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`results` with the gradients of each part of a model joined into one vector."""
    joined: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, value in results.items():
        if name.startswith(GRADIENT):
            parts.setdefault(name.split(".", 1)[0], []).append(value.flatten().float())
        else:
            joined[name] = value
    joined.update({name: torch.cat(values) for name, values in parts.items()})
    return joined


def compare(
    found: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> list[Comparison]:
    """Every output and gradient of an implementation against the truth.

    Parameters
    ----------
    found : the implementation's results.
    plain : the reference's results in the same dtype; where they are `exact` itself, errors of
        `GOLDEN_FLOOR` and, of a gradient, of `KINKS` are allowed.
    exact : the truth.
    dtype : the dtype that is timed.
    """
    gradients = [value for name, value in exact.items() if name.startswith(GRADIENT)]
    vanishing = VANISHING * max((float(value.double().norm()) for value in gradients), default=0.0)
    compared = [Comparison(f"{name} (unexpected)", math.inf, 0.0) for name in found.keys() - exact]
    for name, truth in exact.items():
        if name not in found:
            compared.append(Comparison(f"{name} (missing)", math.inf, 0.0))
            continue
        is_gradient = name.startswith(GRADIENT)
        least_norm = vanishing if is_gradient else 0.0
        slack = ROUND_OFF[dtype]
        if not truth.is_floating_point():
            slack = max(slack, INDEX_SLACK)
        elif plain is exact:
            slack = max(slack, KINKS if is_gradient else GOLDEN_FLOOR)
        factor = BACKWARD_FACTOR if is_gradient else FORWARD_FACTOR
        bound = factor * error(plain[name], truth, least_norm) + slack
        compared.append(Comparison(name, error(found[name], truth, least_norm), bound))
    return compared
