"""Row 3: errors against float64 relative to the reference's own, of drawn calls.

An error may be 2 (forward) or 3 (backward) times the reference's own plus a round-off,
`tests/tolerances.py`. The ratio published is the error over the reference's own error and the share
of the round-off, so that the bound is 2 or 3. What the reference errs in one draw is small by
chance in some: where a first look exceeds the bound, its error is the largest of several draws of
the same sizes. It then counts as no less than what the float64 truth itself moves by where every
number given is changed by up to `ROUNDINGS` roundings (of float32 for the half types, whose sums
are formed in it), up to `CONDITION` roundings: no implementation can know a sum of terms that
cancel better, of which it rounds terms and partial sums. Beyond that a call says nothing, as with a
ReLU whose argument is zero but for round-off: where such changes explain the error it is drawn
again, and counted. An error that they do not explain fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.aomoa.ops import AOMOA, GATING
from spectralx_kernels.reconstruction.masking import RANDOM_MASKING
from spectralx_kernels.upsample.confusion import CONFUSION_MATRIX_UPDATE
from tests.harden.contract import DTYPES, TRITON_ROUND
from tests.harden.draws import Draw, arrange
from tests.harden.operators import ENTRIES, Entry
from tests.harden.record import Outcome
from tests.kernels.aomoa.by_name import redrawn
from tests.kernels.ladder import cast, error_beside, moved, outputs_of, run_with_gradients
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

Results = dict[str, Tensor]

ATTEMPTS = 50  # to draw a call whose choices round-off cannot overturn
REDRAWS = 8  # draws that the reference's own error is the largest of
CHANGES = 8  # of the numbers given, that the truth's move is the largest of
ROUNDINGS = 4  # that a number may have gone through when it is compared or added
CONDITION = 200  # roundings of a result that those may come to
# Operators that compare numbers and compute none.
EXACT = (RANDOM_MASKING.name, CONFUSION_MATRIX_UPDATE.name)
TOKENS_OF_AOMOA = 11  # the place of the noise, [A, T, E]


class Kind(NamedTuple):
    """What a sample is computed in. TF32 has float16's mantissa: its choices and its round-off are
    those of float16, and the reference's own error that of the device."""

    dtype: torch.dtype
    device: str = "cpu"
    tf32: bool = False

    @property
    def rounding(self) -> torch.dtype:
        """The dtype whose round-off this has."""
        return torch.float16 if self.tf32 else self.dtype

    @property
    def of_sums(self) -> float:
        """One rounding of what sums are formed in: products of TF32 are rounded as float16's."""
        if self.tf32:
            return torch.finfo(self.rounding).eps
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps

    def __str__(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype)


def choices(entry: Entry, args: Sequence[Any]) -> list[Tensor]:
    """What a call decides: labels, matches, experts."""
    outputs = outputs_of(entry.operator.reference(*entry.complete(list(args))))
    if entry.name in (AOMOA.name, GATING.name):
        return [outputs[1 if entry.name == AOMOA.name else 0] != 0]
    return [output for output in outputs if not output.is_floating_point()]


