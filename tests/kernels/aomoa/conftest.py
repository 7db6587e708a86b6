"""The backend of a test, forced on the modules it calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spectralx_kernels import _backends, use_backend


@pytest.fixture(autouse=True)
def forced_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with a `backend` argument runs whole under `use_backend`."""
    if "backend" not in request.fixturenames:
        yield
        return
    backend = request.getfixturevalue("backend")
    dtype = request.node.callspec.params.get("dtype")
    if dtype is not None and backend not in _backends.available("aomoa", "cpu", dtype):
        pytest.skip(f"{backend} does not take {dtype} on a CPU")
    with use_backend(backend):
        yield
