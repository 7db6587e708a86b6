"""`AoMoALinear` inside what PyTorch users do with layers, on every backend of this machine."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import SavedBytes
from spectralx_kernels import AoMoALinear, _backends, use_backend
from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels.aomoa.running import assert_close, assert_same_bits, run
from tests.kernels.aomoa.test_aomoa import layer
from tests.kernels.ladder import relative_error
from tests.tolerances import ROUND_OFF

OPERATOR = AOMOA  # what the `backend` argument ranges over


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_layer_in_that_dtype(dtype: torch.dtype, backend: str) -> None:
    made, x = layer(), torch.randn(2, 3, 64)
    noise = torch.randn(2, 6, 4).to(dtype)

    def narrow(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            out: Tensor = made(*inputs)
        return out

    found = run(made, x, noise, call=narrow)
    expected = run(copy.deepcopy(made).to(dtype), x.to(dtype), noise)
    assert found["out"].dtype == dtype
    for name, tensor in found.items():
        assert name == "out" or tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    # Many training loops call backward inside the block too.
    with torch.autocast("cpu", dtype=dtype):
        inside = run(made, x, noise)
    assert torch.equal(inside["out"], found["out"])
    for name, tensor in found.items():
        assert inside[name].dtype == tensor.dtype, name
        assert relative_error(inside[name], tensor) <= 2 * ROUND_OFF[dtype], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moves_to_another_dtype_and_back(dtype: torch.dtype, backend: str) -> None:
    made, x, noise = layer(), torch.randn(6, 64), torch.randn(2, 6, 4)
    exact = run(copy.deepcopy(made).double(), x.double(), noise.double())
    moved = copy.deepcopy(made).to(dtype)
    found = run(moved, x.to(dtype), noise)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert relative_error(found["out"], exact["out"]) <= 4 * ROUND_OFF[dtype]
    rounded = {name: value.to(dtype).float() for name, value in made.state_dict().items()}
    expected = copy.deepcopy(made)
    expected.load_state_dict(rounded)
    assert_same_bits(run(moved.float(), x, noise), run(expected, x, noise))


# Compilation, export -----------------------------------------------------------------------------


def test_compiled_training_has_the_same_gradients(backend: str) -> None:
    torch._dynamo.reset()
    made, x, noise = layer(), torch.randn(2, 3, 64), torch.randn(2, 6, 4)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert_close(run(made, x, noise, call=compiled), run(made, x, noise))


def test_compiled_layer_draws_noise_and_takes_any_batch() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    made = layer()
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    x = torch.randn(2, 3, 64)
    assert not torch.equal(compiled(x), compiled(x))
    for batch in (3, 5, 9):
        assert compiled(torch.randn(batch, 3, 64)).shape == (batch, 3, 48)
    assert counter.frame_count == 2  # one for the first size, one for any
    compiled(x).square().sum().backward()
    assert made.gate_noise.grad is not None
    assert made.gate_noise.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "out", "tokens"), [(2304, 48, 35), (40, 208, 70), (4, 4, 1)])
def test_autocast_rounds_the_frozen_weight_as_it_is_read(
    width: int, out: int, tokens: int, dtype: torch.dtype
) -> None:
    """Every bit is that of a weight in autocast's type, and no copy of it is held for backward."""
    made = layer(width, out, rank=2, hidden=2)
    narrow = copy.deepcopy(made)
    narrow.linear.to(dtype)
    x, noise = torch.randn(tokens, width), torch.randn(2, tokens, 4)
    found = []
    for each in (made, narrow):
        leaf = x.clone().requires_grad_()
        known = [leaf, *each.parameters()]
        with torch.autocast("cpu", dtype=dtype), SavedBytes(known) as saved:
            result = each(leaf, noise)
        result.float().square().sum().backward()
        grads = [leaf.grad, *(p.grad for p in each.parameters() if p.requires_grad)]
        found.append([result.detach(), *(grad for grad in grads if grad is not None)])
        if _backends.available("aomoa", "cpu")[0] == "cpp":
            assert saved.bytes < max(2 * width * out, 10_000)
    assert all(map(torch.equal, *found))


