"""The adapted layer on a GPU: the proof ladder, graphs, launches, golden files, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.shapes import MLP_WIDTH, TOKENS, WIDTH
from spectralx_kernels import AoMoALinear, RoutingStatistics, _backends, use_backend
from spectralx_kernels.aomoa.ops import AOMOA
from tests.golden import aomoa as golden_aomoa
from tests.golden.golden import FOLDER, Golden
from tests.gpu.watching import kernels, no_synchronisation
from tests.kernels.aomoa.by_name import changed, check_shape, run
from tests.kernels.aomoa.running import assert_close, assert_same_bits
from tests.kernels.aomoa.test_aomoa import SIZES, arguments, layer
from tests.kernels.ladder import relative_error
from tests.tolerances import ROUND_OFF

OPERATOR = AOMOA
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = _backends.available(OPERATOR.name, "cuda")
WIDTHS = {"fc1": (WIDTH, MLP_WIDTH), "fc2": (MLP_WIDTH, WIDTH)}
MORE_SIZES: dict[str, dict[str, Any]] = {
    **SIZES,
    "many tokens": {"tokens": 1030, "rank": 24, "hidden": 5, "width": 64, "out": 48},
    "rank 13, hidden 7": {"tokens": 67, "rank": 13, "hidden": 7},
    "64 experts": {"tokens": 90, "experts": 64, "top_k": 2, "rank": 9},
    "64 experts, k = 9": {"tokens": 40, "experts": 64, "top_k": 9, "rank": 9},
    "widths 33 and 21": {"tokens": 19, "width": 33, "out": 21, "attributes": 3},
}


@pytest.fixture(autouse=True)
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with a `backend` argument runs whole under `use_backend`."""
    if "backend" not in request.fixturenames:
        yield
        return
    with use_backend(request.getfixturevalue("backend")):
        yield


# The ladder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", MORE_SIZES)
def test_accuracy(size: str, dtype: torch.dtype) -> None:
    check_shape(arguments(**MORE_SIZES[size]), dtype, "cuda", BACKENDS)


