"""CUDA kernels of window attention and of attribute match's core, run on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels.hypert import reference
from tests.cuda_on_cpu.build import ROOT, compile_cuda, compiler, load
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.cuda_on_cpu.structure import structure
from tests.kernels.ladder import relative_error
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
FOLDER = ROOT / "csrc" / "cuda" / "hypert"
Attention = structure(FOLDER / "kernels.h", "SpectralxAttention")
# map, heads, width of a head, window
WINDOWS: dict[str, tuple[tuple[int, int], int, int, tuple[int, int]]] = {
    "padded": ((5, 3), 2, 5, (3, 2)),
    "several tiles": ((9, 8), 1, 16, (9, 8)),
    "window beyond the map": ((2, 3), 1, 3, (4, 5)),
    "wide": ((2, 3), 1, 137, (2, 3)),
}
# images, positions, width, queries: keys and values are one, queries are shared
MATCHES = {"odd": (2, 5, 7, 3), "several tiles": (1, 67, 8, 35)}
EMPTY = (0, 3, 4, 2)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = load(compile_cuda([FOLDER / "attention.cu"], "-O1", "-shared"))
    loaded.spectralx_attention_tiles.restype = ctypes.c_int64
    return loaded


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def at(tensor: Tensor, element: int) -> int:
    return tensor.data_ptr() + element * tensor.element_size()


def run(library: ctypes.CDLL, device: Device, name: str, **members: Any) -> Any:
    """One call; tensors become pointers."""
    alive = {key: v.data_ptr() if isinstance(v, Tensor) else v for key, v in members.items()}
    device.run(name, ctypes.byref(Attention(**alive)))


def run_windows(
    library: ctypes.CDLL, name: str, qkv: Tensor, padding: Tensor, dout: Tensor
) -> dict[str, Tensor]:
    """Output and gradients of qkv and padding."""
    (height, width), heads, dim, (rows, columns) = WINDOWS[name]
    device, dtype, third = Device(library), qkv.dtype, heads * dim
    data, pad, upstream = device.put(qkv), device.put(padding), device.put(dout)
    assert data is not None
    assert pad is not None
    assert upstream is not None
    images = qkv.shape[0]
    out = device.empty((images, height, width, third), dtype)
    grad = device.empty(qkv.shape, dtype)
    padded = height % rows or width % columns
    members: dict[str, Any] = {
        "type": TYPE_CODES[dtype], "images": images, "heads": heads, "dim": dim, "rows": rows,
        "columns": columns, "height": height, "width": width, "q_row": 3 * third,
        "k_row": 3 * third, "q_image": height * width * 3 * third,
        "k_image": height * width * 3 * third, "scale": dim**-0.5, "q": data,
        "k": at(data, third), "v": at(data, 2 * third),
    }  # fmt: skip
    if padded:
        members |= {"padding_k": at(pad, third), "padding_v": at(pad, 2 * third)}
    run(library, device, "spectralx_attention", **members, out=out)
    tiles = library.spectralx_attention_tiles(ctypes.byref(Attention(
        type=TYPE_CODES[dtype], dim=dim, heads=heads, rows=rows, columns=columns
    )))  # fmt: skip
    windows = -(-height // rows) * -(-width // columns)
    wide = wide_of(dtype)
    parts = device.empty((images * windows * tiles, 2, third), wide)
    sums = device.empty((2, heads, images * height * width), wide)
    run(
        library, device, "spectralx_attention_backward", **members, dout=upstream, dq=grad,
        dq_row=3 * third, dk=at(grad, third), dv=at(grad, 2 * third), log_sum=sums[0],
        slope=sums[1], parts=parts if padded else None,
    )  # fmt: skip
    of_padding = torch.zeros(3 * third, dtype=wide)
    if padded:
        of_padding[third:] = parts.sum(0).flatten()
    return {"out": out.clone(), "qkv": grad.clone(), "padding": of_padding.to(dtype)}


def expected_windows(name: str, *tensors: Tensor) -> dict[str, Tensor]:
    _, heads, _, window = WINDOWS[name]
    qkv, padding, dout = (tensor.clone() for tensor in tensors)
    leaves = qkv.requires_grad_(), padding.requires_grad_()
    out = reference.window_attention(*leaves, heads, [*window])
    grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    of_padding = torch.zeros_like(padding) if grads[1] is None else grads[1]
    return {"out": out.detach(), "qkv": grads[0], "padding": of_padding}


def compare(
    found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> None:
    for name, truth in exact.items():
        factor = FORWARD_FACTOR if name == "out" else BACKWARD_FACTOR
        bound = factor * relative_error(plain[name], truth) + ROUND_OFF[dtype]
        error = relative_error(found[name], truth)
        assert error <= bound, (name, error, bound)


def draw_windows(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    side, heads, dim, _ = WINDOWS[name]
    third = heads * dim
    shapes = (1, *side, 3 * third), (3 * third,), (1, *side, third)
    qkv, padding, dout = (draw(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    return qkv, padding, dout


@pytest.mark.parametrize("dtype", TYPE_CODES, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    tensors = draw_windows(name, dtype)
    found = []
    for order in (0, 1):  # threads first to last, then last to first
        library.spectralx_shim_order(order)
        found.append(run_windows(library, name, *tensors))
    library.spectralx_shim_order(0)
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
    exact = expected_windows(name, *(tensor.double() for tensor in tensors))
    compare(found[0], expected_windows(name, *tensors), exact, dtype)


def test_nan_stays_in_its_window(library: ctypes.CDLL) -> None:
    qkv, padding, dout = draw_windows("padded", torch.float32)
    qkv[0, 0, 0, 10] = torch.nan  # a key of the first head
    out = run_windows(library, "padded", qkv, padding, dout)["out"]
    assert out[0, :3, :2, :5].isnan().all()
    assert out[0, :3, :2, 5:].isfinite().all()
    assert out[0, 3:].isfinite().all()


def match(features: Tensor, queries: Tensor) -> Tensor:
    scores = queries @ features.transpose(1, 2) * 0.3
    return torch.softmax(scores, -1) @ features


@pytest.mark.parametrize("dtype", TYPE_CODES, ids=str)
@pytest.mark.parametrize("name", [*MATCHES, "empty"])
def test_matches(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    images, positions, width, count = MATCHES.get(name, EMPTY)
    shapes = (images, positions, width), (count, width), (images, count, width)
    features, queries, dout = (draw(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    device, wide = Device(library), wide_of(dtype)
    out = device.empty((images, count, width), dtype)
    dq = device.empty((images, count, width), wide)
    dkeys = device.empty((images, positions, width), dtype)
    sums = device.empty((2, 1, images * count), wide)
    keys = device.put(features)
    members: dict[str, Any] = {
        "type": TYPE_CODES[dtype], "images": images, "heads": 1, "dim": width, "queries": count,
        "rows": 1, "columns": positions, "height": 1, "width": positions, "q_row": width,
        "k_row": width, "k_image": positions * width, "scale": 0.3, "q": device.put(queries),
        "k": keys, "v": keys,
    }  # fmt: skip
    run(library, device, "spectralx_attention", **members, out=out)
    run(
        library, device, "spectralx_attention_backward", **members, dout=device.put(dout), dq=dq,
        dq_row=width, dq_wide=1, dk=dkeys, log_sum=sums[0], slope=sums[1],
    )  # fmt: skip
    found = {"out": out, "features": dkeys, "queries": dq.sum(0)}

    def expected(x: Tensor, q: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        x, q = x.clone().requires_grad_(), q.clone().requires_grad_()
        result = match(x, q)
        grads = torch.autograd.grad(result, (x, q), upstream)
        return {"out": result.detach(), "features": grads[0], "queries": grads[1]}

    exact = expected(features.double(), queries.double(), dout.double())
    compare(found, expected(features, queries, dout), exact, dtype)
