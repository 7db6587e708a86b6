"""The kernels of the Are-adapter: tiles, chunks, threads, instruction sets, infinities."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.refine import reference
from spectralx_kernels.refine.ops import ADD_WEIGHTED, GATHER_NORM, GATHER_NORM_MIX, MATCH
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

ROOT = Path(__file__).parents[3]
OPERATOR = MATCH  # whose backends `backend` names


def check_match(queries: Tensor, keys: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The index itself, once it has been checked."""
    queries, keys = queries.to(dtype), keys.to(dtype)
    found: Tensor = MATCH(queries, keys, SCALE, backend=backend)
    check_best(found, queries, keys)
    return found


@pytest.mark.parametrize("size", MATCHES)
def test_match(size: str, backend: str) -> None:
    batch, rows, count, width = MATCHES[size]
    queries, keys = draw(batch, rows, width), draw(batch, count, width, seed=1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        if backend in _backends.available("match_argmax", "cpu", dtype):
            check_match(queries, keys, dtype, backend)


@pytest.mark.parametrize("size", GATHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gathers(size: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(GATHER_NORM, gathering(*GATHERS[size], None), dtype)
    for mixed in (1, 21):
        ladder.check_accuracy(GATHER_NORM_MIX, gathering(*GATHERS[size], mixed), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighted_halves(dtype: torch.dtype) -> None:
    for shape in WEIGHTED:
        ladder.check_accuracy(ADD_WEIGHTED, weighing(*shape), dtype)


@pytest.mark.parametrize("only", range(4))
def test_one_gradient_alone(only: int) -> None:
    """Each gradient is the same whether or not the others are wanted; by C++ to the last bit."""
    for operator, args in (
        (GATHER_NORM_MIX, gathering(2, 7, 5, 9, 4)),
        (ADD_WEIGHTED, weighing(2, 3, 6)),
    ):
        backends = _backends.available(operator.name, "cpu", torch.float32)
        leaves = [
            i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()
        ]
        for backend in backends:
            everything = ladder.cast(args, torch.float32, grad=True)
            alone = ladder.cast(args, torch.float32)
            alone[leaves[only]].requires_grad_()
            grads = []
            for values in (everything, alone):
                out = operator(*values, backend=backend)
                out.backward(draw(*out.shape, seed=5).float())
                grads.append(values[leaves[only]].grad)
            if backend == "cpp":
                assert torch.equal(*grads), operator.name
            else:  # a library's products may round by where their operands lie
                torch.testing.assert_close(*grads)


@pytest.mark.skipif("cpp" not in _backends.available("match_argmax", "cpu"), reason="no C++ kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_keys(dtype: torch.dtype) -> None:
    """More keys than the scores of which are kept; scores that grow from chunk to chunk."""
    queries, keys = draw(1, 40, 6), draw(1, 4500, 6, seed=1)
    keys *= torch.linspace(0.1, 30, 4500)[:, None]
    for order in (keys, keys.flip(1)):
        check_match(queries, order, dtype, "cpp")
    keys[0, 4400, 0] = torch.nan
    assert not MATCH(queries.to(dtype), keys.to(dtype), 0.3, backend="cpp").any()


@pytest.mark.skipif("cpp" not in _backends.available("match_argmax", "cpu"), reason="no C++ kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    queries, keys = draw(1, 170, 12), draw(1, 90, 12, seed=1)
    queries[0, 100:140] = queries[0, :40]  # ties between parts
    cases = [
        (MATCH, [queries, keys, 0.3]),
        (GATHER_NORM, gathering(2, 70, 150, 90, None)),
        (GATHER_NORM_MIX, gathering(2, 70, 150, 90, 33)),
        (ADD_WEIGHTED, weighing(2, 70, 64)),
    ]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(
                [
                    ladder.run_with_gradients(op, ladder.cast(args, dtype, grad=True))
                    for op, args in cases
                ]
            )
    finally:
        torch.set_num_threads(threads)
    assert int(runs[0][0][0][0].max()) >= 140
    assert not ((runs[0][0][0][0] >= 100) & (runs[0][0][0][0] < 140)).any()
    for run in runs[1:]:
        for (outputs, grads), (first, first_grads) in zip(run, runs[0], strict=True):
            assert all(map(torch.equal, outputs, first))
            assert all(torch.equal(grad, first_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The kernels that this processor would not choose agree too, in a process of their own."""
    code = (
        "from spectralx_kernels import _backends\n"
        "from tests.kernels.refine.test_kernels import *\n"
        "for size in MATCHES.values():\n"
        "    batch, rows, count, width = size\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        check_match(draw(batch, rows, width), draw(batch, count, width, seed=1), dtype,\n"
        "                    _backends.available('match_argmax', 'cpu')[0])\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for size in GATHERS.values():\n"
        "        ladder.check_accuracy(GATHER_NORM, gathering(*size, None), dtype)\n"
        "        ladder.check_accuracy(GATHER_NORM_MIX, gathering(*size, 21), dtype)\n"
        "    ladder.check_accuracy(ADD_WEIGHTED, weighing(2, 19, 70), dtype)\n"
    )
    environment = {**os.environ, "SPECTRALX_CPU_CAPABILITY": capability, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_as_in_the_reference(value: float, backend: str) -> None:
    for where, place in (("queries", (0, 17, 1)), ("keys", (0, 50, 1)), ("both", (0, 0, 0))):
        queries, keys = draw(2, 40, 3).float(), draw(2, 70, 3, seed=1).float()
        for name, tensor in (("queries", queries), ("keys", keys)):
            if where in (name, "both"):
                tensor[place] = value
        expected = reference.match_argmax(queries, keys, 0.3)
        assert torch.equal(MATCH(queries, keys, 0.3, backend=backend), expected), where


def test_equal_queries_go_to_the_first(backend: str) -> None:
    """Across vectors, panels and tiles."""
    once = draw(1, 50, 9).float()
    keys = draw(1, 90, 9, seed=1).float()
    first = MATCH(once, keys, 0.3, backend=backend)
    again = MATCH(torch.cat([once, once, once], dim=1), keys, 0.3, backend=backend)
    assert torch.equal(first, again)


def test_any_strides(backend: str) -> None:
    queries, keys = draw(2, 9, 4).float(), draw(2, 11, 4, seed=1).float()
    expected = MATCH(queries, keys, 0.3, backend=backend)
    padded = torch.full((2, 22, 8), torch.nan)
    padded[:, ::2, ::2] = keys
    strided = padded[:, ::2, ::2], queries.mT.contiguous().mT
    assert torch.equal(MATCH(strided[1], strided[0], 0.3, backend=backend), expected)
    tokens = draw(2, 6, 5).float()
    rows = torch.full((2, 12, 15), torch.nan)
    rows[:, ::2, ::3] = tokens
    rest = [arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
            for arg in gathering(2, 6, 5, 7, 3)[1:]]  # fmt: skip
    results = []
    for variant in (tokens, rows[:, ::2, ::3]):
        leaf = variant.detach().requires_grad_()
        out = GATHER_NORM_MIX(leaf, *rest, backend=backend)
        results += [out, torch.autograd.grad(out, leaf, draw(3, 5, 2).float().permute(2, 0, 1))[0]]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as a GPU's, or smaller: many programs, and something left over in each dimension."""
    if "triton" not in _backends.available("match_argmax", "cpu"):
        pytest.skip("Triton's interpreter is not on")
    from spectralx_kernels.refine import triton as kernels

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    for name, size in (("QUERIES", 16), ("KEYS", 32), ("COMPARED", 32), ("SPLITS", 3)):
        monkeypatch.setattr(kernels, f"_{name}", size)
    for name, size in (("DEPTH", 16), ("ROWS", 4), ("WIDTH", 32)):
        monkeypatch.setattr(kernels, f"_{name}", size)


@pytest.mark.usefixtures("small_tiles")
def test_beyond_one_tile() -> None:
    queries, keys = draw(2, 70, 37), draw(2, 150, 37, seed=1)
    check_match(queries, keys, torch.float32, "triton")
    twice = torch.cat([queries, queries], dim=1).float()
    first, again = (MATCH(q, keys.float(), 0.3, backend="triton") for q in (twice[:, :70], twice))
    assert torch.equal(first, again)
    ladder.check_accuracy(GATHER_NORM, gathering(2, 9, 70, 41, None), torch.float32)
    ladder.check_accuracy(GATHER_NORM_MIX, gathering(2, 9, 70, 41, 21), torch.float32)
    ladder.check_accuracy(ADD_WEIGHTED, weighing(2, 5, 76), torch.float32)
