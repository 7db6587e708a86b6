"""pytest's side of the benchmarks: options, which rows exist, and the ``report`` fixture.

A test called ``test_<op>`` hands the builder of its cases to ``report``. The rows come from
`benchmarks.shapes`; a group is measured when its first row runs.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import spectralx_kernels
from benchmarks import ceilings
from benchmarks.case import Setting
from benchmarks.clock import Replay
from benchmarks.harness import Budget, Build, GroupKey, Row, measure
from benchmarks.shapes import Shape, find, implementations, selected
from spectralx_kernels import use_backend
from spectralx_kernels._backends import BACKENDS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spectralx benchmarks")
    group.addoption("--full", action="store_true", help="all shapes, and compile rows for each")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    group.addoption(
        "--dtype",
        default="float32",
        help=f"one or more of {', '.join(DTYPES)}, separated by commas (default: float32)",
    )
    group.addoption(
        "--backend", choices=BACKENDS, help="of the fused rows (default: each operator's own)"
    )
    group.addoption(
        "--seconds",
        type=float,
        help="to measure a group for, checks aside (default: 1.5; with --full 10)",
    )
    group.addoption(
        "--until",
        type=float,
        help="seconds after which no further group is begun: its rows fail, the others are kept",
    )
    group.addoption(
        "--graphs",
        action="store_true",
        help="time replays of CUDA graphs: the GPU's time without the host's",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    # The project's tests run with --benchmark-disable from pyproject.toml; here only the command
    # line counts.
    config.option.benchmark_enable = "--benchmark-disable" not in config.invocation_params.args
    unknown = [name for name in _dtypes(config) if name not in DTYPES]
    if unknown:
        raise pytest.UsageError(
            f"--dtype: got {', '.join(unknown)}, expected one of {', '.join(DTYPES)}"
        )
    if config.getoption("--graphs") and config.getoption("--device") != "cuda":
        raise pytest.UsageError("--graphs: got a CPU, expected --device cuda")
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device: got cuda, but torch sees no GPU")
        # A float32 row means float32: by default cuDNN's convolutions would round to TF32.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def _dtypes(config: pytest.Config) -> list[str]:
    return str(config.getoption("--dtype")).split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "report" not in metafunc.fixturenames:
        return
    op = metafunc.function.__name__.removeprefix("test_")
    full = metafunc.config.getoption("--full")
    rows = [
        (op, shape.name, mode, dtype, impl)
        for shape in selected(op, full=full)
        for mode in shape.modes
        for dtype in _dtypes(metafunc.config)
        for impl in implementations(op, shape, mode, full=full)
    ]
    metafunc.parametrize(
        ("op", "shape", "mode", "dtype", "impl"), rows, ids=["-".join(row[1:]) for row in rows]
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "report" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY.interleaved_samples))


class Groups:
    """The rows of the group that runs now; measured once, for all of its selected rows."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._begin = time.monotonic()
        self._wanted: dict[GroupKey, list[str]] = {}
        self._key: GroupKey | None = None
        self._rows: dict[str, Row] = {}

    def select(self, items: list[pytest.Item]) -> None:
        """Note which rows were selected (after ``-k`` and the like)."""
        for item in items:
            if isinstance(item, pytest.Function) and "report" in item.fixturenames:
                params = item.callspec.params
                self._wanted.setdefault(_key(params), []).append(str(params["impl"]))

    def row(self, build: Build, key: GroupKey, impl: str) -> Row:
        if key != self._key:
            self._rows = {}
            self._rows = self._measure(build, key)
            self._key = key
        return self._rows[impl]

    def _measure(self, build: Build, key: GroupKey) -> dict[str, Row]:
        names = self._wanted[key]
        until = self._config.getoption("--until")
        if until is not None and time.monotonic() - self._begin > until:
            return {name: Row(refused=f"not begun: {until:g} s are over") for name in names}
        full, device = self._config.getoption("--full"), self._config.getoption("--device")
        shape: Shape = find(selected(key.op, full=full), key.shape)
        if not self._config.getoption("benchmark_enable"):
            budget = Budget(seconds=0.0, rounds=(1, 1))
        else:
            given = self._config.getoption("--seconds")
            budget = Budget(seconds=given or (10.0 if full else 1.5))
        torch._dynamo.reset()
        try:
            setting = Setting(device, DTYPES[key.dtype])
            with _backend(self._config):
                return measure(
                    build, shape, key.mode, setting, names, budget,
                    graphs=self._config.getoption("--graphs"),
                )  # fmt: skip
        except Exception:  # the group cannot be built: every row of it fails with the reason
            return {name: Row(refused=traceback.format_exc()) for name in names}


def _backend(config: pytest.Config) -> AbstractContextManager[None]:
    chosen = config.getoption("--backend")
    return use_backend(chosen, required=False) if chosen else nullcontext()


def _key(params: dict[str, Any]) -> GroupKey:
    return GroupKey(params["op"], params["shape"], params["mode"], params["dtype"])


_GROUPS = pytest.StashKey[Groups]()
_FACTS = pytest.StashKey[dict[str, Any]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    groups = Groups(session.config)
    groups.select(session.items)
    session.config.stash[_GROUPS] = groups
    facts = machine_facts(session.config.getoption("--device"))
    if session.config.getoption("--graphs"):
        facts["timed"] = "graphs"
    if session.config.getoption("--device") == "cuda" and session.items:
        facts["ceilings"] = ceilings.measure("cuda")
    if session.config.getoption("--backend"):
        facts["backend"] = session.config.getoption("--backend")
    session.config.stash[_FACTS] = facts


def machine_facts(device: str) -> dict[str, Any]:
    """What a number depends on beside the code: device, threads, versions, commit."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "device_type": device,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "spectralx_kernels": spectralx_kernels.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def commit() -> str:
    """The commit of this checkout, "-dirty" behind it where files differ."""
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@pytest.fixture
def report(
    request: pytest.FixtureRequest,
    benchmark: Any,
    op: str,
    shape: str,
    mode: str,
    dtype: str,
    impl: str,
) -> Callable[[Build], None]:
    """``report(build)``: measure the group if need be, and hand over the samples of this row."""

    def hand_over(build: Build) -> None:
        config = request.config
        key = GroupKey(op, shape, mode, dtype)
        row = config.stash[_GROUPS].row(build, key, impl)
        if row.refused:
            pytest.fail(f"{key} {impl}: no number, it failed\n{row.refused}", pytrace=False)
        benchmark.group = str(key)
        benchmark.extra_info.update(config.stash[_FACTS])
        benchmark.extra_info.update(row.facts)
        REPLAY.load(row.samples)
        benchmark.pedantic(REPLAY.advance, rounds=len(row.samples))

    return hand_over
