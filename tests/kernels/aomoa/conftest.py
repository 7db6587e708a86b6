"""The backend of a test, forced on the modules it calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spectralx_kernels import use_backend


@pytest.fixture(autouse=True)
def forced_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with a `backend` argument runs whole under `use_backend`."""
    if "backend" not in request.fixturenames:
        yield
        return
    with use_backend(request.getfixturevalue("backend")):
        yield
