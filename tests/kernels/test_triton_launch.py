"""Starting compiled kernels again: which one, with what. A kernel that notes its starts, no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton_launch = pytest.importorskip("spectralx_kernels._triton_launch")


class Parameter(SimpleNamespace):
    name: str
    is_constexpr: bool
    default: Any


class Kernel:
    """``kernel(x, y, n, W: constexpr, B: constexpr, C: constexpr = 7)``."""

    pre_run_hooks: Sequence[Any] = ()

    def __init__(self) -> None:
        self.params = [
            Parameter(name=name, is_constexpr=name.isupper(), default=7 if name == "C" else None)
            for name in ("x", "y", "n", "W", "B", "C")
        ]
        self.bound: list[tuple[Any, ...]] = []  # starts that Triton binds
        self.started: list[tuple[Any, ...]] = []  # starts of what it has compiled

    def __getitem__(self, grid: Sequence[int]) -> Any:
        def bind(*args: Any, **named: Any) -> Any:
            self.bound.append((grid, args, named))

            def run(*given: Any) -> None:
                self.started.append(given)

            return SimpleNamespace(run=run, function="function", packed_metadata="metadata")

        return bind


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: "stream")
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setattr(triton_launch, "_constants", {})
    return Kernel()


def begin(kernel: Kernel, x: Any, n: int = 32, w: int = 5, grid: Sequence[int] = (3,)) -> None:
    triton_launch.start(kernel, grid, (x, None, n, w), {"B": 64, "num_warps": 4})


def test_the_second_start_passes_addresses_and_constants(kernel: Kernel) -> None:
    first, second = torch.zeros(64), torch.zeros(64)
    begin(kernel, first)
    begin(kernel, second, n=48, grid=(9, 2))
    assert len(kernel.bound) == 1
    head = (9, 2, 1, "stream", "function", "metadata", None, None, None)
    assert kernel.started == [(*head, second.data_ptr(), None, 48, 5, 64, 7)]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64).bfloat16()},
        {"x": torch.zeros(64)[1:]},  # 4 bytes behind a multiple of 16
        {"x": None},
        {"n": 1},
        {"n": 33},
        {"n": 2**31},
        {"w": 6},
    ],
    ids=["dtype", "alignment", "None", "one", "no multiple of 16", "64 bits", "constant"],
)
def test_what_triton_specialises_on_is_told_apart(kernel: Kernel, other: dict[str, Any]) -> None:
    begin(kernel, torch.zeros(64))
    begin(kernel, **{"x": torch.zeros(64), **other})
    assert len(kernel.bound) == 2
    assert not kernel.started


def test_options_and_named_constants_are_told_apart(kernel: Kernel) -> None:
    x = torch.zeros(64)
    for named in ({"B": 64}, {"B": 32}, {"B": 64, "num_warps": 8}, {"B": 64, "C": 8}):
        triton_launch.start(kernel, (1,), (x, None, 32, 5), named)
    assert len(kernel.bound) == 4
    triton_launch.start(kernel, (1,), (x, None, 32, 5), {"B": 64, "C": 8})
    assert kernel.started[0][-2:] == (64, 8)


def test_a_named_argument_that_is_no_constant_is_bound_every_time(kernel: Kernel) -> None:
    x = torch.zeros(64)
    for n in (32, 48):
        triton_launch.start(kernel, (1,), (x, None), {"n": n, "W": 5, "B": 64})
        triton_launch.start(kernel, (1,), (x, None), {"n": n, "W": 5, "B": 64})
    assert len(kernel.bound) == 4


def test_a_profiler_hears_of_every_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[print]), launch_exit_hook=None)
    monkeypatch.setattr(triton_launch, "knobs", SimpleNamespace(runtime=hooks))
    begin(kernel, torch.zeros(64))
    begin(kernel, torch.zeros(64))
    assert len(kernel.bound) == 2