def perturbed(args: Sequence[Any], size: float, seed: int) -> list[Any]:
    """`args` with every number changed by up to the factor 1 + `size`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        value * (1 + size * (2 * torch.rand(value.shape, generator=generator) - 1).to(value))
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in args
    ]


def decided(entry: Entry, args: Sequence[Any], kind: Kind) -> Sequence[Any] | None:
    """`args`, or those tokens of them, whose choices round-off of the kind cannot overturn."""
    dtype = kind.dtype
    exact = cast(cast(args, dtype), torch.float64)
    chosen = choices(entry, exact)
    if not chosen or entry.name in EXACT:
        return args
    # AoMoA computes its logits in the dtype, all others what they compare in float32 or float64.
    coarse = kind.tf32 or entry.name == AOMOA.name
    size = ROUNDINGS * (torch.finfo(kind.rounding).eps if coarse else kind.of_sums)
    others = [choices(entry, perturbed(exact, size, seed)) for seed in range(4)]
    same = [
        torch.stack([other[place] == one for other in others]).all(0)
        for place, one in enumerate(chosen)
    ]
    if all(each.all() for each in same):
        return args
    if entry.name != AOMOA.name:
        return None
    kept = same[0].all(2).all(0)
    noise = args[TOKENS_OF_AOMOA]
    noise = noise if noise is None else noise[:, kept]
    return (
        args[0][kept], *args[1:TOKENS_OF_AOMOA], noise, *args[TOKENS_OF_AOMOA + 1 :],
    )  # fmt: skip


def drawn(number: int, kind: Kind, large: bool) -> Iterator[tuple[Entry, Sequence[Any], Draw]]:
    """The decided calls of a sample."""
    entry = ENTRIES[number % len(ENTRIES)].on(kind.device)
    for attempt in range(ATTEMPTS):
        draw = Draw(number + attempt * 1_000_003, large=large, conditioned=True)
        args = decided(entry, entry.draw(draw), kind)
        if args is not None:
            yield entry, args, draw
    raise RuntimeError(f"sample {number}: {entry.name}: no decided call in {ATTEMPTS} draws")


def results(
    entry: Entry, run: Callable[..., Any], args: Sequence[Any], layouts: Sequence[str],
    dtype: torch.dtype, device: str = "cpu",
) -> Results:  # fmt: skip
    """Outputs and gradients by name, on the CPU."""
    there = args if device == "cpu" else moved(args, device)
    leaves = arrange(there, layouts, dtype, grad=entry.differentiable, constants=entry.constants)
    completed = entry.complete(leaves)
    outputs, grads = run_with_gradients(run, completed)
    found = {f"output {place}": output for place, output in enumerate(outputs)}
    for place, name in enumerate(entry.names):
        if f"argument {place}" in grads:
            found[f"gradient of {name}"] = grads[f"argument {place}"]
    return {name: value.cpu() for name, value in found.items()}


def with_gradients(
    reference: Callable[..., Any], changes: Sequence[Callable[[Tensor], Tensor]]
) -> Callable[..., Any]:
    """`reference` whose incoming gradients are changed, one function an output."""

    def run(*values: Any) -> list[Tensor]:
        outputs = outputs_of(reference(*values))
        for output, change in zip(outputs, changes, strict=True):
            if output.requires_grad:
                output.register_hook(change)
        return outputs

    return run


@dataclass(frozen=True)
class Call:
    """A decided call: its truth, and what the reference errs."""

    entry: Entry
    args: Sequence[Any]
    layouts: Sequence[str]
    kind: Kind

    @cached_property
    def plain(self) -> Results:
        """The reference's in the dtype."""
        kind = self.kind
        return results(
            self.entry, self.entry.operator.reference, self.args, self.layouts, kind.dtype,
            kind.device if kind.tf32 else "cpu",
        )  # fmt: skip

    def truth(self, size: float = 0.0, seed: int = 0) -> Results:
        """In float64, of what an implementation in the dtype is given, rounded arguments and
        incoming gradients; every number changed by up to the factor 1 + `size`."""
        args = cast(cast(self.args, self.kind.dtype), torch.float64)
        dtypes = [value.dtype for name, value in self.plain.items() if name.startswith("output")]

        def change(grad: Tensor, dtype: torch.dtype, place: int) -> Tensor:
            rounded = grad.to(dtype).to(grad.dtype)
            changed: Tensor = perturbed([rounded], size, CHANGES * (1 + place) + seed)[0]
            return changed

        changes = [partial(change, dtype=dtype, place=place) for place, dtype in enumerate(dtypes)]
        run = with_gradients(self.entry.operator.reference, changes)
        return results(self.entry, run, perturbed(args, size, seed), self.layouts, torch.float64)

    @cached_property
    def exact(self) -> Results:
        return self.truth()

    @cached_property
    def own(self) -> dict[str, float]:
        """The reference's errors."""
        return {
            name: error_of(self.plain[name], value, self.exact)
            for name, value in self.exact.items()
            if value.is_floating_point()
        }

    @cached_property
    def moved(self) -> dict[str, float]:
        """How far the truth moves where every number given changes by up to `ROUNDINGS`."""
        moved = dict.fromkeys(self.own, 0.0)
        for seed in range(CHANGES):
            other = self.truth(ROUNDINGS * self.kind.of_sums, seed)
            for name in moved:
                moved[name] = max(moved[name], error_of(other[name], self.exact[name], self.exact))
        return moved

    @property
    def most(self) -> float:
        """That `moved` counts for."""
        return CONDITION * self.kind.of_sums

    @cached_property
    def typical(self) -> dict[str, float]:
        """The reference's errors, as the largest of several draws and of what round-off moves."""
        others = [
            Call(self.entry, args, self.layouts, self.kind).own
            for args in redraws(self.entry, self.args, self.kind)
        ]
        return {
            name: max(own, min(self.moved[name], self.most), *(other[name] for other in others))
            for name, own in self.own.items()
        }

    def says_nothing(self, name: str, error: float, factor: float) -> bool:
        """Whether round-off moves a result by more than counts, and explains the error."""
        return self.moved[name] > self.most and error <= factor * self.moved[name]


