"""HyperT's stem alone against `eager`, and what its steps take: ``python -m benchmarks.stem 1 32``.

Arguments: images and bands. Medians of interleaved runs on the CPU; processor time, so for one
thread (``OMP_NUM_THREADS=1``). ``--dtype bfloat16``: also against `eager` in float32.
``--compile``: HyperT in evaluation also against ``torch.compile`` of `eager`.
``--memory``: instead, the peak memory of forward and backward with everything trained and, as
published, with the tokenizer frozen; and the gradients of weights, which everyone holds at last.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.clock import ProcessorTime, interleave
from benchmarks.memory import peak_bytes
from benchmarks.variants import compiled, on_reference
from spectralx_kernels import HyperT

Run = Callable[[], object]


def medians(runs: dict[str, Run]) -> dict[str, float]:
    """Milliseconds of processor time of each."""
    watch = ProcessorTime()
    turns = {name: (lambda _, run=run: run()) for name, run in runs.items()}
    samples = interleave(turns, watch, seconds=2.0, rounds=(3, 20), warm_up=watch.warm_up)
    return {name: statistics.median(taken) * 1e3 for name, taken in samples.items()}


def against_eager(
    name: str, run: Run, wide: Run | None = None, compiled_run: Run | None = None
) -> None:
    """Print `run` against the reference, that of `wide`, which is float32, and `compiled_run`."""
    others = {"eager": on_reference(run)}
    if compiled_run is not None:
        compiled_run()  # compiles
        others["compile"] = compiled_run
    if wide is not None:
        others["eager float32"] = on_reference(wide)
    found = medians({"fused": run, **others})
    fused = found["fused"]
    rows = [f"{other} {found[other]:7.1f} ms {found[other] / fused:.2f}" for other in others]
    print(f"{name:32} fused {fused:7.1f} ms  {'  '.join(rows)}", flush=True)


def peaks(name: str, run: Run, module: torch.nn.Module) -> None:
    grads = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    eager, fused = (peak_bytes(each, "cpu") / 2**20 for each in (on_reference(run), run))
    print(
        f"{name}, peak: eager {eager:.0f}, fused {fused:.0f} MiB, {fused / eager:.2f}; "
        f"gradients {grads / 2**20:.0f} MiB"
    )


def steps(batch: int, bands: int) -> None:
    """The convolutions in both layouts, and folded."""
    last = torch.channels_last
    runs: dict[str, Run] = {}
    for name, channels, outs, kernel, side in (
        ("3x3 64 to 64", 64, 64, 3, 224),
        ("3x3 folded", bands + 1, 64, 3, 224),
        ("3x3 of the bands alone", bands, 64, 3, 224),
        ("1x1 of the folded bands to 64", bands + 1, 64, 1, 224),
        ("2x2 64 to 128", 64, 128, 2, 224),
        ("3x3 128 to 128", 128, 128, 3, 112),
        ("2x2 128 to 256", 128, 256, 2, 112),
        ("3x3/2 256 to 512", 256, 512, 3, 56),
    ):
        x, weight = (
            torch.randn(batch, channels, side, side),
            torch.randn(outs, channels, kernel, kernel),
        )
        stride, padding = 2 if kernel == 2 or outs == 512 else 1, kernel // 2 * (kernel % 2)
        for layout, given in (("planes", x), ("channels-last", x.contiguous(memory_format=last))):
            runs[f"{name}, {layout}"] = partial(
                F.conv2d, given, weight, stride=stride, padding=padding
            )
    for name, took in medians(runs).items():
        print(f"{name:40} {took:7.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=int)
    parser.add_argument("bands", type=int)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--forward", action="store_true", help="no backward passes")
    parser.add_argument("--compile", action="store_true", help="HyperT in evaluation alone")
    given = parser.parse_args()
    batch, bands = given.images, given.bands
    if given.steps:
        with torch.no_grad():
            steps(batch, bands)
        return
    torch.manual_seed(0)
    model = HyperT(bands, [0.4 + 0.01 * band for band in range(bands)], trainable="all")
    images = torch.rand(batch, bands, 224, 224)
    plain, plain_images = model, images
    if given.dtype == "bfloat16":
        model, images = copy.deepcopy(model).bfloat16(), images.bfloat16()
    stem, plain_stem = model.proj.downsample_module, plain.proj.downsample_module

    def train(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(run(), [p for p in module.parameters() if p.requires_grad])

    def of_stem() -> object:
        return train(stem, lambda: stem(images).sum())

    def of_model() -> object:
        return train(model, lambda: torch.stack([out.sum() for out in model(images)]).sum())

    if given.memory:
        model.train()
        for name, module, run in (("stem", stem, of_stem), ("HyperT", model, of_model)):
            peaks(name, run, module)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("proj."))
        peaks("HyperT, tokenizer frozen", of_model, model)
        return

    if given.compile:
        with torch.no_grad():
            model.eval()
            against_eager(
                "HyperT, evaluation",
                partial(model, images),
                compiled_run=partial(compiled(model), images),
            )
        return

    def forward(name: str, run: Run, wide: Run) -> None:
        against_eager(name, run, wide if given.dtype == "bfloat16" else None)

    with torch.no_grad():
        for module in (model, plain):
            module.eval()
        forward("stem, evaluation", lambda: stem(images), lambda: plain_stem(plain_images))
        forward("HyperT, evaluation", lambda: model(images), lambda: plain(plain_images))
        for module in (model, plain):
            module.train()
        forward("stem, frozen", lambda: stem(images), lambda: plain_stem(plain_images))
    if not given.forward:
        against_eager("stem, forward + backward", of_stem)
        against_eager("HyperT, forward + backward", of_model)


if __name__ == "__main__":
    main()
