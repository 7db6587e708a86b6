"""Fixtures of the tests of models, data and training."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic scenes in the WHU-OHS layout: 8 training tiles of 32x32 pixels. Read only."""
    from spectralx.data.scenes import write_scenes  # needs rasterio, which some tests do without

    root = tmp_path_factory.mktemp("scenes") / "whu-ohs"
    return write_scenes("whu-ohs", root, size=32, count=10, progress=False)
