"""Arguments and results of the room's operators by name, and accuracy at one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels.ladder import cast, relative_error, run_with_gradients
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

NAMES = (
    "x", "weight", "bias", "scaler", "norm1_weight", "norm1_bias", "down", "norm2_weight",
    "norm2_bias", "gate", "gate_noise", "noise", "fc1_weight", "fc1_bias", "fc2_weight",
    "fc2_bias", "up", "top_k", "norm_eps",
)  # fmt: skip


def changed(args: Sequence[Any], **values: Any) -> tuple[Any, ...]:
    """`args` with some of them replaced; a function is applied to what is there."""
    return tuple(
        value if name not in values else made(value) if callable(made := values[name]) else made
        for name, value in zip(NAMES, args, strict=True)
    )


def run(
    args: Sequence[Any], backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs ("out", "gates", "load"), and gradients by the argument's name, on the CPU."""
    there = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]
    results = named(
        run_with_gradients(
            lambda *values: AOMOA(*values, backend=backend), cast(there, dtype, grad=True)
        )
    )
    return {name: value.cpu() for name, value in results.items()}


def named(results: tuple[list[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `run_with_gradients` returned, by name."""
    outputs, grads = results
    found = dict(zip(("out", "gates", "load"), outputs, strict=True))
    return {**found, **{NAMES[int(name.split()[1])]: grad for name, grad in grads.items()}}


def reordered(args: Sequence[Any], seed: int) -> tuple[Any, ...]:
    """The same layer with its channels, ranks and hidden units in another order."""
    generator = torch.Generator().manual_seed(seed)
    values = dict(zip(NAMES, args, strict=True))
    attributes = values["gate"].shape[0]

    def permute(size: int, where: dict[str, int]) -> None:
        order = torch.randperm(size, generator=generator)
        for name, dim in where.items():
            values[name] = values[name].index_select(dim, order)

    for name in ("x", "weight"):
        values[name] = values[name].unflatten(1, (attributes, -1))
    permute(
        values["down"].shape[1],
        {"x": 2, "weight": 2, "norm1_weight": 0, "norm1_bias": 0, "down": 1},
    )
    for name in ("x", "weight"):
        values[name] = values[name].flatten(1)
    permute(
        values["down"].shape[0],
        {"down": 0, "norm2_weight": 0, "norm2_bias": 0, "gate": 1, "gate_noise": 1,
         "fc1_weight": 2, "fc2_weight": 1, "fc2_bias": 1, "up": 1},
    )  # fmt: skip
    permute(values["fc1_bias"].shape[1], {"fc1_weight": 1, "fc1_bias": 1, "fc2_weight": 2})
    return tuple(values.values())


def redrawn(args: Sequence[Any], seed: int) -> tuple[Any, ...]:
    """`args` with the elements of every floating-point tensor in another order: other values."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        value.view(-1)[torch.randperm(value.numel(), generator=generator)].view(value.shape)
        if isinstance(value, Tensor)
        else value
        for value in args
    )


def check_shape(
    args: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backends: Sequence[str] = (),
    draws: int = 5,
    measured_on: str = "cpu",
) -> None:
    """`ladder.check_accuracy`, with the reference's own error over several orders and draws.

    The error of a norm over three elements, or of a gradient of one, is a single rounding: of one
    draw it is small by chance too often to be the measure of another implementation. Truth and
    reference are evaluated on `measured_on`; `backends` are all of `device` but ``eager`` by
    default.
    """
    own: dict[str, float] = {}
    others = [change(args, seed) for seed in range(1, 1 + draws) for change in (reordered, redrawn)]
    for values in (cast(each, dtype) for each in (args, *others)):
        exact = run(cast(values, torch.float64), "eager", torch.float64, measured_on)
        for name, value in run(values, "eager", dtype, measured_on).items():
            own[name] = max(own.get(name, 0.0), relative_error(value, exact[name]))
    exact = run(cast(cast(args, dtype), torch.float64), "eager", torch.float64, measured_on)
    for backend in backends or _backends.available(AOMOA.name, device)[:-1]:
        found = run(args, backend, dtype, device)
        assert found.keys() >= exact.keys()
        for name, value in found.items():
            if name not in exact:  # the reference does not use the argument: no gradient
                assert not value.any(), (backend, name)
                continue
            factor = FORWARD_FACTOR if name in ("out", "gates", "load") else BACKWARD_FACTOR
            bound = factor * own[name] + ROUND_OFF[dtype]
            error = relative_error(value, exact[name])
            assert error <= bound, (backend, name, error, bound)


def gating_arguments(
    attributes: int = 2, tokens: int = 7, experts: int = 4, top_k: int = 2, noisy: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    generator = torch.Generator().manual_seed(attributes + 10 * tokens + 100 * experts + top_k)
    draws = torch.randn(3, attributes, tokens, experts, generator=generator, dtype=torch.float64)
    return draws[0], *(draws[1:] if noisy else (None, None)), top_k  # type: ignore[return-value]
