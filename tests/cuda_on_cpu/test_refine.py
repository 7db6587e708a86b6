"""CUDA kernels of the Are-adapter, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx_kernels.refine import reference
from tests.cuda_on_cpu.build import ROOT, compile_cuda, compiler, load
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.cuda_on_cpu.structure import structure
from tests.kernels.ladder import relative_error
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
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
DTYPES = list(TYPE_CODES)
FOLDER = ROOT / "csrc" / "cuda" / "refine"
Match = structure(FOLDER / "kernels.h", "SpectralxMatch")
Rows = structure(FOLDER / "kernels.h", "SpectralxRows")
Weigh = structure(FOLDER / "kernels.h", "SpectralxWeigh")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    sources = [FOLDER / "match.cu", FOLDER / "rows.cu"]
    loaded = load(compile_cuda(sources, "-O1", "-shared"))
    loaded.spectralx_match_splits.restype = ctypes.c_int64
    loaded.spectralx_norm_blocks.restype = ctypes.c_int64
    return loaded


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bind(arguments: ctypes.Structure, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel():
            setattr(arguments, name, tensor.data_ptr())


def match(library: ctypes.CDLL, queries: Tensor, keys: Tensor) -> Tensor:
    device, (batch, rows, width), count = Device(library), queries.shape, keys.shape[1]
    arguments = Match(
        type=TYPE_CODES[queries.dtype], batch=batch, rows=rows, count=count, width=width,
        scale=SCALE,
    )  # fmt: skip
    splits = library.spectralx_match_splits(ctypes.byref(arguments))
    assert splits <= 8
    scratch = [device.empty((batch, splits, rows), wide(queries.dtype)) for _ in range(2)]
    found = torch.full((batch, count), -1)
    put = [device.put(queries), device.put(keys)]
    bind(arguments, queries=put[0], keys=put[1], peaks=scratch[0], totals=scratch[1], match=found)
    device.run("spectralx_match", ctypes.byref(arguments))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", MATCHES)
def test_match(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    batch, rows, count, width = MATCHES[case]
    queries, keys = draw(batch, rows, width).to(dtype), draw(batch, count, width, seed=1).to(dtype)
    found = match(library, queries, keys)
    check_best(found, queries, keys)
    twice = match(library, torch.cat([queries, queries], dim=1), keys)
    assert torch.equal(twice, found)  # ties go to the first


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_as_in_the_reference(library: ctypes.CDLL, value: float) -> None:
    for where in ("queries", "keys", "both"):
        queries, keys = draw(2, 40, 3).float(), draw(2, 70, 3, seed=1).float()
        if where != "keys":
            queries[0, 17, 1] = value
        if where != "queries":
            keys[0, 50, 1] = value
        expected = reference.match_argmax(queries, keys, SCALE)
        assert torch.equal(match(library, queries, keys), expected), where


class Gather:
    """Rows of tokens that are a strided half, what they are matched with, and a norm."""

    def __init__(self, library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
        batch, count, width, keys = GATHERS[case]
        self.device, self.dtype, self.shape = Device(library), dtype, GATHERS[case]
        tokens, self.match, *norm, eps = gathering(*GATHERS[case], None)
        self.tokens, *self.norm = (value.to(dtype) for value in (tokens, *norm))
        whole = torch.cat([draw(batch, count, width).to(dtype), self.tokens], dim=-1)
        put = self.device.put(whole)
        assert put is not None
        self.arguments = Rows(
            type=TYPE_CODES[dtype], batch=batch, count=count, keys=keys, width=width,
            by_image=2 * count * width, by_row=2 * width, eps=eps,
            tokens=put.data_ptr() + width * put.element_size(),
        )  # fmt: skip
        self.alive = [put, *(self.device.put(value) for value in self.norm)]
        bind(self.arguments, weight=self.alive[1], bias=self.alive[2])

    def normed(self, matched: bool) -> Tensor:
        batch, count, width, keys = self.shape
        self.arguments.keys = keys if matched else count
        out = self.device.empty((batch, self.arguments.keys, width), self.dtype)
        bind(self.arguments, out=out, match=self.match)
        if not matched:
            self.arguments.match = None
        self.device.run("spectralx_norm_rows", ctypes.byref(self.arguments))
        return out

    def backward(self, grad: Tensor, wants_tokens: bool = True) -> tuple[Tensor, Tensor]:
        """Gradient of the tokens, and [2, width] of weight and bias."""
        batch, count, width, keys = self.shape
        device, type_ = self.device, wide(self.dtype)
        summed = device.empty((batch, count, width), type_)
        device.run(
            "spectralx_sum_by_token", TYPE_CODES[self.dtype], device.put(grad), keys * width,
            self.match, batch, count, keys, width, 1, summed,
        )  # fmt: skip
        blocks = self.device.library.spectralx_norm_blocks(ctypes.byref(self.arguments))
        parts = device.empty((blocks, 2, width), type_)
        found = device.empty((batch, count, width), self.dtype)
        bind(self.arguments, grad=summed, parts=parts)
        self.arguments.tokens_grad = found.data_ptr() if wants_tokens and found.numel() else None
        device.run("spectralx_norm_rows_backward", ctypes.byref(self.arguments))
        return found, parts.sum(0) if blocks else parts.new_zeros(2, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", GATHERS)
def test_gathers(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    given = Gather(library, case, dtype)
    batch, _, width, keys = given.shape
    grad = draw(batch, keys, width, seed=7).to(dtype)
    results = {}
    for name, type_ in (("exact", torch.float64), ("plain", dtype)):
        leaves = [value.to(type_).requires_grad_() for value in (given.tokens, *given.norm)]
        out = reference.gather_norm(leaves[0], given.match, leaves[1], leaves[2], 1e-5)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(type_))]
    of_tokens, of_norm = given.backward(grad)
    found = [given.normed(True), of_tokens, *of_norm]
    for i, (value, exact, plain) in enumerate(
        zip(found, results["exact"], results["plain"], strict=True)
    ):
        factor = FORWARD_FACTOR if i == 0 else BACKWARD_FACTOR
        bound = factor * relative_error(plain, exact) + ROUND_OFF[dtype]
        assert relative_error(value, exact) <= bound, i
    everything = given.normed(False)
    weight, bias = (value.double() for value in given.norm)
    plain = F.layer_norm(given.tokens.double(), (width,), weight, bias, 1e-5)
    bound = FORWARD_FACTOR * ROUND_OFF[dtype]
    assert relative_error(everything, plain) <= bound
    _, again = given.backward(grad, wants_tokens=False)
    assert torch.equal(again, of_norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_sums_by_token_and_over_images(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    batch, count, keys, columns = 3, 7, 45, 150
    index = torch.randint(count, (batch, keys), generator=torch.Generator().manual_seed(0))
    device, shared = Device(library), draw(keys, columns).to(dtype)
    for as_wide in (0, 1):
        summed = device.empty((batch, count, columns), wide(dtype) if as_wide else dtype)
        device.run(
            "spectralx_sum_by_token", TYPE_CODES[dtype], device.put(shared), 0, index, batch, count,
            keys, columns, as_wide, summed,
        )  # fmt: skip
        for image in range(batch):
            exact = torch.zeros(count, columns, dtype=torch.float64)
            exact.index_add_(0, index[image], shared.double())
            assert relative_error(summed[image], exact) <= ROUND_OFF[dtype]
    rows = draw(batch, count, columns, seed=2).to(dtype)
    found = device.empty((keys, columns), wide(dtype))
    device.run(
        "spectralx_sum_over_images", TYPE_CODES[dtype], device.put(rows), index, batch, count, keys,
        columns, found,
    )  # fmt: skip
    exact = torch.stack([rows[image].double()[index[image]] for image in range(batch)]).sum(0)
    assert relative_error(found, exact) <= ROUND_OFF[wide(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", WEIGHTED, ids=str)
def test_weighted_halves(
    library: ctypes.CDLL, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    device, (batch, count, width) = Device(library), shape
    args = [arg.to(dtype) for arg in weighing(*shape)]
    grad = draw(*shape, seed=4).to(dtype)
    results = {}
    for name, type_ in (("exact", torch.float64), ("plain", dtype)):
        leaves = [arg.to(type_).requires_grad_() for arg in args]
        out = reference.add_weighted_halves(*leaves)
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, grad.to(type_))]
    arguments = Weigh(type=TYPE_CODES[dtype], tokens_count=batch * count, half=width // 2)
    put: list[Any] = [device.put(value) for value in (*args, grad)]
    out, of_tokens = (device.empty(shape, dtype) for _ in range(2))
    of_weights = [device.empty((batch, count), dtype) for _ in range(2)]
    parts = device.empty((batch * count, 2), wide(dtype))
    names = ("tokens", "spatial", "spectral", "scale", "grad")
    bind(arguments, **dict(zip(names, put, strict=True)), out=out, parts=parts)
    bind(arguments, spatial_grad=of_weights[0], spectral_grad=of_weights[1])
    device.run("spectralx_weigh", ctypes.byref(arguments))
    bind(arguments, tokens_grad=of_tokens)
    device.run("spectralx_weigh_backward", ctypes.byref(arguments))
    found = [out, of_tokens, *of_weights, parts.sum()]
    for i, (value, exact, plain) in enumerate(
        zip(found, results["exact"], results["plain"], strict=True)
    ):
        factor = FORWARD_FACTOR if i == 0 else BACKWARD_FACTOR
        bound = factor * relative_error(plain, exact) + ROUND_OFF[dtype]
        assert relative_error(value, exact) <= bound, i
    arguments.tokens_grad = None
    of_tokens.fill_(torch.nan)
    device.run("spectralx_weigh_backward", ctypes.byref(arguments))
    assert of_tokens.isnan().all()


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    queries, keys = draw(1, 37, 19).float(), draw(1, 70, 19, seed=1).float()
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        given = Gather(library, "packs", torch.float32)
        grad = draw(2, 33, 64, seed=7).float()
        runs.append([match(library, queries, keys), given.normed(True), *given.backward(grad)])
    library.spectralx_shim_order(0)
    assert all(map(torch.equal, *runs))
