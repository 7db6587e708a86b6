"""Starting compiled Triton kernels without what Triton does again at every start.

``kernel[grid](...)`` binds arguments to names, forms a key of their types, looks options up in the
environment and asks the driver about every pointer, which for a kernel of thirty arguments takes
longer than most of ours run. `start` does it the first time; after that it tells by what Triton
specialises on (type and 16-byte alignment of tensors, 1 and multiples of 16 among integers, values
of constants, the device) which compiled kernel to start, and passes it addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

# By kernel and what is specialised on: the compiled kernel, and the constants that follow the
# positional arguments.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
# Of a kernel: which parameters are constants.
_constants: dict[Any, tuple[bool, ...]] = {}


def _constants_of(kernel: Any) -> tuple[bool, ...]:
    found = _constants.get(kernel)
    if found is None:
        found = _constants[kernel] = tuple(p.is_constexpr for p in kernel.params)
    return found


def _hooked() -> bool:
    """Whether somebody (a profiler of Triton's) wants to hear of launches."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


def start(kernel: Any, grid: Sequence[int], args: Sequence[Any], named: dict[str, Any]) -> None:
    """``kernel[grid](*args, **named)``; what is named are constants and options."""
    device = driver.active.get_current_device()
    key: list[Any] = [kernel, device, *named.items()]
    values: list[Any] = []
    for value, constant in zip(args, _constants_of(kernel), strict=False):
        if constant or value is None:
            key.append(value)
        elif isinstance(value, Tensor):
            address = value.data_ptr()
            key += (value.dtype, value.is_cuda, address & 15 == 0)
            value = address
        elif isinstance(value, int):
            key.append((value == 1, value & 15 == 0, -(2**31) <= value < 2**31))
        else:
            key.append(type(value))
        values.append(value)
    place = tuple(key)
    found = _compiled.get(place)
    if found is None or _hooked() or kernel.pre_run_hooks:
        compiled = kernel[grid](*args, **named)
        rest = kernel.params[len(args) :]
        if all(parameter.is_constexpr for parameter in rest):
            _compiled[place] = compiled, tuple(named.get(p.name, p.default) for p in rest)
        return
    compiled, rest_values = found
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(
        x, y, z, driver.active.get_current_stream(device), compiled.function,
        compiled.packed_metadata, None, None, None, *values, *rest_values,
    )  # fmt: skip
