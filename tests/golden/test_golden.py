"""Agreement with the published implementation's own numbers, file by file, array by array."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spectralx_kernels import _backends, use_backend
from tests.golden import adapters, aomoa, hypert, refine, stage1, stage2
from tests.golden.golden import FOLDER, Arrays, Golden

FILES = sorted(FOLDER.glob("*.npz"))

# How the `module` of a file begins -> what computes its arrays.
HANDLERS: dict[str, Callable[[Golden], Arrays]] = {
    **aomoa.HANDLERS,
    **adapters.HANDLERS,
    **hypert.HANDLERS,
    **refine.HANDLERS,
    **stage1.HANDLERS,
    **stage2.HANDLERS,
}


def backends() -> list[str]:
    """Backends with at least one kernel here."""
    existing = {name for op in _backends.operators() for name in _backends.available(op)}
    return [name for name in _backends.BACKENDS if name in existing]


def test_folder_holds_golden_files() -> None:
    assert FILES, f"no *.npz in {FOLDER}"


# Interpreted kernels take minutes for a whole model: files of one layer, of rooms that have some.
INTERPRETED = {"triton": ("aomoa_", "are_train", "hypert_small_train")}


def cases() -> list[tuple[Path, str]]:
    """Files and backends."""
    return [
        (path, backend)
        for path in FILES
        for backend in backends()
        if path.stem.startswith(INTERPRETED.get(backend, ("",)))
    ]


@pytest.mark.parametrize(
    ("path", "backend"), [pytest.param(*case, id=f"{case[0].stem}-{case[1]}") for case in cases()]
)
def test_golden(path: Path, backend: str) -> None:
    golden = Golden(path)
    module = golden.meta["module"]
    handler = next((run for key, run in HANDLERS.items() if module.startswith(key)), None)
    if handler is None:  # "satmae++ masked reconstruction", "scalemae stage-1 training curve", ...
        handler = next(run for key, run in HANDLERS.items() if key in module)
    with use_backend(backend, required=False):
        golden.check(handler(golden))
