"""Attention beyond one tile: many queries and keys, odd widths, instruction sets, threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.hypert import window_attention
from spectralx_kernels.hypert.attention import ATTRIBUTE_MATCH, WINDOW_ATTENTION
from tests.kernels import ladder
from tests.kernels.hypert.test_ops import draw

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# map, heads, width of a head, window
WINDOWS = {
    "several tiles": ((9, 11), 2, 4, (7, 9)),
    "one row": ((1, 67), 2, 7, (1, 67)),
    "odd": ((5, 13), 1, 5, (5, 9)),
    "single positions": ((3, 2), 2, 3, (1, 1)),
    "window beyond the map": ((2, 3), 1, 2, (5, 7)),
    "thin": ((7, 4), 3, 1, (2, 4)),
}
# features [N, F], queries [M, d]
MATCHES = {"several tiles": (70, 10, 37, 5), "odd": (33, 7, 3, 3), "one key": (1, 4, 2, 2)}


def window_args(name: str, batch: int = 2) -> list[Any]:
    side, heads, dim, window = WINDOWS[name]
    channels = 3 * heads * dim
    return [draw(batch, *side, channels), draw(channels, seed=1), heads, list(window)]


def match_args(name: str, batch: int = 2) -> list[Any]:
    positions, width, queries, inner = MATCHES[name]
    return [
        draw(batch, positions, width), draw(queries, inner), 1 + 0.1 * draw(width),
        0.1 * draw(width, seed=1), draw(2 * inner, width) / width**0.5, 1e-5,
    ]  # fmt: skip


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton: many programs, and something left over in each dimension."""
    if "triton" in _backends.available("window_attention", "cpu"):
        from spectralx_kernels.hypert import triton as kernels

        monkeypatch.setattr(kernels, "_TILE", 32)
        monkeypatch.setattr(kernels, "_DEPTH", 16)
        monkeypatch.setattr(kernels, "_COLUMNS", 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(WINDOW_ATTENTION, window_args(name), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATCHES)
def test_matches(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(ATTRIBUTE_MATCH, match_args(name), dtype)


@pytest.mark.usefixtures("small_tiles")
def test_several_programs() -> None:
    args: list[Any] = [draw(1, 5, 8, 3 * 18), draw(3 * 18, seed=1), 1, [5, 7]]
    ladder.check_accuracy(WINDOW_ATTENTION, args, torch.float32)
    args = [draw(2, 40, 19), draw(34, 9), draw(19), draw(19, seed=1), draw(18, 19) / 4, 1e-5]
    ladder.check_accuracy(ATTRIBUTE_MATCH, args, torch.float32)


def test_large_scores_and_infinities(backend: str) -> None:
    """A score far above the others takes all; exponentials of none overflow."""
    qkv = 60 * draw(1, 5, 8, 24).float()
    out = window_attention(qkv, num_heads=2, window=(5, 8), backend=backend)
    exact = window_attention(qkv.double(), num_heads=2, window=(5, 8), backend="eager")
    assert ladder.relative_error(out, exact) < 1e-4
    qkv[0, 0, 0, 8:16] = torch.inf  # keys
    plain = window_attention(qkv, num_heads=2, window=(5, 8), backend="eager")
    assert torch.equal(
        window_attention(qkv, num_heads=2, window=(5, 8), backend=backend).isnan(), plain.isnan()
    )


def test_no_queries_and_no_images(backend: str) -> None:
    args = ladder.cast(match_args("odd"), torch.float32)
    for images, queries in ((2, 0), (0, 3)):
        leaves = ladder.cast([args[0][:images], args[1][:queries], *args[2:]], torch.float32)
        for leaf in leaves[:5]:
            leaf.requires_grad_()
        out = ATTRIBUTE_MATCH(*leaves, backend=backend)
        assert out.shape == (images, queries, 3)
        out.sum().backward()
        assert not any(leaf.grad.any() for leaf in leaves[:5])


def test_nan_in_padding_reaches_padded_windows_alone(backend: str) -> None:
    qkv, padding = draw(1, 5, 4, 12).float(), torch.full((12,), torch.nan)
    out = window_attention(qkv, padding, num_heads=2, window=(4, 4), backend=backend)
    assert out[0, :4].isfinite().all()
    assert out[0, 4:].isnan().all()


def _bits(**environment: str) -> str:
    """Results of both operators as a process of its own gives them."""
    code = (
        "import torch\n"
        "from tests.kernels import ladder\n"
        "from tests.kernels.hypert import test_attention as t\n"
        f"torch.set_num_threads({environment.pop('THREADS', '1')})\n"
        "for op, args in ((t.WINDOW_ATTENTION, t.window_args('several tiles')),\n"
        "                 (t.ATTRIBUTE_MATCH, t.match_args('several tiles', 3))):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        out, grads = ladder.run_with_gradients(\n"
        "            op.op, ladder.cast(args, dtype, grad=True))\n"
        "        if op is t.ATTRIBUTE_MATCH:  # torch's own sums, cut up by threads\n"
        "            del grads['argument 2'], grads['argument 3']\n"
        "        for tensor in (*out, *grads.values()):\n"
        "            print(tensor.flatten().view(torch.uint8).tolist())\n"
        "            assert tensor.isfinite().all()\n"
        "    ladder.check_accuracy(op, args, torch.float32)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.skipif(
    "cpp" not in _backends.available("window_attention", "cpu"), reason="no extension module"
)
def test_instruction_sets_and_threads() -> None:
    """The number of threads changes no bit; older instruction sets pass the same ladder."""
    one = _bits()
    assert one
    assert _bits(THREADS="2") == one
    for capability in ("baseline", "avx2"):
        assert _bits(SPECTRALX_CPU_CAPABILITY=capability)


def test_backward_keeps_no_scores() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for operator, args in (
        (WINDOW_ATTENTION, window_args("odd")),
        (ATTRIBUTE_MATCH, match_args("odd")),
    ):
        kept.clear()
        leaves = ladder.cast(args, torch.float32, grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, keep):
            assert operator.op(*leaves).requires_grad
        pointers = {leaf.data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
        assert kept
        assert all(tensor.data_ptr() in pointers for tensor in kept)
