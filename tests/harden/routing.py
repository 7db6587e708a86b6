"""Row 4: what decides where numbers go, at its edges, on every backend.

Ties, infinities, NaN, magnitudes to 1e4, k = E, an expert without tokens; classes, queries and
tokens that tie. Every backend must choose as the reference does, put out finite numbers for finite
ones, and NaN wherever the reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._operator import Operator
from spectralx_kernels.aomoa.ops import AOMOA, GATING
from spectralx_kernels.reconstruction.masking import RANDOM_MASKING
from spectralx_kernels.refine.ops import MATCH
from spectralx_kernels.upsample.prediction import (
    UPSAMPLE_ARGMAX,
    UPSAMPLE_ARGMAX_PROBABILITY,
    UPSAMPLE_CROSS_ENTROPY_ARGMAX,
)
from tests.harden.draws import Draw
from tests.harden.record import Outcome
from tests.kernels.aomoa import test_aomoa
from tests.kernels.aomoa.by_name import NAMES, changed
from tests.kernels.ladder import cast, moved, run_with_gradients

TRITON_EVERY = 4  # one sample in so many runs in Triton's interpreter too
DTYPES = (torch.float32, torch.float64)
EDGES = ("ties", "all equal", "infinity", "minus infinity", "NaN", "1e4", "empty", "plain")


def values(draw: Draw, edge: str, *shape: int) -> Tensor:
    """Numbers whose last dimension is chosen from."""
    found = draw.normal(*shape)
    if edge == "ties":
        found = draw.integers(3, *shape, dtype=torch.float64)
    elif edge == "all equal":
        found = torch.full_like(found, draw.choice([0.0, -1.5, 1e4]))
    elif edge == "1e4":
        found = found * 1e4
    elif edge == "empty" and found.numel():
        found[..., draw.random.randrange(shape[-1])] = -1e4
    elif edge in ("infinity", "minus infinity", "NaN") and found.numel():
        value = {"infinity": torch.inf, "minus infinity": -torch.inf, "NaN": torch.nan}[edge]
        flat = found.view(-1)
        for _ in range(draw.random.randint(1, 3)):
            flat[draw.random.randrange(flat.numel())] = value
    return found


def gating(draw: Draw, edge: str) -> tuple[Any, ...]:
    shape = draw.size(high=3), draw.size(0), draw.size()
    noisy = draw.flag()
    return (
        values(draw, edge, *shape),
        draw.normal(*shape) if noisy else None,
        values(draw, draw.choice(["ties", "plain"]), *shape) if noisy else None,
        draw.choice([shape[-1], draw.random.randint(1, shape[-1])]),
    )


def aomoa(draw: Draw, edge: str) -> tuple[Any, ...]:
    """Routed by the noise alone, which ties exactly; or fed with what is not a usual number."""
    experts = draw.size(high=7)
    args = test_aomoa.arguments(
        draw.size(), 2 * draw.size(3), 2 * draw.size(), experts=experts, rank=draw.size(2),
        top_k=draw.choice([experts, draw.random.randint(1, experts)]), noisy=True,
    )  # fmt: skip
    args = changed(args, gate=torch.zeros_like, gate_noise=torch.zeros_like)
    if edge in ("infinity", "minus infinity", "NaN"):
        return changed(args, x=lambda old: values(draw, edge, *old.shape))
    if edge == "1e4":
        args = changed(
            args,
            x=lambda old: 1e4 * old,
            fc2_bias=lambda old: 1e4 * old.sign() + old,
        )
    return changed(args, noise=lambda old: values(draw, edge, *old.shape))


def matching(draw: Draw, edge: str) -> tuple[Any, ...]:
    """Queries that are there twice tie with themselves and with nothing else."""
    batch, count, width = draw.size(high=3), draw.size(), draw.size()
    edge = "plain" if edge in ("ties", "all equal", "empty") else edge
    queries = values(draw, edge, batch, count, width)
    if draw.flag():
        queries = torch.cat([queries, queries], 1)
    scale = 1.0 if edge != "1e4" else 1e-4
    return queries, draw.normal(batch, draw.size(0), width), scale


def masking(draw: Draw, edge: str) -> tuple[Any, ...]:
    noise = values(draw, edge, draw.size(high=3), draw.size())
    return noise, draw.random.randint(0, noise.shape[1])


def classes(draw: Draw, edge: str) -> tuple[Any, ...]:
    """Logits [B, K, h, w]; a class that is there twice ties everywhere, and nothing else does but
    for round-off of the interpolation."""
    shape = draw.size(high=2), draw.size(high=5), draw.size(high=5), draw.size(high=7)
    logits = values(draw, edge if edge not in ("empty", "ties") else "plain", *shape)
    if edge == "ties" or draw.flag():
        logits = torch.cat([logits, logits], 1)
    size = list(shape[2:]) if draw.flag() else [draw.size(), draw.size()]
    return logits, size, draw.flag()


def loss(draw: Draw, edge: str) -> tuple[Any, ...]:
    logits, size, align_corners = classes(draw, edge)
    batch, count = logits.shape[:2]
    target = draw.integers(count, batch, *size)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    return logits, target, None, confusion, size, 0, 0.0, 0, align_corners, True


CASES: tuple[tuple[Operator, Callable[[Draw, str], tuple[Any, ...]]], ...] = (
    (GATING, gating),
    (AOMOA, aomoa),
    (MATCH, matching),
    (GATING, gating),
    (RANDOM_MASKING, masking),
    (AOMOA, aomoa),
    (UPSAMPLE_ARGMAX, classes),
    (UPSAMPLE_ARGMAX_PROBABILITY, classes),
    (UPSAMPLE_CROSS_ENTROPY_ARGMAX, loss),
)


UPSAMPLED = (UPSAMPLE_ARGMAX, UPSAMPLE_ARGMAX_PROBABILITY, UPSAMPLE_CROSS_ENTROPY_ARGMAX)


def case_of(number: int) -> tuple[Operator, str, torch.dtype, Sequence[Any]]:
    """Operator, edge, dtype and arguments of a sample."""
    operator, make = CASES[number % len(CASES)]
    draw = Draw(number)
    edge = EDGES[(number // len(CASES)) % len(EDGES)]
    dtype = DTYPES[(number // (len(CASES) * len(EDGES))) % len(DTYPES)]
    return operator, edge, dtype, make(draw, edge)


def run_of(
    operator: Operator, args: Sequence[Any], dtype: torch.dtype, backend: str, device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU."""
    names = [argument.name for argument in operator.op._schema.arguments]
    leaves = cast(moved(args, device), dtype, grad=hasattr(operator, "backward_op"))
    outputs, grads = run_with_gradients(lambda *given: operator(*given, backend=backend), leaves)
    found = {f"output {place}": output for place, output in enumerate(outputs)}
    found |= {names[int(name.split()[1])]: grad for name, grad in grads.items()}
    return {name: value.cpu() for name, value in found.items()}


