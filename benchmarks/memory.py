"""Memory of one run: its peak, and what autograd keeps from the forward pass for the backward; what
the process keeps of freed memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

# The largest block that glibc may come to keep when it is freed, less what it puts around one.
KEPT_BYTES = 32 * 2**20 - 2**16


def keep_freed_memory() -> None:
    """Makes the process keep freed blocks of up to 32 MiB, as one that has run for a while does.

    glibc maps a large block anew at each allocation until a larger one has been freed, so the time
    of whatever allocates would depend on what ran before. Other C libraries are left as they are.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


class SavedBytes:
    """Counts the bytes saved for backward inside a ``with`` block.

    Each storage counts once, in full; the storages of `known` tensors (inputs and parameters,
    which live on anyway) do not count. `by_label` has the bytes by what `label` said when a storage
    was first saved.
    """

    def __init__(self, known: Iterable[Tensor], label: Callable[[], str] = str) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        # Keeping the storages alive keeps their addresses from being used again.
        self._storages: dict[int, tuple[str, Any]] = {}
        self._label = label
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.bytes = 0
        self.by_label: dict[str, int] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages.setdefault(storage.data_ptr(), (self._label(), storage))
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, value, trace)
        for label, storage in self._storages.values():
            self.by_label[label] = self.by_label.get(label, 0) + storage.nbytes()
        self.bytes = sum(self.by_label.values())
        self._storages.clear()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most memory that `run` holds at once beyond what was there before.

    On a GPU from the caching allocator's statistics. On a CPU from the profiler's record of every
    allocation of PyTorch's CPU allocator, C++ kernels' and compiled code's included; what a
    library allocates by itself (oneDNN's scratch space) is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(peaks_by_label(run, "").values())


def peaks_by_label(run: Callable[[], object], prefix: str) -> dict[str, int]:
    """`peak_bytes` on a CPU, by what ran: a label holds from the profiler event that is called so.

    Parameters
    ----------
    prefix : events of ``torch.profiler.record_function`` with a name that begins so are labels;
        their names without it are the keys. What is before the first has the key "".
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    labels = [
        event
        for event in events
        if prefix and event.get("cat") == "user_annotation" and event["name"].startswith(prefix)
    ]
    labels.sort(key=lambda event: float(event["ts"]))
    held, label, peaks = 0, "", {"": 0}
    for event in sorted(changes, key=lambda event: event["args"]["Ev Idx"]):
        while labels and float(labels[0]["ts"]) <= float(event["ts"]):
            label = labels.pop(0)["name"].removeprefix(prefix)
            peaks[label] = max(peaks.get(label, 0), held)
        held += event["args"]["Bytes"]
        peaks[label] = max(peaks[label], held)
    return peaks
