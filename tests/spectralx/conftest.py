from __future__ import annotations

from pathlib import Path

import pytest

from spectralx.data.scenes import write_scenes


@pytest.fixture(scope="session")
def tiny_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic scenes in the WHU-OHS layout: 8 training tiles of 32x32 pixels. Read only."""
    root = tmp_path_factory.mktemp("scenes") / "whu-ohs"
    return write_scenes("whu-ohs", root, size=32, count=10, progress=False)