def chosen(operator: Operator, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels, matches, experts."""
    if operator in (GATING, AOMOA):
        return {"experts": found["output 0" if operator is GATING else "output 1"] != 0}
    if operator is UPSAMPLE_CROSS_ENTROPY_ARGMAX:  # the counts follow from the labels
        return {"labels": found["output 1"]}
    return {name: value for name, value in found.items() if not value.is_floating_point()}


def lowest(operator: Operator, args: Sequence[Any], label: Tensor) -> Tensor:
    """The first of two equal classes, or queries, for either.

    torch's interpolation and products round equal channels of a map, and equal rows, differently
    where one of them is in the remainder of a vector: the reference then takes the second.
    """
    if operator not in (*UPSAMPLED, MATCH):
        return label
    half = args[0].shape[1] // 2
    first, second = args[0][:, :half], args[0][:, half:]
    twice = half > 0 and torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
    return label % half if twice else label


def failures_of(number: int, device: str = "cpu", given: torch.dtype | None = None) -> list[str]:
    """In what a sample's backends differ from the reference at this edge. Half types overflow where
    the reference does."""
    operator, edge, dtype, args = case_of(number)
    dtype = given or dtype
    backends = _backends.available(operator.name, device, dtype)
    if device == "cpu" and number % TRITON_EVERY:
        backends = [backend for backend in backends if backend != "triton"]
    expected = run_of(operator, args, dtype, "eager")
    finite = edge not in ("infinity", "minus infinity", "NaN")
    found: list[str] = []
    for backend in backends:
        where = f"sample {number}: {operator.name}, {backend}, {edge}, {dtype}"
        outputs = run_of(operator, args, dtype, backend, device)
        for name, value in chosen(operator, expected).items():
            wanted, own = lowest(operator, args, value), chosen(operator, outputs)[name]
            own = lowest(operator, args, own) if backend == "eager" else own
            if not torch.equal(own, wanted):
                found.append(f"{where}: {name} other than the reference's")
        for name, value in outputs.items():
            usual = finite and expected.get(name, value.new_zeros(())).isfinite().all()
            if usual and not value.isfinite().all():
                found.append(f"{where}: {name} is not finite")
            if name not in expected or not value.is_floating_point():
                continue
            nan, seen = expected[name].isnan(), ~value.isfinite()
            # The reference runs all experts on all tokens: its gradients spread a token's NaN to
            # experts that it never goes to. Kernels owe it where it goes.
            if (nan & ~seen).any() if name.startswith("output") else nan.any() > seen.any():
                found.append(f"{where}: {name} hides a NaN")
    return found


def nan_tokens(number: int, device: str = "cpu", given: torch.dtype | None = None) -> list[str]:
    """A token with a NaN has NaN in its own output row; all others are as without it."""
    operator, _, dtype, args = case_of(number)
    dtype = given or dtype
    if operator is not AOMOA:
        return []
    whole = [
        value.nan_to_num(0.0, 1.0, -1.0) if isinstance(value, Tensor) else value for value in args
    ]
    place = number % whole[0].shape[0]
    broken = [value.clone() if isinstance(value, Tensor) else value for value in whole]
    broken[NAMES.index("x")][place, 0] = torch.nan
    found = []
    for backend in _backends.available(AOMOA.name, device, dtype):
        if device == "cpu" and backend == "triton" and number % TRITON_EVERY:
            continue
        plain, other = (run_of(operator, each, dtype, backend, device)["output 0"]
                        for each in (whole, broken))  # fmt: skip
        where = f"sample {number}: {operator.name}, {backend}, a NaN in token {place}"
        if not other[place].isnan().all():
            found.append(f"{where}: its row is not NaN")
        rest = torch.arange(len(plain)) != place
        # Where a row overflows, its NaN differ from themselves.
        if not torch.equal(plain[rest].nan_to_num(7.0), other[rest].nan_to_num(7.0)):
            found.append(f"{where}: other rows change")
    return found


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome(
        figures={"by edge": {}},
        exceptions=["equal upsampled classes, or queries: the reference may take the second"],
    )
    for number in numbers:
        edge = case_of(number)[1]
        outcome.failures += failures_of(number) + nan_tokens(number)
        outcome.checked += 1
        counts = outcome.figures["by edge"]
        counts[edge] = counts.get(edge, 0) + 1
    return outcome