def test_compiles_under_autocast() -> None:
    torch._dynamo.reset()
    made, x, noise = layer(), torch.randn(2, 3, 64), torch.randn(2, 6, 4)

    def narrow(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = made(*inputs)
        return out

    compiled = torch.compile(narrow, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(made, x, noise, call=compiled), run(made, x, noise, call=narrow))


def test_exports_for_evaluation_with_any_batch() -> None:
    made = layer().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        made, (torch.randn(2, 3, 64),), dynamic_shapes={"x": {0: batch}}, strict=False
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (1, 7):
        x = torch.randn(size, 3, 64)
        assert torch.equal(loaded(x), made(x))


def test_exports_for_training_with_noise_as_input() -> None:
    made, x, noise = layer(), torch.randn(2, 3, 64), torch.randn(2, 6, 4)
    program = torch.export.export(made, (x, noise), strict=False).module()
    out = program(x, noise)
    assert torch.equal(out, made(x, noise))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "spectralx.aomoa.default" in names


# Recomputation -----------------------------------------------------------------------------------


def stack() -> nn.Sequential:
    return nn.Sequential(layer(), nn.GELU(), nn.Dropout(0.2), layer(48, 64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_noise_again(reentrant: bool, backend: str) -> None:
    made, x = stack(), torch.randn(5, 64)

    def recomputing(x: Tensor, keep: bool = True) -> Tensor:
        out: Tensor = checkpoint(made, x, use_reentrant=reentrant, preserve_rng_state=keep)
        return out

    torch.manual_seed(3)
    plain = run(made, x)
    torch.manual_seed(3)
    assert_same_bits(run(made, x, call=recomputing), plain)
    # The control: with other noise in the recomputation the gradients are other ones.
    torch.manual_seed(3)
    other = run(made, x, call=lambda x: recomputing(x, keep=False))
    assert not torch.equal(other["0.gate"], plain["0.gate"])


def test_compiled_checkpoint(backend: str) -> None:
    torch._dynamo.reset()
    made, x, noise = layer(), torch.randn(5, 64), torch.randn(2, 5, 4)

    def recomputing(*inputs: Tensor) -> Tensor:
        out: Tensor = checkpoint(made, *inputs, use_reentrant=False)
        return out

    compiled = torch.compile(recomputing, fullgraph=True, backend="aot_eager")
    assert_close(run(made, x, noise, call=compiled), run(made, x, noise))


# Copies, meta device, functional use -------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))],
    ids=["copy", "pickle"],
)
def test_duplicates_train_alone(duplicate: Callable[[Any], Any], backend: str) -> None:
    made, x, noise = layer(attributes=1, experts=3), torch.randn(4, 64), torch.randn(1, 4, 3)
    before = run(made, x, noise)
    other = duplicate(made)
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in made.parameters()
    ]
    assert_same_bits(run(other, x, noise), before)
    with torch.no_grad():
        other.linear.weight.mul_(2)
        other.up.weight.mul_(2)
    assert not torch.equal(other(x, noise), before["out"])
    assert_same_bits(run(made, x, noise), before)


def test_starts_on_the_meta_device() -> None:
    with torch.device("meta"):
        made = AoMoALinear(nn.Linear(64, 48), rank=5)
        x = torch.randn(3, 64, requires_grad=True)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    made(x).sum().backward()  # shapes only: what size estimates and sharding planners do
    assert x.grad is not None
    assert x.grad.shape == x.shape
    made.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(torch.nan)
    made.linear.reset_parameters()
    made.reset_parameters()
    assert not made.linear.weight.requires_grad
    assert not made.gate.any()
    assert torch.equal(made.scaler, torch.ones(48))
    assert made.eval()(torch.randn(3, 64)).isfinite().all()


def test_functional_call(backend: str) -> None:
    made, x, noise = layer(), torch.randn(4, 64), torch.randn(2, 4, 4)
    others = {name: 0.5 * value.detach() for name, value in made.named_parameters()}
    leaf = others["down.weight"].requires_grad_()
    out = torch.func.functional_call(made, others, (x, noise))
    (found,) = torch.autograd.grad(out.square().sum(), leaf)
    halved = copy.deepcopy(made)
    halved.load_state_dict({name: value.detach() for name, value in others.items()})
    expected = run(halved, x, noise)
    assert torch.equal(out.detach(), expected["out"])
    assert torch.equal(found, expected["down.weight"])


# Sizes and layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attributes": 1},
        {"experts": 1, "top_k": 1},
        {"top_k": 4},
        {"attributes": 4, "rank": 7, "hidden": 3, "experts": 5, "top_k": 3},
    ],
    ids=str,
)
def test_options(options: dict[str, int], backend: str) -> None:
    made, x = layer(**options), torch.randn(2, 3, 64)
    noise = torch.randn(made.attributes, 6, made.experts)
    found = run(made, x, noise)
    with use_backend("eager"):
        exact = run(copy.deepcopy(made).double(), x.double(), noise.double())
    assert_close(found, exact)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64)])
