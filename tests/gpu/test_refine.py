"""The Are-adapter's operators on a GPU: the proof ladder, ties, NaN, graphs, no synchronisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels import AreAdapter, use_backend
from spectralx_kernels.refine import reference
from spectralx_kernels.refine.ops import ADD_WEIGHTED, GATHER_NORM, GATHER_NORM_MIX, MATCH
from tests.golden import refine as golden_refine
from tests.golden.golden import FOLDER
from tests.gpu.test_aomoa import CudaGolden
from tests.gpu.watching import kernels, no_synchronisation
from tests.kernels import ladder
from tests.kernels.refine.cases import (
    GATHERS,
    MATCHES,
    SCALE,
    WEIGHTED,
    check_best,
    draw,
    gathering,
    weighing,
)
from tests.tolerances import ROUND_OFF

OPERATOR = MATCH
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MORE_MATCHES = {
    **MATCHES,
    "spatial": (2, 196, 784, 256),
    "spectral": (2, 196, 512, 392),
    "large tiles": (8, 130, 1100, 20),
}
PAPER = (2, 196, 512, 784)
# Launches of a call beside copies: what a small batch waits for.
MOST_LAUNCHES = {"match": 2, "gather": 1, "weigh": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", MORE_MATCHES)
def test_match(size: str, dtype: torch.dtype, backend: str) -> None:
    """Each key's query is the best in float64, to round-off of the scores."""
    batch, rows, count, width = MORE_MATCHES[size]
    queries, keys = draw(batch, rows, width).to(dtype), draw(batch, count, width, seed=1).to(dtype)
    check_best(MATCH(queries.cuda(), keys.cuda(), SCALE, backend=backend).cpu(), queries, keys)


def test_equal_queries_go_to_the_first(backend: str) -> None:
    once, keys = draw(2, 90, 24).float().cuda(), draw(2, 200, 24, seed=1).float().cuda()
    first = MATCH(once, keys, 0.3, backend=backend)
    assert torch.equal(MATCH(torch.cat([once] * 3, dim=1), keys, 0.3, backend=backend), first)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_as_in_the_reference(value: float, backend: str) -> None:
    for where in ("queries", "keys", "both"):
        queries, keys = draw(2, 40, 3).float(), draw(2, 70, 3, seed=1).float()
        if where != "keys":
            queries[0, 17, 1] = value
        if where != "queries":
            keys[0, 50, 1] = value
        found = MATCH(queries.cuda(), keys.cuda(), 0.3, backend=backend)
        assert torch.equal(found.cpu(), reference.match_argmax(queries, keys, 0.3)), where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*(size for size in GATHERS if size != "one of each"), "paper"])
def test_gathers(size: str, dtype: torch.dtype) -> None:
    shape = GATHERS.get(size, PAPER)
    ladder.check_accuracy(GATHER_NORM, gathering(*shape, None), dtype, "cuda")
    ladder.check_accuracy(GATHER_NORM_MIX, gathering(*shape, 196), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*WEIGHTED, (2, 196, 1024)], ids=str)
def test_weighted_halves(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    ladder.check_accuracy(ADD_WEIGHTED, weighing(*shape), dtype, "cuda")


def test_repeats() -> None:
    ladder.check_repeats(MATCH, [draw(2, 90, 24), draw(2, 200, 24, seed=1), 0.3], "cuda")
    ladder.check_repeats(GATHER_NORM, gathering(*PAPER, None), "cuda")
    ladder.check_repeats(GATHER_NORM_MIX, gathering(*PAPER, 196), "cuda")
    ladder.check_repeats(ADD_WEIGHTED, weighing(2, 196, 1024), "cuda")


def on_gpu(args: list[Any], dtype: torch.dtype) -> list[Any]:
    return [arg.cuda() if isinstance(arg, Tensor) else arg for arg in ladder.cast(args, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_launches(dtype: torch.dtype, backend: str) -> None:
    if backend == "eager":
        pytest.skip("the reference launches what torch launches")
    queries, keys = on_gpu([draw(2, 196, 256), draw(2, 784, 256, seed=1)], dtype)
    gather, weighted = on_gpu(gathering(*PAPER, None), dtype), on_gpu(weighing(2, 196, 64), dtype)
    with torch.no_grad():
        found = {
            "match": kernels(lambda: MATCH(queries, keys, 0.3, backend=backend)),
            "gather": kernels(lambda: GATHER_NORM(*gather, backend=backend)),
            "weigh": kernels(lambda: ADD_WEIGHTED(*weighted, backend=backend)),
        }
    assert {name: len(names) for name, names in found.items()} == MOST_LAUNCHES, found


def adapter_and_inputs() -> tuple[AreAdapter, list[Tensor]]:
    torch.manual_seed(0)
    adapter = AreAdapter(64, 36, spatial_dim=24).cuda()
    with torch.no_grad():
        adapter.scale.fill_(0.5)
    given = [draw(1, 36, 64), draw(1, 144, 24), draw(1, 24, 144)]
    return adapter, [value.float().cuda() for value in given]


def step(adapter: AreAdapter, given: list[Tensor]) -> list[Tensor]:
    """The refined tokens of a single image, and the gradients of what trains."""
    out = adapter(*given)
    leaves = [given[0], *(p for n, p in adapter.named_parameters() if "match_attn" not in n)]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_graphs_without_synchronisation(backend: str) -> None:
    adapter, given = adapter_and_inputs()
    adapter.train()
    given[0].requires_grad_()
    with use_backend(backend, required=False):  # no GPU kernel of norm_linear
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(adapter, given)
        torch.cuda.current_stream().wait_stream(side)
        with no_synchronisation():
            step(adapter, given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(adapter, given)
        for seed in range(2):
            with torch.no_grad():
                given[0].copy_(draw(1, 36, 64, seed=seed))
            graph.replay()
            for found, expected in zip(captured, step(adapter, given), strict=True):
                assert ladder.relative_error(found, expected) <= ROUND_OFF[torch.float32]


def test_adapter_against_the_reference(backend: str) -> None:
    adapter, given = adapter_and_inputs()
    given[0].requires_grad_()
    results = []
    for name in ("eager", backend):
        with use_backend(name, required=False):
            results.append(step(adapter.train(), given))
    for found, expected in zip(results[1], results[0], strict=True):
        assert ladder.relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("path", sorted(FOLDER.glob("are_*.npz")), ids=lambda path: path.stem)
def test_golden(path: Path, backend: str) -> None:
    """The published implementation's numbers, the layer and its inputs on the GPU."""
    golden = CudaGolden(path)
    with torch.device("cuda"), use_backend(backend, required=False):
        found = golden_refine.run(golden)
    assert isinstance(found["y"], Tensor)
    assert found["y"].is_cuda
    golden.check(found)
