"""The shim itself: barriers, shuffles, votes, atomics, tensor cores, and what it has to catch."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.build import compile_cuda, compiler, load

SOURCE = Path(__file__).parent / "shim_kernels.cu"
pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load(compile_cuda([SOURCE], "-O1", "-shared"))


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return compile_cuda([SOURCE], "-O1", "-fsanitize=address", "-DSHIM_MAIN")


@pytest.fixture(params=[0, 1], ids=["first-to-last", "last-to-first"], autouse=True)
def order(request: Any, library: ctypes.CDLL) -> Any:
    library.spectralx_shim_order(request.param)
    yield request.param
    library.spectralx_shim_order(0)


def at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_barrier(library: ctypes.CDLL) -> None:
    values = torch.randn(3, 77)
    expected = values.flip(1)
    assert library.run_reverse(at(values), 3, 77) == 0
    assert torch.equal(values, expected)


def test_forgotten_barrier_shows(library: ctypes.CDLL) -> None:
    values = torch.arange(1.0, 65.0)
    expected = values.flip(0)
    assert library.run_forgets_barrier(at(values)) == 0
    assert not torch.equal(values, expected)


def test_shuffles_and_votes(library: ctypes.CDLL) -> None:
    values = torch.randn(4, 32)
    values[2] = values[2].abs() + 100
    sums, votes = torch.empty(4), torch.empty(4, 3, dtype=torch.int32)
    shifted = torch.empty(4, 32)
    assert library.run_warp_sums(at(values), at(sums), at(votes), at(shifted)) == 0
    torch.testing.assert_close(sums, values.sum(1))
    expected = ((values > 0).long() << torch.arange(32)).sum(1)
    assert (votes[:, 0].long() & 0xFFFFFFFF).tolist() == expected.tolist()
    assert votes[:, 1].tolist() == [1] * 4
    assert votes[:, 2].tolist() == [0, 0, 1, 0]
    lane = torch.arange(32)
    down = torch.where(lane % 8 < 6, lane + 2, lane)
    moved = values[:, (lane - 1).clamp_min(0)] + values[:, down] + values[:, lane // 16 * 16 + 3]
    torch.testing.assert_close(shifted, moved)


def test_lanes_of_different_masks_meet_apart(library: ctypes.CDLL) -> None:
    sums = torch.empty(32)
    assert library.run_half_a_warp(at(sums)) == 0
    assert sums.tolist() == [120.0] * 16 + [376.0] * 16


@pytest.mark.parametrize(
    ("name", "message"),
    [("run_divergent", "divergent __syncthreads"), ("run_divergent_warp", "divergent __shfl_sync")],
)
def test_divergent_barrier_is_an_error(library: ctypes.CDLL, name: str, message: str) -> None:
    values = torch.zeros(64)
    assert getattr(library, name)(at(values)) == 1
    assert message in library.spectralx_shim_error().decode()
    test_barrier(library)  # and the next launch is well


def test_atomics_over_grid_and_block(library: ctypes.CDLL, order: int) -> None:
    total, largest = torch.tensor([0, 7], dtype=torch.int32), torch.tensor([-1.0])
    assert library.run_count(at(total), at(largest)) == 0
    assert total.tolist() == [2 * 6 * 40, 11 if order else 10]
    assert largest.item() == 3


def test_shared_memory_starts_as_nan(library: ctypes.CDLL) -> None:
    values = torch.zeros(32)
    assert library.run_unset_shared(at(values)) == 0
    assert values.isnan().all()


def test_limits_of_a_launch(library: ctypes.CDLL) -> None:
    assert library.run_too_large(at(torch.zeros(2000))) == 1
    assert "limits" in library.spectralx_shim_error().decode()


def test_vector_loads(library: ctypes.CDLL) -> None:
    source, target = torch.randn(32), torch.zeros(32)
    assert library.run_vectors(at(source), at(target)) == 0
    assert torch.equal(source, target)


def test_half_and_bfloat16_round_as_torch(library: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(512, generator=generator) * 10.0 ** torch.arange(-9, 7).repeat(32)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 6e-8, 2e-8]
    values[:12] = torch.tensor([*special, 3.4e38, 1.0009765625 / 2])
    half, bfloat16 = torch.empty(512), torch.empty(512)
    assert library.run_convert(at(values), at(half), at(bfloat16)) == 0
    torch.testing.assert_close(half, values.half().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat16, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_tensor_core_product(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    expected = c.double() + a.double() @ b.double().T
    assert library.run_tensor_core(int(dtype == torch.half), at(a), at(b), at(c)) == 0
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["global", "shared"])
def test_write_out_of_bounds_is_caught(sanitized: Path, memory: str, order: int) -> None:
    inside = subprocess.run([sanitized, memory, "15"], capture_output=True, text=True)
    assert inside.returncode == 0, inside.stderr
    outside = subprocess.run([sanitized, memory, "16"], capture_output=True, text=True)
    assert outside.returncode != 0
    assert "heap-buffer-overflow" in outside.stderr