def error_of(found: Tensor, truth: Tensor, exact: Results) -> float:
    """`relative_error`; but of what is zero in exact arithmetic (the gradient of a bias before a
    batch norm, say) relative to the largest gradient of the call, or to 1."""
    gradients = [value.abs().max() for name, value in exact.items()
                 if name.startswith("gradient") and value.numel()]  # fmt: skip
    scale = max([1.0, *map(float, gradients)])
    return error_beside(found, truth, scale)


def redraws(entry: Entry, args: Sequence[Any], kind: Kind) -> Iterator[Sequence[Any]]:
    for seed in range(1, REDRAWS + 1):
        found = decided(entry, redrawn(args, seed), kind)
        if found is not None:
            yield found


def sample(
    number: int, given: Kind | None = None
) -> tuple[Entry, list[str], dict[str, float], int]:
    """The operator of a sample, its failures, its ratios "forward" and "backward", and how often it
    was drawn again; on a CPU its number says in what it is computed."""
    round_ = number // len(ENTRIES)
    kind = given or Kind(DTYPES[round_ % len(DTYPES)])
    triton = kind.device == "cuda" or round_ % TRITON_ROUND == 0
    calls = drawn(number, kind, large=number % 4 == 0 and not (triton and kind.device == "cpu"))
    for again, (entry, args, draw) in enumerate(calls):
        backends = [
            backend
            for backend in _backends.available(entry.name, kind.device, kind.dtype)
            if backend != "eager" and (triton or backend != "triton")
        ]
        call = Call(entry, args, draw.layouts(args), kind)
        found = compared(call, backends, f"sample {number}: {entry.name}")
        if found is not None:
            return entry, *found, again
    raise AssertionError("drawn raises")


def compared(
    call: Call, backends: Sequence[str], where: str
) -> tuple[list[str], dict[str, float]] | None:
    """Failures and ratios of a call; None where it says nothing."""
    entry, exact, kind = call.entry, call.exact, call.kind
    failures: list[str] = []
    ratios = {"forward": 0.0, "backward": 0.0}
    for backend in backends:
        found = results(
            entry,
            lambda *values, backend=backend: entry.operator(*values, backend=backend),
            call.args,
            call.layouts,
            kind.dtype,
            kind.device,
        )
        for name, value in found.items():
            here = f"{where}, {backend}, {kind}, {name}"
            if name not in exact:  # the reference does not use the argument: no gradient
                if value.any():
                    failures.append(f"{here}: a gradient of what has none")
                continue
            truth = exact[name]
            if not truth.is_floating_point():
                if not torch.equal(value, truth):
                    failures.append(f"{here}: other integers than the reference's")
                continue
            error = error_of(value, truth, exact)
            side = "forward" if name.startswith("output") else "backward"
            factor = FORWARD_FACTOR if side == "forward" else BACKWARD_FACTOR
            share = ROUND_OFF[kind.rounding] / factor
            own = call.own[name]
            if error / (own + share) > factor:
                own = call.typical[name]
            ratio = error / (own + share)
            if not ratio <= factor:
                if call.says_nothing(name, error, factor):
                    return None
                failures.append(f"{here}: error {error:.3g}, the reference's {own:.3g}")
            ratios[side] = max(ratios[side], ratio)
        failures += [
            f"{where}, {backend}, {kind}: no {name}" for name in exact.keys() - found.keys()
        ]
    return failures, ratios


def run(numbers: Iterable[int], kind_of: Callable[[int], Kind | None] = lambda _: None) -> Outcome:
    figures: dict[str, Any] = {"worst forward ratio": {}, "worst backward ratio": {}}
    outcome = Outcome(figures={**figures, "calls drawn again": 0})
    for number in numbers:
        entry, failures, ratios, again = sample(number, kind_of(number))
        outcome.failures += failures
        outcome.checked += 1
        outcome.figures["calls drawn again"] += again
        for side, ratio in ratios.items():
            worst = outcome.figures[f"worst {side} ratio"]
            worst[entry.name] = max(worst.get(entry.name, 0.0), round(ratio, 3))
    return outcome
