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
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
CASES = {  # tokens, attributes, width, out, rank, hidden, experts, top_k, noisy
    "paper": (19, 2, 32, 24, 16, 8, 4, 2, True),
    "evaluation": (9, 2, 24, 10, 8, 4, 4, 2, False),
    "odd": (11, 3, 15, 7, 13, 5, 5, 2, True),
    "wide": (5, 1, 40, 12, 71, 67, 3, 1, True),
    "all experts": (6, 2, 9, 6, 10, 3, 3, 3, True),
    "one expert": (7, 1, 16, 8, 6, 2, 1, 1, True),
    "tall": (50, 2, 8, 6, 9, 5, 4, 2, True),
    "one token": (1, 2, 8, 4, 5, 3, 6, 1, True),
}
FORWARD = ("out", "gates", "load", "normed", "statistics")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    folder = ROOT / "csrc" / "cuda" / "aomoa"
    return load(compile_cuda([folder / "forward.cu", folder / "backward.cu"], "-O1", "-shared"))


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
    tensors: dict[str, Any] = {k: v for k, v in w._asdict().items() if isinstance(v, Tensor)}
    return w._replace(**{name: tensor.to(dtype) for name, tensor in tensors.items()})


def referred(w: Weights) -> dict[str, Tensor]:
    return dict(zip(FORWARD, reference.aomoa_saving(*w), strict=True))  # type: ignore[arg-type]


def check_forward(library: ctypes.CDLL, w: Weights, dense: bool = False, tile: int = 0) -> None:
    exact, eager = referred(cast(w, torch.float64)), referred(w)
    found = layer.forward(library, w, dense, tile)._asdict()
    for name in FORWARD:
        own = relative_error(eager[name], exact[name])
        bound = FORWARD_FACTOR * own + ROUND_OFF[w.x.dtype]
        assert relative_error(found[name], exact[name]) <= bound, name


