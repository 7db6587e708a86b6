"""Fixtures of the operator tests."""

from __future__ import annotations

import pytest

from spectralx_kernels import _backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `backend` argument runs on every backend its operator may have here.

    The operator is the module's ``GATING``, ``AOMOA``, ...: the first `Operator` it imports.
    """
    if "backend" not in metafunc.fixturenames:
        return
    from spectralx_kernels._operator import Operator

    operators = [value for value in vars(metafunc.module).values() if isinstance(value, Operator)]
    assert operators, f"{metafunc.module.__name__} imports no Operator"
    metafunc.parametrize("backend", _backends.available(operators[0].name, "cpu"))
