from __future__ import annotations

from pathlib import Path

import pytest

from spectralx.predict import Predictor, load_predictor
from tests.spectralx.prediction.scenes import FIXED, save_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five bands, trained with per-image scaling."""
    return save_model(tmp_path_factory.mktemp("prediction") / "checkpoint")


@pytest.fixture(scope="session")
def predictor(checkpoint: Path) -> Predictor:
    return load_predictor(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A model of five bands, trained with fixed statistics."""
    path = save_model(tmp_path_factory.mktemp("prediction") / "fixed", FIXED)
    return load_predictor(path, device="cpu")
