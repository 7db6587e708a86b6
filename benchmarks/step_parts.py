"""Where the time and the memory of one training step go, before and after.

    python -m benchmarks.step_parts [stage1|stage2] [--device cpu|cuda] [--dtype float32]
                                    [--shape NAME] [--rounds N] [--out DIR]

"before" runs the reference operators and, in stage 1, a head of plain modules, in stage 2 a decoder
that forms every upsampled map; "after" is what runs by default. Both are the model of
`benchmarks.stages` on the same weights and the same noise. First the loss and the gradients of
"after" are held against those of "before"; where they disagree the run ends with status 1 and no
numbers. Then the two run in turns, `rounds` times each.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import by_part, compare
from benchmarks.case import Draw, Setting
from benchmarks.conftest import DTYPES, machine_facts
from benchmarks.memory import SavedBytes, peaks_by_label
from benchmarks.report import as_markdown, as_text, machine_name
from benchmarks.shapes import StepShape, find
from benchmarks.stages import STAGES, Stage, is_narrow, optimizer_of
from benchmarks.variants import on_reference
from benchmarks.watch import BACKWARD, PREFIX, Watch

MIB = 2**20


class Step:
    """One training step of a model, watched.

    Parameters
    ----------
    stage : of training.
    model : as ``stage.model_of`` makes it.
    eager : on the reference operators.
    """

    def __init__(
        self, stage: Stage, model: nn.Module, eager: bool, inputs: Any, setting: Setting
    ) -> None:
        self.stage, self.model, self.inputs, self.setting = stage, model, inputs, setting
        self.watch = Watch(setting.device)
        self.optimizer = optimizer_of(model)
        loss = stage.loss(model)
        self._loss: Callable[..., Tensor] = on_reference(loss) if eager else loss

    def run(self, *, update: bool = True) -> Tensor:
        """The loss; without `update` the gradients are left on the parameters."""
        torch.manual_seed(0)
        device, dtype = self.setting.device, self.setting.dtype
        watch = self.watch
        watch.start()
        with self.stage.watched(self.model, watch):
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
            return peaks_by_label(lambda: self.run(), PREFIX)
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


def table(before: Found, after: Found, parts: Sequence[str]) -> list[list[str]]:
    """A row for each of `parts`, then all."""
    pairs = (before, after)
    rows = [["part"]]
    for kind in ("forward ms", "backward ms"):
        rows[0] += [f"{kind} before", "after"]
    rows[0] += ["before/after"]
    for kind in ("saved MiB", "peak MiB"):
        rows[0] += [f"{kind} before", "after"]
    for part in parts:
        times = [[each.ms(part), each.ms(part + BACKWARD)] for each in pairs]
        ratio = sum(times[0]) / max(sum(times[1]), 1e-9)
        row = [part, *(f"{each[0]:.1f}" for each in times)]
        row += ["" if part == "optimizer" else f"{each[1]:.1f}" for each in times]
        row += [f"{ratio:.2f}", *(f"{each.saved.get(part, 0) / MIB:.1f}" for each in pairs)]
        rows.append([*row, *(f"{each.peak(part):.1f}" for each in pairs)])
    whole = [
        [sum(each.ms(part + way) for part in parts) for each in pairs] for way in ("", BACKWARD)
    ]
    last = ["step", *(f"{ms:.1f}" for way in whole for ms in way)]
    last += [f"{before.total() / after.total():.2f}"]
    last += [f"{sum(each.saved.values()) / MIB:.1f}" for each in pairs]
    rows.append([*last, *(f"{max(map(each.peak, parts)):.1f}" for each in pairs)])
    return rows


def measure(stage: Stage, shape: StepShape, setting: Setting, rounds: int) -> tuple[Found, Found]:
    """Before and after. Raises AssertionError where they disagree."""
    draw = Draw(Setting(setting.device), seed=0)
    model = stage.model_of(shape, draw)
    inputs = stage.input_set(shape, draw)
    before = Step(stage, stage.plain(model), True, inputs, setting)
    after = Step(stage, model, False, inputs, setting)
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


def document(stage: str, rows: list[list[str]], group: str, facts: dict[str, Any]) -> str:
    """The Markdown page."""
    assert __doc__ is not None
    explained = __doc__[__doc__.index('"before" runs') : __doc__.index("``--out")].strip()
    about = ", ".join(f"{key} {facts[key]}" for key in ("threads", "torch", "commit", "rounds"))
    return "\n".join(
        [
            f"# One step of stage {stage.removeprefix('stage')} by part: {facts['device']}",
            "",
            f"`python -m benchmarks.step_parts {stage}`. {explained}",
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
    parser.add_argument("stage", nargs="?", default="stage2", choices=list(STAGES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    names = [shape.name for stage in STAGES.values() for shape in stage.shapes]
    parser.add_argument("--shape", choices=names, help="default: the stage's first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("--device: got cuda, but torch sees no GPU", file=sys.stderr)
            return 2
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setting = Setting(options.device, DTYPES[options.dtype])
    stage = STAGES[options.stage]
    try:
        shape = find(stage.shapes, options.shape or stage.shapes[0].name)
    except ValueError as wrong:
        print(wrong, file=sys.stderr)
        return 2
    try:
        before, after = measure(stage, shape, setting, options.rounds)
    except AssertionError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    rows, group = table(before, after, stage.parts), f"step/{shape.name}/{options.dtype}"
    print(f"{group}\n{as_text(rows)}")
    if options.out is not None:
        facts = {**machine_facts(options.device), "rounds": options.rounds}
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"{machine_name(facts)}-step-{shape.name}-{options.dtype}.md"
        (options.out / name).write_text(document(options.stage, rows, group, facts))
        print(f"wrote {options.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
