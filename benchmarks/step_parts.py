"""Where the time and the memory of one training step of stage 2 go, before and after.

    python -m benchmarks.step_parts [--device cpu|cuda] [--dtype float32] [--shape NAME]
                                    [--rounds N] [--out DIR]

"before" runs the reference operators and a decoder that forms every upsampled map; "after" is what
runs by default. Both are the model of `benchmarks.bench_step` on the same weights and the same
noise. First the loss and the gradients of "after" are held against those of "before"; where they
disagree the run ends with status 1 and no numbers. Then the two run in turns, `rounds` times each.

For each part it prints

- `forward`, `backward`: medians, in ms. The tensors that pass from one part to the next note the
  time on their way, forward and backward; what is between two notes is the part's. Backward of what
  two parts share counts with the one that runs it. On a GPU each note waits for the device, so the
  parts are those of a step without overlap and add up to more than a step takes;
- `saved`: what autograd keeps of the part's forward pass for its backward, in MiB;
- `peak`: the most memory held beyond that before the step while the part runs, there or back, in
  MiB; parameters, gradients of the optimiser's last step and images were there before.

``--out DIR`` writes ``<machine>-step-<shape>-<dtype>.md`` there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import by_part, compare
from benchmarks.bench_step import input_set, is_narrow, model_of, optimizer_of
from benchmarks.case import Draw, Setting
from benchmarks.conftest import DTYPES, machine_facts
from benchmarks.memory import SavedBytes, peaks_by_label
from benchmarks.report import as_markdown, as_text, machine_name
from benchmarks.shapes import STEPS, StepShape, find
from benchmarks.variants import on_reference, with_plain_decoder
from spectralx.segmentation import Segmentation

PARTS = ("tokenizer", "backbone", "refinement", "decoder", "loss", "optimizer")
BACKWARD = " backward"  # behind the name of a part on the way back
_PREFIX = "part: "
MIB = 2**20


class Watch:
    """Charges time, and on a GPU memory, to the part that runs.

    Attributes
    ----------
    part : what runs now.
    seconds, peaks : by part, the way back apart.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.part = ""
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._since = 0.0
        self._before = 0

    def start(self) -> None:
        """Before the step."""
        self.part, self.seconds, self.peaks = "", {}, {}
        self._since = time.perf_counter()
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def enter(self, part: str) -> None:
        """From here on `part` runs; "" where the step is over."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - self._before
            self.peaks[self.part] = max(self.peaks.get(self.part, 0), peak)
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + now - self._since
        self.part, self._since = part, now
        with torch.profiler.record_function(_PREFIX + part):
            pass

    def crossing(self, tensors: Sequence[Tensor], left: str, entered: str) -> tuple[Tensor, ...]:
        """`tensors` on their way out of the part `left` into the part `entered`."""
        self.enter(entered)
        differentiated = [tensor for tensor in tensors if tensor.requires_grad]
        if not differentiated:
            return tuple(tensors)
        passed = iter(_Crossing.apply(self, left, *differentiated))  # type: ignore[no-untyped-call]
        return tuple(next(passed) if tensor.requires_grad else tensor for tensor in tensors)


class _Crossing(torch.autograd.Function):
    """The tensors themselves; on the way back their gradients enter the part they came from."""

    @staticmethod
    def forward(ctx: Any, watch: Watch, left: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.watch, ctx.left = watch, left
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.watch.enter(ctx.left + BACKWARD)
        return (None, None, *grads)


@contextmanager
def watched(model: Segmentation, watch: Watch) -> Iterator[None]:
    """Inside the block the tensors between the parts of `model` note when they pass."""
    are, features = model.AreApt, model.features
    assert are is not None
    project_keys, refine = are.project_keys, are.refine

    def after_tokenizer(_module: object, _inputs: object, outputs: Sequence[Tensor]) -> Any:
        return watch.crossing(outputs, "tokenizer", "backbone")

    def watched_keys(spatial: Tensor, spectral: Tensor) -> Any:
        given = watch.crossing((spatial, spectral), "tokenizer", "refinement")
        return watch.crossing(project_keys(*given), "refinement", "backbone")

    def watched_refine(tokens: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        (tokens,) = watch.crossing([tokens], "backbone", "refinement")
        return watch.crossing([refine(tokens, keys)], "refinement", "backbone")[0]

    def watched_features(images: Tensor) -> Any:
        return watch.crossing(features(images), "backbone", "decoder")

    def after_decoder(_module: object, _inputs: object, logits: Tensor) -> Tensor:
        return watch.crossing([logits], "decoder", "loss")[0]

    hooks = (
        model.vit_backbone.patch_embed.register_forward_hook(after_tokenizer),
        model.register_forward_hook(after_decoder),
    )
    replaced = (
        (are, "project_keys", watched_keys),
        (are, "refine", watched_refine),
        (model, "features", watched_features),
    )
    for owner, name, function in replaced:
        object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            object.__delattr__(owner, name)
        for hook in hooks:
            hook.remove()


class Step:
    """One training step of a model, watched.

    Parameters
    ----------
    model : as `benchmarks.bench_step.model_of` makes it.
    eager : on the reference operators.
    """

    def __init__(self, model: Segmentation, eager: bool, inputs: Any, setting: Setting) -> None:
        self.model, self.inputs, self.setting = model, inputs, setting
        self.watch = Watch(setting.device)
        self.optimizer = optimizer_of(model)
        self._loss: Callable[..., Tensor] = on_reference(model.loss) if eager else model.loss

    def run(self, *, update: bool = True) -> Tensor:
        """The loss; without `update` the gradients are left on the parameters."""
        torch.manual_seed(0)
        device, dtype = self.setting.device, self.setting.dtype
        watch = self.watch
        watch.start()
        with watched(self.model, watch):
            watch.enter("tokenizer")
            with torch.autocast(device, dtype, enabled=is_narrow(dtype)):
                loss = self._loss(*self.inputs)
            watch.enter("loss" + BACKWARD)
            loss.backward()
        watch.enter("optimizer")
        if update:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        watch.enter("")
        return loss.detach()

    def results(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Loss and gradients by name, and what was saved by part; the parameters stay as they are.

        Peaks are left out of the same run on purpose: these hooks hold on to what they count.
        """
        model = self.model
        known = [*self.inputs, *model.parameters(), *model.buffers()]
        with SavedBytes(known, lambda: self.watch.part.removesuffix(BACKWARD)) as saved:
            found = {"output 0": self.run(update=False)}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"], parameter.grad = parameter.grad, None
        return found, saved.by_label

    def peaks(self) -> dict[str, int]:
        """Most memory held, by part and direction, in a step of its own."""
        if self.setting.device == "cpu":
            return peaks_by_label(lambda: self.run(), _PREFIX)
        self.run()
        return self.watch.peaks


