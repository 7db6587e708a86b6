"""CUDA kernels of the whole AoMoA layer, run on the CPU, against the reference in float64."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels.aomoa import reference
from tests.cuda_on_cpu import layer
from tests.cuda_on_cpu.build import ROOT, compile_cuda, compiler, load
from tests.cuda_on_cpu.device import TYPE_CODES
from tests.cuda_on_cpu.layer import Weights
from tests.kernels.ladder import relative_error
from tests.tolerances import FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
CASES = {  # tokens, attributes, width, out, rank, hidden, experts, top_k, noisy
    "paper": (19, 2, 32, 24, 16, 8, 4, 2, True),
    "evaluation": (9, 2, 24, 10, 8, 4, 4, 2, False),
    "odd": (11, 3, 15, 7, 13, 5, 5, 2, True),
    "wide": (5, 1, 40, 12, 71, 67, 3, 1, True),
    "all experts": (6, 2, 9, 6, 10, 3, 3, 3, True),
    "one expert": (7, 1, 16, 8, 6, 2, 1, 1, True),
    "one token": (1, 2, 8, 4, 5, 3, 6, 1, True),
}
FORWARD = ("out", "gates", "load", "normed", "statistics")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    folder = ROOT / "csrc" / "cuda" / "aomoa"
    return load(compile_cuda([folder / "forward.cu"], "-O1", "-shared"))


def draw(case: str, dtype: torch.dtype, scale: float = 1.0) -> Weights:
    """Arguments of the layer; `scale` enlarges what the experts put out."""
    tokens, attributes, width, out, rank, hidden, experts, top_k, noisy = CASES[case]
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int, by: float = 1.0, plus: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (drawn * by + plus).to(dtype)

    return Weights(
        x=normal(tokens, attributes * width, by=1.5, plus=0.3),
        weight=normal(attributes * out, attributes * width, by=(attributes * width) ** -0.5),
        bias=normal(attributes * out),
        scaler=normal(attributes * out, by=0.3, plus=1.0),
        norm1_weight=normal(width, by=0.2, plus=1.0),
        norm1_bias=normal(width, by=0.2),
        down=normal(rank, width, by=width**-0.5),
        norm2_weight=normal(rank, by=0.2, plus=1.0),
        norm2_bias=normal(rank, by=0.2),
        gate=normal(attributes, rank, experts, by=rank**-0.5),
        gate_noise=normal(attributes, rank, experts, by=rank**-0.5),
        noise=normal(attributes, tokens, experts) if noisy else None,
        fc1_weight=normal(experts, hidden, rank, by=rank**-0.5),
        fc1_bias=normal(experts, hidden, by=0.1),
        fc2_weight=normal(experts, rank, hidden, by=scale * hidden**-0.5),
        fc2_bias=normal(experts, rank, by=scale * 0.1),
        up=normal(out, rank, by=rank**-0.5),
        top_k=top_k,
        norm_eps=1e-5,
    )


def cast(w: Weights, dtype: torch.dtype) -> Weights:
    return Weights(*[value.to(dtype) if isinstance(value, Tensor) else value for value in w])


def referred(w: Weights) -> dict[str, Tensor]:
    return dict(zip(FORWARD, reference.aomoa_saving(*w), strict=True))  # type: ignore[arg-type]


def check_forward(library: ctypes.CDLL, w: Weights, dense: bool = False) -> None:
    exact, eager = referred(cast(w, torch.float64)), referred(w)
    found = layer.forward(library, w, dense)._asdict()
    for name in FORWARD:
        own = relative_error(eager[name], exact[name])
        bound = FORWARD_FACTOR * own + ROUND_OFF[w.x.dtype]
        assert relative_error(found[name], exact[name]) <= bound, name


@pytest.mark.parametrize("dtype", TYPE_CODES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_forward(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    check_forward(library, draw(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_forward(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    check_forward(library, draw("odd", dtype), dense=True)


def test_large_outputs_of_experts(library: ctypes.CDLL) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = draw("paper", dtype, scale=1e4)
        found = layer.forward(library, w)
        assert found.out.isfinite().all()
        check_forward(library, w)


def test_ties_and_an_expert_without_tokens(library: ctypes.CDLL) -> None:
    w = draw("evaluation", torch.float32)
    w = w._replace(gate=torch.zeros_like(w.gate))
    found = layer.forward(library, w)
    assert torch.equal(found.gates[0, 0], torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert found.load.tolist() == [[9.0, 9.0, 0.0, 0.0]] * 2
    check_forward(library, w)


def test_nan_stays_in_its_token(library: ctypes.CDLL) -> None:
    w = draw("odd", torch.float32)
    w.x[4, 20] = torch.nan  # attribute 1
    found = layer.forward(library, w)
    assert found.out[4, 7:14].isnan().all()
    assert not found.out[torch.arange(11) != 4].isnan().any()
    assert found.gates[1, 4].isnan().any()
    assert found.load.isnan().any(1).tolist() == [False, True, False]


def bits(results: Any) -> list[Tensor]:
    return [tensor.nan_to_num(0.5) for tensor in results]


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    w = draw("odd", torch.float32)
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        runs.append(bits(layer.forward(library, w)))
    library.spectralx_shim_order(0)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