@pytest.mark.parametrize("side", WIDTHS)
def test_accuracy_at_the_papers_sizes(side: str) -> None:
    width, out = WIDTHS[side]
    args = arguments(130, width, out, rank=width // 8, hidden=width // 64)
    check_shape(args, torch.float32, "cuda", BACKENDS, draws=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", WIDTHS)
def test_half_types_at_the_papers_sizes(side: str, dtype: torch.dtype) -> None:
    """More tokens than one wave of tiles, and a last tile that is not full; the reference on the
    GPU too, a CPU takes a minute for it."""
    width, out = WIDTHS[side]
    args = arguments(2100, width, out, rank=width // 8, hidden=width // 64)
    check_shape(args, dtype, "cuda", BACKENDS, draws=1, measured_on="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noisy", [True, False])
def test_repeats(noisy: bool, dtype: torch.dtype, backend: str) -> None:
    args = arguments(2000, 256, 192, rank=32, hidden=5, noisy=noisy)
    first = run(args, backend, dtype, "cuda")
    for _ in range(5):
        assert_same_bits(run(args, backend, dtype, "cuda"), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_stays_its_tokens_own(value: float, backend: str) -> None:
    def spoil(x: Tensor) -> Tensor:
        return x.clone().index_put((torch.tensor(66), torch.tensor(2)), x.new_tensor(value))

    args = arguments(tokens=70, rank=5)
    found = run(changed(args, x=spoil), backend, device="cuda")
    expected = run(changed(args, x=spoil), "eager")
    others = torch.arange(70) != 66
    assert not found["out"][66].isfinite().any()
    assert found["x"][66, :6].isnan().all()
    assert found["out"][others].isfinite().all()
    assert found["x"][others].isfinite().all()
    for name in ("out", "gates", "load"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


def test_poisoned_memory_gives_the_same_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = arguments(530, 64, 48, rank=16, hidden=5)
    plain = run(args, backend, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        found = run(args, backend, device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    if backend == "eager":  # PyTorch chooses other algorithms then
        assert_close(found, plain)
    else:
        assert_same_bits(found, plain)


# The module --------------------------------------------------------------------------------------


def inputs(made: AoMoALinear, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [tokens, in] as a leaf, gate noise, and an upstream gradient."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).cuda()

    x = draw(tokens, made.in_features).to(dtype).requires_grad_()
    noise = draw(made.attributes, tokens, made.experts)
    return [x, noise, draw(tokens, made.out_features).to(dtype)]


def trained(made: AoMoALinear) -> list[Tensor]:
    return [parameter for parameter in made.parameters() if parameter.requires_grad]


def step(made: Callable[..., Tensor], layer_: AoMoALinear, given: list[Tensor]) -> list[Tensor]:
    """Output, gradient of x, gradients of everything that trains."""
    x, noise, upstream = given
    out = made(x, noise)
    grads = torch.autograd.grad(out, [x, *trained(layer_)], upstream, allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_of_the_forward_pass(dtype: torch.dtype, backend: str) -> None:
    made = layer().eval().to("cuda", dtype)
    x = torch.randn(40, 64).to("cuda", dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            made(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = made(x)
    for _ in range(3):
        x.copy_(torch.randn(40, 64))
        graph.replay()
        with torch.no_grad():
            assert relative_error(out, made(x)) <= ROUND_OFF[dtype]
        first = out.clone()
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_of_forward_and_backward(dtype: torch.dtype, backend: str) -> None:
    made = layer().to("cuda", dtype)
    given = inputs(made, 40, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(made, made, given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(made, made, given)
    for seed in range(3):
        with torch.no_grad():
            for place, tensor in enumerate(given):
                torch.manual_seed(10 * seed + place)
                tensor.copy_(torch.randn(tensor.shape))
        graph.replay()
        first = [tensor.clone() for tensor in captured]
        graph.replay()
        plain = step(made, made, given)
        for place, (found, other, expected) in enumerate(zip(captured, first, plain, strict=True)):
            assert torch.equal(found, other), place
            assert relative_error(found, expected) <= ROUND_OFF[dtype], place


def test_graph_draws_new_noise_at_every_replay() -> None:
    made = layer().cuda()
    x = torch.randn(40, 64, device="cuda")
    made(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = made(x)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_no_synchronisation(backend: str) -> None:
    made = layer().cuda()
    given = inputs(made, 300)
    x, noise, _ = given

    def everything() -> RoutingStatistics:
        step(made, made, given)
        made(x)  # noise drawn inside
        _, gates, load = made.forward_with_routing(x, noise)
        statistics = RoutingStatistics.of(gates, load)
        statistics.balance_loss().backward()
        return statistics.detach() + statistics.detach()

    everything()
    with no_synchronisation():
        found = everything()
    assert found.tokens.item() == 600


@pytest.mark.parametrize(
    ("dtype", "batch"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 32)]
)
@pytest.mark.parametrize("side", WIDTHS)
def test_few_launches(side: str, dtype: torch.dtype, batch: int, backend: str) -> None:
    """At most 4 kernels forward and 8 backward beside the frozen products."""
    if backend == "eager":
        pytest.skip("the reference launches what it needs")
    made = layer(*WIDTHS[side]).to("cuda", dtype)
    given = inputs(made, batch * (TOKENS + 1), dtype)
    x, noise, upstream = given
    linear = made.linear
    with torch.no_grad():
        product = len(kernels(lambda: F.linear(x, linear.weight, linear.bias)))
        forward = kernels(lambda: made(x, noise))
        back = len(kernels(lambda: upstream @ linear.weight))
    both = kernels(lambda: step(made, made, given))
    assert len(forward) - product <= 4, forward
    # The profile of a whole step has the forward pass first.
    assert len(both) - len(forward) - back <= 8, both


class CudaGolden(Golden):
    """A golden file whose tensors are drawn on the CPU and used on the GPU."""

    def draw(self, key: str, shape: tuple[int, ...] | list[int]) -> Tensor:
        return super().draw(key, shape).cuda()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("aomoa_*.npz")), ids=lambda path: path.stem)
def test_golden(path: Any, backend: str) -> None:
    golden = CudaGolden(path)
    with torch.device("cuda"):
        found = golden_aomoa.run(golden)
    assert isinstance(found["y"], Tensor)
    assert found["y"].is_cuda
    golden.check(found)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training: bool, backend: str) -> None:
    torch._dynamo.reset()
    made = layer().train(training).cuda()
    given = inputs(made, 40)
    if not training:
        given[1] = None  # type: ignore[call-overload]
    compiled = torch.compile(made, fullgraph=True)
    for found, expected in zip(step(compiled, made, given), step(made, made, given), strict=True):
        assert relative_error(found, expected) <= 10 * ROUND_OFF[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    made = layer().cuda()
    x, noise, upstream = inputs(made, 40)
    with torch.autocast("cuda", dtype=dtype):
        out = made(x, noise)
        assert out.dtype == dtype
        inside = torch.autograd.grad(out, [x, made.gate], upstream.to(dtype), retain_graph=True)
    outside = torch.autograd.grad(out, [x, made.gate], upstream.to(dtype))
    exact = made(x, noise)
    # The upper bound is a few roundings of values and weights to the narrow type.
    assert relative_error(out.detach(), exact.detach()) <= 4 * ROUND_OFF[dtype]
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other) <= 2 * ROUND_OFF[dtype]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_noise_again(reentrant: bool, backend: str) -> None:
    made = nn.Sequential(layer(), nn.GELU(), layer(48, 64)).cuda()
    x = torch.randn(40, 64, device="cuda")
    found = []
    for recomputing in (False, True):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        out = checkpoint(made, leaf, use_reentrant=reentrant) if recomputing else made(leaf)
        out.square().sum().backward()
        assert leaf.grad is not None
        grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        found.append({"x": leaf.grad, **grads})
        made.zero_grad()
    assert_same_bits(found[1], found[0])
