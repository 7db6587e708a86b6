"""What a GPU does while a function runs: its kernels, and whether the host waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, torch raises where the host would wait for the GPU. Warm up first."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that `run` launches, in order, after two warm-up calls.

    Copies that are no kernels are listed too. The second pass of a vendor's product that splits
    its sum, and the filling of its workspace, are left out: they belong to the product.
    """
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    found = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    names = [event.name for event in sorted(found, key=lambda event: event.time_range.start)]
    of_products = ("splitkreduce", "split_k_kernel", "memset")
    return [name for name in names if not any(part in name.lower() for part in of_products)]
