"""Row 3: errors against float64 relative to the reference's own, of drawn calls.

An error may be 2 (forward) or 3 (backward) times the reference's own plus a round-off,
`tests/tolerances.py`. The ratio published is the error over the reference's own error and the share
of the round-off, so that the bound is 2 or 3. What the reference errs in one draw is small by
chance in some: where a first look exceeds the bound, its error is the largest of several draws of
the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from tests.kernels.ladder import cast, moved, outputs_of, relative_error, run_with_gradients
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

Results = dict[str, Tensor]

ATTEMPTS = 50  # to draw a call whose choices round-off cannot overturn
REDRAWS = 8  # draws that the reference's own error is the largest of
# Operators that compare numbers and compute none.
EXACT = (RANDOM_MASKING.name, CONFUSION_MATRIX_UPDATE.name)
ZERO = 1e-10  # of the largest gradient: below it one is zero but for round-off of float64
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
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coarse = kind.tf32 or entry.name == AOMOA.name
    size = 4 * torch.finfo(kind.rounding if coarse else wide).eps
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


def drawn(number: int, kind: Kind, large: bool) -> tuple[Entry, Sequence[Any], Draw]:
    """The first decided call of a sample."""
    entry = ENTRIES[number % len(ENTRIES)].on(kind.device)
    for attempt in range(ATTEMPTS):
        draw = Draw(number + attempt * 1_000_003, large=large, conditioned=True)
        args = decided(entry, entry.draw(draw), kind)
        if args is not None:
            return entry, args, draw
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


def with_rounded_gradients(
    reference: Callable[..., Any], dtypes: Sequence[torch.dtype]
) -> Callable[..., Any]:
    """`reference` in float64 whose incoming gradients are rounded as those of outputs in `dtypes`
    are: the truth is of what an implementation in those is given."""

    def run(*values: Any) -> list[Tensor]:
        outputs = outputs_of(reference(*values))
        for output, dtype in zip(outputs, dtypes, strict=True):
            if output.requires_grad:
                output.register_hook(lambda grad, dtype=dtype: grad.to(dtype).to(grad.dtype))
        return outputs

    return run


def exact_and_own(
    entry: Entry, args: Sequence[Any], layouts: Sequence[str], kind: Kind
) -> tuple[Results, dict[str, float]]:
    """The truth, and the error of the reference in the dtype."""
    reference, dtype = entry.operator.reference, kind.dtype
    plain = results(entry, reference, args, layouts, dtype, kind.device if kind.tf32 else "cpu")
    dtypes = [value.dtype for name, value in plain.items() if name.startswith("output")]
    truth = with_rounded_gradients(reference, dtypes)
    exact = results(entry, truth, cast(args, dtype), layouts, torch.float64)
    own = {
        name: error_of(plain[name], value, exact)
        for name, value in exact.items()
        if value.is_floating_point()
    }
    return exact, own


def error_of(found: Tensor, truth: Tensor, exact: Results) -> float:
    """`relative_error`; but of what is zero in exact arithmetic (the gradient of a bias before a
    batch norm, say) relative to the largest gradient of the call, or to 1."""
    gradients = [value.abs().max() for name, value in exact.items()
                 if name.startswith("gradient") and value.numel()]  # fmt: skip
    scale = max([1.0, *map(float, gradients)])
    if truth.numel() and truth.isfinite().all() and truth.abs().max() <= ZERO * scale:
        return float((found.double() - truth.double()).abs().max()) / scale
    return relative_error(found, truth)


def redraws(entry: Entry, args: Sequence[Any], kind: Kind) -> Iterator[Sequence[Any]]:
    for seed in range(1, REDRAWS + 1):
        found = decided(entry, redrawn(args, seed), kind)
        if found is not None:
            yield found


def sample(number: int, given: Kind | None = None) -> tuple[Entry, list[str], dict[str, float]]:
    """The operator of a sample, its failures, and its ratios "forward" and "backward"; on a CPU its
    number says in what it is computed."""
    round_ = number // len(ENTRIES)
    kind = given or Kind(DTYPES[round_ % len(DTYPES)])
    dtype, triton = kind.dtype, kind.device == "cuda" or round_ % TRITON_ROUND == 0
    large = number % 4 == 0 and not (triton and kind.device == "cpu")
    entry, args, draw = drawn(number, kind, large=large)
    layouts = draw.layouts(args)
    exact, own = exact_and_own(entry, args, layouts, kind)
    backends = _backends.available(entry.name, kind.device, dtype)
    failures: list[str] = []
    ratios = {"forward": 0.0, "backward": 0.0}
    widened = False
    for backend in backends:
        if backend == "eager" or (backend == "triton" and not triton):
            continue
        found = results(
            entry,
            lambda *values, backend=backend: entry.operator(*values, backend=backend),
            args,
            layouts,
            dtype,
            kind.device,
        )
        for name, value in found.items():
            where = f"sample {number}: {entry.name}, {backend}, {kind}, {name}"
            if name not in exact:  # the reference does not use the argument: no gradient
                if value.any():
                    failures.append(f"{where}: a gradient of what has none")
                continue
            truth = exact[name]
            if not truth.is_floating_point():
                if not torch.equal(value, truth):
                    failures.append(f"{where}: other integers than the reference's")
                continue
            error = error_of(value, truth, exact)
            side = "forward" if name.startswith("output") else "backward"
            factor = FORWARD_FACTOR if side == "forward" else BACKWARD_FACTOR
            share = ROUND_OFF[kind.rounding] / factor
            if error / (own[name] + share) > factor and not widened:
                widened = True
                for other in redraws(entry, args, kind):
                    for key, more in exact_and_own(entry, other, layouts, kind)[1].items():
                        own[key] = max(own[key], more)
            ratio = error / (own[name] + share)
            ratios[side] = max(ratios[side], ratio)
            if not ratio <= factor:
                failures.append(f"{where}: error {error:.3g}, the reference's {own[name]:.3g}")
        failures += [
            f"sample {number}: {entry.name}, {backend}, {kind}: no {name}"
            for name in exact.keys() - found.keys()
        ]
    return entry, failures, ratios


def run(numbers: Iterable[int], kind_of: Callable[[int], Kind | None] = lambda _: None) -> Outcome:
    outcome = Outcome(figures={"worst forward ratio": {}, "worst backward ratio": {}})
    for number in numbers:
        entry, failures, ratios = sample(number, kind_of(number))
        outcome.failures += failures
        outcome.checked += 1
        for side, ratio in ratios.items():
            worst = outcome.figures[f"worst {side} ratio"]
            worst[entry.name] = max(worst.get(entry.name, 0.0), round(ratio, 3))
    return outcome
