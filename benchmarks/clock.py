"""Timing: implementations in turns, and the samples handed to pytest-benchmark.

pytest-benchmark runs one test to its end before the next, so a change of the machine's speed
between two implementations reads as a difference between them. Here all implementations of a
group are therefore timed in one go, in turns, a round at a time, when the group's first test
runs. Each test then hands its own samples over through pytest-benchmark's public interface:
`Replay` is the timer of the test (``@pytest.mark.benchmark(timer=...)``) and its target (in
``benchmark.pedantic``), a call of which moves that timer on by the next recorded sample. The
JSON file thus holds the true samples, in the order taken, under pytest-benchmark's own
statistics.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

# Twice the L2 cache of the largest GPU, written before every timed call.
FLUSH_BYTES = 256 * 2**20
# Seconds of a round above which its implementations are called only twice each.
SLOW_ROUND = 10.0


class Stopwatch:
    """Seconds that a call takes on the CPU."""

    warm_up = 1

    def __call__(self, run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


class ProcessorTime(Stopwatch):
    """Seconds of processor time that a call takes, of all threads together: on a busy machine, with
    one thread, what the call itself takes."""

    def __call__(self, run: Callable[[], object]) -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin


class CudaStopwatch(Stopwatch):
    """Seconds between two CUDA events around a call, from a cold L2 cache, host time included
    where the GPU waits for the host."""

    warm_up = 3

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Callable[[], object]) -> float:
        self._flush.fill_(1)
        torch.cuda.synchronize()
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self._begin.elapsed_time(self._end)
        return milliseconds / 1e3


def stopwatch_for(device: str) -> Stopwatch:
    """The stopwatch of a device type."""
    return CudaStopwatch() if device == "cuda" else Stopwatch()


def interleave(
    runs: Mapping[str, Callable[[int], object]],
    stopwatch: Callable[[Callable[[], object]], float],
    *,
    seconds: float,
    rounds: tuple[int, int],
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every call of `runs`, taken in turns.

    Parameters
    ----------
    runs : name -> function of the turn, a counter over all calls, by which it picks the next of
        its rotating inputs (so that none is still in the cache from the call before).
    stopwatch : seconds of one call.
    seconds : how long to measure; the last warm-up round gives the number of rounds.
    rounds : least and most rounds.
    warm_up : rounds that do not count, at least one. Of a round that takes longer than
        `SLOW_ROUND` two are taken and both count: there, a cold call makes no difference.

    Each round starts one name further, so none always follows the same other.
    """
    names = list(runs)
    turn = 0

    def one_round(first: int) -> dict[str, float]:
        nonlocal turn
        taken = {}
        for place in range(len(names)):
            name = names[(first + place) % len(names)]
            taken[name] = stopwatch(partial(runs[name], turn))
            turn += 1
        return taken

    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_up):
        warm = one_round(0)
    whole = sum(warm.values())
    if whole > SLOW_ROUND:
        count = min(1, rounds[1] - 1)
        samples = {name: [sample] for name, sample in warm.items()}
    else:
        count = min(max(int(seconds / max(whole, 1e-9)), rounds[0]), rounds[1])
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for first in range(1, count + 1):
            for name, sample in one_round(first % len(names)).items():
                samples[name].append(sample)
    finally:
        if enabled:
            gc.enable()
    return samples


class Replay:
    """A timer that a call of `advance` moves on by the next of the loaded samples."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: list[float] = []

    def load(self, samples: list[float]) -> None:
        """The samples to hand over, first to last."""
        self._now = 0.0
        self._samples = list(reversed(samples))

    def advance(self) -> None:
        self._now += self._samples.pop()

    def interleaved_samples(self) -> float:
        """The timer; its name is what the JSON file gives as the timer."""
        return self._now
