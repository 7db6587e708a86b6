"""What a device can do at most, measured: bytes copied and operations of matrix products a second.

    python -m benchmarks.ceilings [--device cpu|cuda]

Large operands, random, of one size for all dtypes; the median of several calls. "tf32" is float32's
products rounded to TF32, "float32" those that are not. An operator's roof is the larger of its
operations over the rate of its dtype and its bytes over the copies' (`seconds`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.clock import Stopwatch, stopwatch_for

# Bytes of a copy's source, and rows and columns of square products, by device type.
COPIED = {"cuda": 2**31, "cpu": 2**26}
SIDE = {"cuda": 8192, "cpu": 512}
RATES = ("bfloat16", "float16", "tf32", "float32")
COPY = "copy"  # bytes a second, read and written
_CALLS, _WARM_UP = 10, 3


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure(device: str, *, copied: int | None = None, side: int | None = None) -> dict[str, float]:
    """Bytes a second of a copy (`COPY`), and operations a second of `RATES`.

    Parameters
    ----------
    device : "cpu" has no TF32.
    copied, side : other sizes than those of the device type.
    """
    watch = stopwatch_for(device)
    copied, side = copied or COPIED[device], side or SIDE[device]
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = {COPY: 2 * copied / _median(watch, partial(target.copy_, source))}
    del source, target
    for name in RATES:
        if name == "tf32" and device == "cpu":
            continue
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        with _tf32(name == "tf32"):
            seconds = _median(watch, partial(torch.mm, left, right, out=out))
        found[name] = 2 * side**3 / seconds
    return found


def _median(watch: Stopwatch, run: Callable[[], object]) -> float:
    taken = [watch(run) for _ in range(_WARM_UP + _CALLS)]
    return statistics.median(taken[_WARM_UP:])


def seconds(ceilings: Mapping[str, float], operations: int, nbytes: int, dtype: str) -> float:
    """The roof: the least time that `operations` in `dtype` and `nbytes` read or written take.

    Raises KeyError for a dtype whose rate was not measured, unless there are no operations.
    """
    of_products = operations / ceilings[dtype] if operations else 0.0
    return max(of_products, nbytes / ceilings[COPY])


def shown(ceilings: Mapping[str, float]) -> str:
    """One line for a page."""
    rates = [f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in ceilings.items() if name != COPY]
    return ", ".join([f"copy {ceilings[COPY] / 1e12:.2f} TB/s (read and written)", *rates])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    print(shown(measure(options.device)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