@dataclass
class Found:
    """What was measured of a step: ms and bytes, by part or by part and direction."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def ms(self, label: str) -> float:
        """Median over the rounds."""
        return 1e3 * statistics.median(each.get(label, 0.0) for each in self.rounds)

    def total(self) -> float:
        """Median of whole steps."""
        return 1e3 * statistics.median(sum(each.values()) for each in self.rounds)

    def peak(self, part: str) -> float:
        """In MiB, there or back."""
        return max(self.peaks.get(part, 0), self.peaks.get(part + BACKWARD, 0)) / MIB


def table(before: Found, after: Found) -> list[list[str]]:
    """A row a part, then all."""
    pairs = (before, after)
    rows = [["part"]]
    for kind in ("forward ms", "backward ms"):
        rows[0] += [f"{kind} before", "after"]
    rows[0] += ["before/after"]
    for kind in ("saved MiB", "peak MiB"):
        rows[0] += [f"{kind} before", "after"]
    for part in PARTS:
        times = [[each.ms(part), each.ms(part + BACKWARD)] for each in pairs]
        ratio = sum(times[0]) / max(sum(times[1]), 1e-9)
        row = [part, *(f"{each[0]:.1f}" for each in times)]
        row += ["" if part == "optimizer" else f"{each[1]:.1f}" for each in times]
        row += [f"{ratio:.2f}", *(f"{each.saved.get(part, 0) / MIB:.1f}" for each in pairs)]
        rows.append([*row, *(f"{each.peak(part):.1f}" for each in pairs)])
    whole = [
        [sum(each.ms(part + way) for part in PARTS) for each in pairs] for way in ("", BACKWARD)
    ]
    last = ["step", *(f"{ms:.1f}" for way in whole for ms in way)]
    last += [f"{before.total() / after.total():.2f}"]
    last += [f"{sum(each.saved.values()) / MIB:.1f}" for each in pairs]
    rows.append([*last, *(f"{max(map(each.peak, PARTS)):.1f}" for each in pairs)])
    return rows


def measure(shape: StepShape, setting: Setting, rounds: int) -> tuple[Found, Found]:
    """Before and after. Raises AssertionError where they disagree."""
    draw = Draw(Setting(setting.device), seed=0)
    model = model_of(shape, draw)
    inputs = input_set(shape, draw)
    before = Step(with_plain_decoder(model), True, inputs, setting)
    after = Step(model, False, inputs, setting)
    steps = (before, after)
    (plain, saved_before), (results, saved_after) = (step.results() for step in steps)
    plain, results = by_part(plain), by_part(results)
    compared = compare(results, plain, plain, setting.dtype)
    wrong = [str(each) for each in compared if not each.holds]
    assert not wrong, "; ".join(wrong)
    del plain, results, compared
    found = tuple(
        Found(saved=saved, peaks=step.peaks())
        for step, saved in zip(steps, (saved_before, saved_after), strict=True)
    )
    for turn in range(rounds):
        for place in (0, 1) if turn % 2 else (1, 0):
            steps[place].run()
            found[place].rounds.append(steps[place].watch.seconds)
    return found[0], found[1]


def document(rows: list[list[str]], group: str, facts: dict[str, Any]) -> str:
    """The Markdown page."""
    assert __doc__ is not None
    explained = __doc__[__doc__.index('"before" runs') : __doc__.index("``--out")].strip()
    about = ", ".join(f"{key} {facts[key]}" for key in ("threads", "torch", "commit", "rounds"))
    return "\n".join(
        [
            f"# One step of stage 2 by part: {facts['device']}",
            "",
            "`python -m benchmarks.step_parts`. " + explained,
            "",
            f"## {group}",
            "",
            as_markdown(rows),
            "",
            f"{about}.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_parts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--shape", default=STEPS[0].name, choices=[each.name for each in STEPS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("--device: got cuda, but torch sees no GPU", file=sys.stderr)
            return 2
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setting = Setting(options.device, DTYPES[options.dtype])
    try:
        before, after = measure(find(STEPS, options.shape), setting, options.rounds)
    except AssertionError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    rows, group = table(before, after), f"step/{options.shape}/{options.dtype}"
    print(f"{group}\n{as_text(rows)}")
    if options.out is not None:
        facts = {**machine_facts(options.device), "rounds": options.rounds}
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"{machine_name(facts)}-step-{options.shape}-{options.dtype}.md"
        (options.out / name).write_text(document(rows, group, facts))
        print(f"wrote {options.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
