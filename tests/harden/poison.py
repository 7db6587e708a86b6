"""Row 12: memory that torch allocates starts as NaN or the largest integer.

The calls of rows 1 and 4 must give the same bits as without, forward and backward, and opcheck of
row 1's calls must hold.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spectralx_kernels import _backends
from tests.harden import contract, routing
from tests.harden.draws import Draw, arrange
from tests.harden.record import Outcome
from tests.kernels.ladder import moved, poisoned, run_with_gradients


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Bits, but for which NaN a NaN is."""
    return one.dtype == two.dtype and torch.equal(one.nan_to_num(123.0), two.nan_to_num(123.0))


def bits_of_contract(number: int, device: str = "cpu") -> list[tuple[str, dict[str, Tensor]]]:
    """Outputs and gradients of a call of row 1, by backend; on a GPU without the reference, whose
    torch adds atomically."""
    entry, dtype, triton = contract.case_of(number)
    entry = entry.on(device)
    draw = Draw(number)
    args = entry.draw(draw)
    layouts = draw.layouts(args)
    found = []
    for backend in _backends.available(entry.name, device, dtype):
        if backend == ("eager" if device == "cuda" else "" if triton else "triton"):
            continue
        leaves = entry.complete(
            arrange(
                moved(args, device),
                layouts,
                dtype,
                grad=entry.differentiable,
                constants=entry.constants,
            )
        )
        outputs, grads = run_with_gradients(
            lambda *values, backend=backend, entry=entry: entry.operator(*values, backend=backend),
            leaves,
        )
        named = {f"output {place}": output for place, output in enumerate(outputs)}
        found.append((f"{entry.name}, {backend}, {dtype}", {**named, **grads}))
    return found


def bits_of_routing(number: int) -> list[tuple[str, dict[str, Tensor]]]:
    """The same of a call of row 4."""
    operator, edge, dtype, args = routing.case_of(number)
    found = []
    for backend in _backends.available(operator.name, "cpu", dtype):
        if backend != "triton" or number % routing.TRITON_EVERY == 0:
            results = routing.run_of(operator, args, dtype, backend)
            found.append((f"{operator.name}, {backend}, {edge}, {dtype}", results))
    return found


def failures_of(number: int) -> list[str]:
    """What changes where memory is poisoned; every fifth sample is one of row 4."""
    call = bits_of_routing if number % 5 == 4 else bits_of_contract
    plain = call(number)
    with poisoned():
        found = call(number)
        failures = contract.failures_of(number) if number % 10 == 0 else []
    for (where, expected), (_, results) in zip(plain, found, strict=True):
        failures += [
            f"sample {number}: {where}, {name}: other bits"
            for name, value in expected.items()
            if not same_bits(results[name], value)
        ]
    return failures


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome()
    for number in numbers:
        outcome.failures += failures_of(number)
        outcome.checked += 1
    return outcome