def test_leading_dimensions(shape: tuple[int, ...], backend: str) -> None:
    made, x = layer().eval(), torch.randn(shape)
    out = made(x)
    assert out.shape == (*shape[:-1], 48)
    assert torch.equal(out.reshape(-1, 48), made(x.reshape(-1, 64)))


def test_non_contiguous_input(backend: str) -> None:
    made, noise = layer(), torch.randn(2, 6, 4)
    for x in (
        torch.randn(3, 2, 64).transpose(0, 1),
        torch.randn(2, 64, 3).transpose(1, 2),
        torch.randn(2, 3, 128)[..., ::2],
        torch.randn(2, 1, 64).expand(2, 3, 64),
    ):
        assert not x.is_contiguous()
        leaf = x.detach().requires_grad_()
        out = made(leaf, noise)
        out.square().sum().backward()
        assert leaf.grad is not None
        expected = run(made, x.contiguous(), noise)
        assert torch.equal(out.detach(), expected["out"])
        assert torch.equal(leaf.grad, expected["x"])
        made.zero_grad()


def test_no_tokens(backend: str) -> None:
    made = layer()
    found = run(made, torch.randn(0, 3, 64))
    assert found["out"].shape == (0, 3, 48)
    assert found["x"].shape == (0, 3, 64)
    assert all(not grad.any() for grad in found.values())


@pytest.mark.parametrize("bias", [True, False])
def test_parts_of_a_fused_layer_are_layers_of_their_own(bias: bool) -> None:
    """Three parts in one layer: three layers that share all but `linear`, `scaler` and `up`."""
    torch.manual_seed(0)
    parts, width = 3, 24
    fused = nn.Linear(16, parts * width, bias=bias, dtype=torch.float64)
    layer = AoMoALinear(fused, rank=5, hidden=3, parts=parts)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    noise = layer.draw_noise(14, x)
    out, gates, _ = layer.forward_with_routing(x, noise)

    up = layer.up.weight.unflatten(0, (parts, -1))  # [3, 12, r]
    expected = []
    for part in range(parts):
        rows = slice(part * width, (part + 1) * width)
        one = AoMoALinear(nn.Linear(16, width, bias=bias, dtype=torch.float64), rank=5, hidden=3)
        own = {
            "linear.weight": fused.weight[rows],
            "linear.bias": fused.bias[rows] if bias else None,
            "scaler": layer.scaler[rows],
            "up.weight": up[part],
        }
        shared = {name: p for name, p in layer.named_parameters() if name not in own}
        own = {name: value for name, value in own.items() if value is not None}
        expected.append(torch.func.functional_call(one, {**shared, **own}, (x, noise)))
    torch.testing.assert_close(out, torch.cat(expected, dim=-1))
    assert gates.shape == (2, 14, 4)

    grads = torch.autograd.grad(out.square().sum(), [x, layer.scaler, layer.up.weight])
    expected_grads = torch.autograd.grad(
        torch.cat(expected, dim=-1).square().sum(), [x, layer.scaler, layer.up.weight]
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    assert "parts=3" in repr(layer)


@pytest.mark.parametrize("parts", [0, 5])
def test_parts_are_checked(parts: int) -> None:
    with pytest.raises(ValueError, match=f"parts: got {parts}, expected a divisor of out_features"):
        AoMoALinear(nn.Linear(8, 24), parts=parts)
