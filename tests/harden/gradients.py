"""Row 2: ``torch.autograd.gradcheck`` in float64 of drawn calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from tests.harden.draws import Draw, arrange
from tests.harden.operators import DIFFERENTIABLE, Entry
from tests.harden.record import Outcome
from tests.kernels.ladder import outputs_of

FEW = 60  # numbers among the arguments up to which every entry of the Jacobian is formed


def failure_of(number: int) -> str | None:
    """Why a sample fails, the dispatched operator and every other time the reference too."""
    entry = DIFFERENTIABLE[number % len(DIFFERENTIABLE)]
    draw = Draw(number)
    args = entry.draw(draw)
    # gradcheck takes no stride of 0, which an empty map with its channels last has.
    layouts = [
        "contiguous" if isinstance(arg, Tensor) and not arg.numel() else layout
        for arg, layout in zip(args, draw.layouts(args), strict=True)
    ]
    leaves = arrange(args, layouts, torch.float64, grad=True, constants=entry.constants)
    numbers = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
    operators = [("operator", entry.operator.op), ("reference", entry.operator.reference)]
    for name, operator in operators[: 1 + (number // len(DIFFERENTIABLE)) % 2]:
        try:
            torch.autograd.gradcheck(
                scored(entry, operator, leaves), tuple(leaves), fast_mode=numbers > FEW
            )
        except GradcheckError as error:
            return f"sample {number}: {entry.name}, {name}: {' '.join(str(error).split())[:300]}"
    return None


def scored(entry: Entry, operator: Any, leaves: list[Any]) -> Any:
    """`operator` reduced to the outputs that have a gradient."""

    def outputs(*values: Any) -> list[Tensor]:
        return outputs_of(operator(*entry.complete(list(values))))

    places = [place for place, out in enumerate(outputs(*leaves)) if out.requires_grad]
    return lambda *values: tuple(outputs(*values)[place] for place in places)


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome()
    for number in numbers:
        failure = failure_of(number)
        outcome.failures += [failure] if failure else []
        outcome.checked += 1
    return outcome
