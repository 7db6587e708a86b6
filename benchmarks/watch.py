"""Time, and on a GPU memory, of the parts of a step: tensors note when they pass between parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BACKWARD = " backward"  # behind the name of a part on the way back
PREFIX = "part: "  # of the profiler events that name the part that begins


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
        with torch.profiler.record_function(PREFIX + part):
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
