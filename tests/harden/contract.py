"""Row 1: ``torch.library.opcheck`` of drawn calls, forward and backward operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels import _backends
from tests.harden.draws import Draw, arrange
from tests.harden.operators import ENTRIES, Entry
from tests.harden.record import Outcome
from tests.kernels.ladder import outputs_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Triton's interpreter takes seconds a sample: one round in so many.
TRITON_ROUND = 8

# (operator, check of opcheck): why it does not hold.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def case_of(number: int) -> tuple[Entry, torch.dtype, bool]:
    """The operator of a sample, its dtype, and whether it runs on Triton."""
    round_, place = divmod(number, len(ENTRIES))
    entry = ENTRIES[place]
    triton = round_ % TRITON_ROUND == 1 and "triton" in _backends.available(entry.name, "cpu")
    return entry, torch.float32 if triton else DTYPES[round_ % len(DTYPES)], triton


def arguments(number: int) -> tuple[Entry, list[Any], torch.dtype, bool]:
    """Leaves of a sample, in its layouts."""
    entry, dtype, triton = case_of(number)
    draw = Draw(number, large=number % 4 == 0 and not triton)
    args = entry.draw(draw)
    layouts = draw.layouts(args)
    leaves = arrange(
        args, layouts, dtype, grad=entry.differentiable and draw.flag(), constants=entry.constants
    )
    return entry, entry.complete(leaves), dtype, triton


def backward_arguments(entry: Entry, args: list[Any], triton: bool) -> tuple[Any, ...]:
    """Of the backward operator: gradients of ones, inputs, what forward kept, all wanted."""
    inputs = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    operator = entry.operator
    outputs = outputs_of((operator.triton_op if triton else operator.op)(*inputs))
    saving = operator._saving
    seen = outputs[: len(outputs) - saving.hidden]
    grads = [torch.ones_like(out) if out.is_floating_point() else None for out in seen]
    saved = operator._kept.saved(inputs, outputs)
    wanted = [
        isinstance(arg, Tensor) and arg.is_floating_point() and place not in entry.constants
        for place, arg in enumerate(inputs)
    ]
    return grads, *inputs, saved, wanted


def backward_operator(entry: Entry, triton: bool) -> Any:
    packet = getattr(torch.ops.spectralx, f"{entry.name}_backward")
    return packet.triton if triton else packet.default


def failures_of(number: int) -> list[str]:
    """What opcheck objects to in a sample."""
    entry, args, dtype, triton = arguments(number)
    where = f"sample {number}: {entry.name}, {dtype}, {'triton' if triton else 'dispatcher'}"
    forward = entry.operator.triton_op if triton else entry.operator.op
    checks: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [(forward, tuple(args), {})]
    if entry.differentiable:
        given = backward_arguments(entry, args, triton)
        # It has no gradient.
        options: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor")}
        checks.append((backward_operator(entry, triton), given, options))
    found = []
    for operator, given, options in checks:
        results = torch.library.opcheck(operator, given, raise_exception=False, **options)
        for check, result in results.items():
            if result != "SUCCESS" and (entry.name, check) not in EXCEPTIONS:
                found.append(f"{where}, {operator}: {check}: {' '.join(str(result).split())[:300]}")
    return found


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome(
        figures={"by backend": {"dispatcher": 0, "triton": 0}, "by dtype": {}},
        exceptions=[f"{name}: {check}: {why}" for (name, check), why in EXCEPTIONS.items()],
    )
    for number in numbers:
        _, dtype, triton = case_of(number)
        outcome.failures += failures_of(number)
        outcome.checked += 1
        outcome.figures["by backend"]["triton" if triton else "dispatcher"] += 1
        counts = outcome.figures["by dtype"]
        name = str(dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + 1
    return outcome
