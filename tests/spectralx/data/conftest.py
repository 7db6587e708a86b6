from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from spectralx.data import write_raster
from spectralx.data.scenes import write_scenes

# Of the session's small synthetic data sets.
SIZE, COUNT = 48, 10
ROOT_OF_TASK = {
    "WS-WD": "whu-ohs", "WD-WS": "whu-ohs", "whu-ohs": "whu-ohs",
    "spring": "dfc2020", "summer": "dfc2020", "autumn": "dfc2020", "winter": "dfc2020",
    "dfc2020": "dfc2020",
    "north-south": "mts12", "south-north": "mts12", "mts12": "mts12",
}  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Root of a small synthetic data set of a layout, written once."""
    base = tmp_path_factory.mktemp("scenes")

    def root(layout: str) -> Path:
        out = base / layout
        if not out.exists():
            write_scenes(layout, out, size=SIZE, count=COUNT, seed=3, progress=False)
        return out

    return root


class Maker:
    """Writes single files of known values."""

    def image(self, path: Path, bands: int = 2, size: int = 6, *, seed: int = 0) -> np.ndarray:
        values = np.random.default_rng(seed).integers(1, 9000, (bands, size, size))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_raster(path, values.astype(np.uint16))
        return values

    def label(self, path: Path, values: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mat":
            savemat(path, {"label": values})
        else:
            write_raster(path, values)


@pytest.fixture
def make() -> Maker:
    return Maker()
