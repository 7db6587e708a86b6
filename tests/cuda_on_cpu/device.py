"""The memory of a pretended device: every buffer between guards, outputs full of NaN."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cuda_on_cpu.build import SANITIZE

TYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Elements on either side, a multiple of 16 bytes for every type; the sanitizer has its own.
GUARD = 0 if SANITIZE else 64


class Device:
    """Launches functions of a library on buffers it made, and proves that no guard was touched.

    Parameters
    ----------
    library : as `build.load` gives it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._buffers: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory: NaN."""
        size = 1
        for length in shape:
            size *= length
        whole = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
        inside = whole[GUARD : GUARD + size].view(torch.Size(shape))
        self._buffers.append((whole, inside, None))
        return inside

    def put(self, tensor: Tensor | None) -> Tensor | None:
        """A copy on the device, which no kernel may change."""
        if tensor is None:
            return None
        inside = self.empty(tensor.shape, tensor.dtype).copy_(tensor.detach())
        whole, _, _ = self._buffers.pop()
        self._buffers.append((whole, inside, tensor.detach().clone()))
        return inside

    def run(self, name: str, *arguments: Any) -> None:
        """Call `name` with tensors as pointers, ints as int64 and floats as double."""
        values = [
            ctypes.c_void_p(value.data_ptr() if value.numel() else 0)
            if isinstance(value, Tensor)
            else ctypes.c_int64(value)
            if isinstance(value, int)
            else ctypes.c_double(value)
            if isinstance(value, float)
            else value
            for value in arguments
        ]
        status = getattr(self.library, name)(*values, None)
        assert status == 0, (name, status, self.library.spectralx_shim_error().decode())
        for whole, inside, original in self._buffers:
            size = inside.numel()
            assert whole[:GUARD].isnan().all(), (name, "wrote before a buffer", inside.shape)
            assert whole[GUARD + size :].isnan().all(), (name, "wrote past a buffer", inside.shape)
            if original is not None:
                same = torch.equal(inside.nan_to_num(7.0), original.nan_to_num(7.0))
                assert same, (name, "changed an input", inside.shape)