def upstream(w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of out, gates and load."""
    generator = torch.Generator().manual_seed(7)
    attributes, _, experts = w.gate.shape
    tokens, out = w.x.shape[0], w.weight.shape[0]
    wide = torch.float64 if w.x.dtype == torch.float64 else torch.float32
    return (
        torch.randn(tokens, out, generator=generator).to(w.x.dtype),
        torch.randn(attributes, tokens, experts, generator=generator).to(wide),
        torch.randn(attributes, experts, generator=generator).to(wide),
    )


def referred_gradients(w: Weights, grads: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    names = ["x", *layer.TRAINED, *(["noise"] if w.noise is not None else [])]
    leaves = {name: getattr(w, name).detach().clone().requires_grad_() for name in names}
    outputs = reference.aomoa(*w._replace(**leaves))  # type: ignore[arg-type]
    scored = [(o, g.to(o)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in scored],
        list(leaves.values()),
        [grad for _, grad in scored],
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in zip(names, found, strict=True)
    }


def run_backward(library: ctypes.CDLL, w: Weights, **options: Any) -> dict[str, Tensor]:
    kept = layer.forward(library, w, options.get("dense", False), options.get("tile", 0))
    return layer.backward(library, w, kept, *upstream(w), **options)


def check_backward(library: ctypes.CDLL, w: Weights, **options: Any) -> None:
    exact = referred_gradients(cast(w, torch.float64), upstream(w))
    eager = referred_gradients(w, upstream(w))
    found = run_backward(library, w, **options)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        own = relative_error(eager[name], truth)
        bound = BACKWARD_FACTOR * own + ROUND_OFF[w.x.dtype]
        assert relative_error(found[name], truth) <= bound, name


@pytest.mark.parametrize("dtype", TYPE_CODES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_forward(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    check_forward(library, draw(case, dtype))


@pytest.mark.parametrize("dtype", TYPE_CODES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_backward(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    check_backward(library, draw(case, dtype))


@pytest.mark.parametrize(
    ("dtype", "tile"),
    [(torch.float64, 0), (torch.float32, 64), (torch.bfloat16, 32), (torch.bfloat16, 64)],
)
def test_every_expert_on_every_row(library: ctypes.CDLL, dtype: torch.dtype, tile: int) -> None:
    check_forward(library, draw("odd", dtype), dense=True, tile=tile)
    check_backward(library, draw("odd", dtype), dense=True, tile=tile)


@pytest.mark.parametrize("tile", [1, 8, 32, 64])
def test_tiles(library: ctypes.CDLL, tile: int) -> None:
    for dtype in (torch.float32, torch.float16):
        check_forward(library, draw("tall", dtype), tile=tile)
        check_backward(library, draw("tall", dtype), tile=tile)


@pytest.mark.parametrize("splits", [2, 5])
def test_rows_in_parts(library: ctypes.CDLL, splits: int) -> None:
    check_backward(library, draw("tall", torch.float64), splits=splits)


def test_large_outputs_of_experts(library: ctypes.CDLL) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        w = draw("paper", dtype, scale=1e4)
        assert layer.forward(library, w).out.isfinite().all()
        check_forward(library, w)
        check_backward(library, w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ties_and_an_expert_without_tokens(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    w = draw("evaluation", dtype)
    w = w._replace(gate=torch.zeros_like(w.gate))
    found = layer.forward(library, w)
    assert found.gates[0, 0].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert found.load.tolist() == [[9.0, 9.0, 0.0, 0.0]] * 2
    check_forward(library, w)
    check_backward(library, w)
    assert not run_backward(library, w)["fc2_weight"][2:].any()


def test_all_gates_zero_but_one(library: ctypes.CDLL) -> None:
    w = draw("evaluation", torch.float64)
    w.norm2_bias[:] += 1
    w = w._replace(gate=torch.zeros_like(w.gate))
    w.gate[:, :, 3] = 30
    assert (layer.forward(library, w).gates[..., :3] == 0).any()
    check_forward(library, w)
    check_backward(library, w)


def test_nan_stays_in_its_token(library: ctypes.CDLL) -> None:
    w = draw("odd", torch.float32)
    w.x[4, 20] = torch.nan  # attribute 1
    found = layer.forward(library, w)
    others = torch.arange(11) != 4
    assert found.out[4, 7:14].isnan().all()
    assert not found.out[others].isnan().any()
    assert found.gates[1, 4].isnan().any()
    assert found.load.isnan().any(1).tolist() == [False, True, False]
    out_grad, gates_grad, _ = upstream(w)
    grads = layer.backward(library, w, found, out_grad, gates_grad, None)
    assert grads["x"][4, 15:30].isnan().all()
    assert not grads["x"][others].isnan().any()
    assert grads["down"].isnan().any()


def test_infinity_gives_nan(library: ctypes.CDLL) -> None:
    w = draw("odd", torch.float32)
    w.x[4, 20] = torch.inf
    found = layer.forward(library, w)
    assert found.out[4, 7:14].isnan().all()
    assert not found.out[torch.arange(11) != 4].isnan().any()


def test_gradients_that_nobody_sends(library: ctypes.CDLL) -> None:
    w = draw("odd", torch.float64)
    kept = layer.forward(library, w)
    out_grad, gates_grad, load_grad = upstream(w)
    zeros = (out_grad, torch.zeros_like(gates_grad), torch.zeros_like(load_grad))
    missing = layer.backward(library, w, kept, out_grad, None, None)
    for name, given in layer.backward(library, w, kept, *zeros).items():
        torch.testing.assert_close(missing[name], given)


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    w = draw("odd", torch.float32)
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        runs.append([*layer.forward(library, w), *run_backward(library, w, splits=2).values()])
    library.spectralx_shim_order(0)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_launches(library: ctypes.CDLL) -> None:
    w = draw("one token", torch.float32)
    before = library.spectralx_shim_launches()
    kept = layer.forward(library, w)
    between = library.spectralx_shim_launches()
    layer.backward(library, w, kept, *upstream(w))
    # With the vendor's: 2 + 2 forward and 4 + 4 backward, beside the frozen products.
    assert (between - before, library.spectralx_shim_launches() - between) == (2, 4)


def test_what_does_not_fit_is_refused(library: ctypes.CDLL) -> None:
    w = draw("one token", torch.float32)
    session = layer.Session(library, w, False, 0)
    session.layer.rank = 1 << 20
    assert session.count("spectralx_aomoa_forward_blocks") == 0
    assert session.count("spectralx_aomoa_backward_blocks") == 0
