"""One stage of one run in a process of its own: ``python -m spectralx.comparison.work``.

A process of its own, so that its peak memory is that of the run alone and a crash ends nothing
else. What it reached is written last and in one step: a stage is finished if its record is there.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from spectralx import checkpoints
from spectralx.cli import run_command, write_text
from spectralx.fit import FitResult, Stage, fit
from spectralx.options import load_settings, parse
from spectralx.segmentation import Segmentation

SETTINGS = "settings.yaml"


def record_path(run: Path, stage: Stage) -> Path:
    """Where the record of a finished stage is."""
    return run / f"{stage}.json"


def peak_memory() -> tuple[int, str]:
    """Bytes at the peak and what they are of: the GPU's tensors, or the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "tensors on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set of the process"


def parameters(best: Path) -> dict[str, int]:
    """Parameters of the model of a checkpoint: all, those that train, and those of the decoder."""
    model = checkpoints.load(best).build()
    trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    decoder = isinstance(model, Segmentation)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(trains.values()),
        "trainable_decoder": sum(
            count for name, count in trains.items() if decoder and name.startswith(("neck", "head"))
        ),
    }


def record(result: FitResult, seconds: float) -> dict[str, Any]:
    """What is kept of a finished stage, as JSON holds it."""
    evaluation = result.evaluation
    assert evaluation is not None
    memory, of = peak_memory()
    first = next(iter(evaluation.scores.values()), None)
    return {
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "peak_memory_of": of,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        **parameters(result.best),
        "validation": result.after,
        "tests": evaluation.tests,
        "class_names": [] if first is None else list(first.class_names),
        "matrices": {name: scores.matrix.tolist() for name, scores in evaluation.scores.items()},
    }


def work(run: Path, stage: Stage) -> None:
    """Train `stage` of the experiment ``run/settings.yaml`` and write its record.

    Seconds are those of the whole stage: reading, training, validation and test; of the last part
    of it where an interrupted stage goes on.
    """
    settings = load_settings(run / SETTINGS)
    interrupted = (Path(settings.out) / stage).exists()
    started = time.monotonic()
    result = fit(stage, settings)
    found = {"interrupted": interrupted, **record(result, time.monotonic() - started)}
    write_text(record_path(run, stage), json.dumps(found, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.comparison.work``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog="spectralx.comparison.work", exit_on_error=False)
    parser.add_argument("run", type=str, help="folder of the run, with its settings.yaml")
    parser.add_argument("stage", choices=["stage1", "stage2"], help="what to train")

    def body() -> None:
        options = parse(parser, arguments)
        work(Path(options["run"]), options["stage"])

    return run_command("spectralx.comparison.work", body)


if __name__ == "__main__":
    sys.exit(main())
