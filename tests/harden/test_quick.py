"""The quick part of the rows of docs/RELIABILITY.md; `python -m tests.harden PART` is the rest."""

from __future__ import annotations

import importlib
import warnings

import pytest

from tests.harden.parts import PARTS

QUICK = {name: part for name, part in PARTS.items() if part.quick}


@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str) -> None:
    module = importlib.import_module(f"tests.harden.{QUICK[name].module}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = module.run(range(QUICK[name].quick))
    assert outcome.checked == QUICK[name].quick
    assert not outcome.failures
