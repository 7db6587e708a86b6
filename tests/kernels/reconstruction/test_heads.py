"""The prediction heads' operators: the proof ladder, and against modules one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectralx_kernels import channel_norm, channel_norm_conv2d, pixel_head
from spectralx_kernels.reconstruction.heads import CHANNEL_NORM, CHANNEL_NORM_CONV2D, PIXEL_HEAD
from tests.kernels import ladder

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Before and after the norm.
ACTIVATIONS = [("none", "leaky_relu"), ("gelu", "none"), ("none", "gelu"), ("relu", "relu")]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def norm_arguments(
    shape: tuple[int, ...] = (2, 5, 3, 4), before: str = "none", after: str = "none",
    *, addend: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    x, more = draw(*shape) + 0.3, draw(*shape, seed=1) if addend else None
    vectors = draw(shape[1], seed=2), draw(shape[1], seed=3)
    return x, more, *vectors, 1e-6, before, after, 0.5


def conv_arguments(
    before: str = "none", after: str = "none", *, transposed: bool = False, norm: bool = True,
    bias: bool = True, channels: int = 5, batch: int = 2,
) -> tuple[Any, ...]:  # fmt: skip
    x = draw(batch, channels, 4, 3) + 0.3
    vectors = (draw(channels, seed=2), draw(channels, seed=3)) if norm else (None, None)
    shape = (channels, 3, 4, 4) if transposed else (3, channels, 3, 3)
    weight = draw(*shape, seed=4) / 6
    sides = ([2, 2], [1, 1]) if transposed else ([1, 1], [1, 1])
    return (x, *vectors, 1e-6, before, after, weight, draw(3, seed=5) if bias else None,
            transposed, *sides)  # fmt: skip


def head_arguments(
    size: tuple[int, int] = (3, 2), *, batch: int = 2, ins: int = 5, wide: int = 6, mixed: int = 3,
    bands: int = 2, up: int = 2, down: int = 2, keep: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    half = wide // 2
    return (
        draw(batch, ins, *size), draw(ins, wide, up, up, seed=1) / 2, draw(wide, seed=2),
        draw(half, 2, 3, 3, seed=3) / 3, draw(half, seed=4), draw(mixed, half, 1, 1, seed=5),
        draw(mixed, seed=6), draw(mixed, bands, down, down, seed=7), draw(bands, seed=8), keep,
    )  # fmt: skip


@pytest.mark.parametrize("addend", [True, False])
def test_ladder_of_the_norm(addend: bool) -> None:
    args = norm_arguments(before="gelu", after="leaky_relu", addend=addend)
    ladder.check_contract(CHANNEL_NORM, args)
    ladder.check_gradients(CHANNEL_NORM, args)
    ladder.check_repeats(CHANNEL_NORM, args)


@pytest.mark.parametrize("transposed", [True, False])
def test_ladder_of_the_convolution(transposed: bool) -> None:
    args = conv_arguments("gelu", "leaky_relu", transposed=transposed)
    ladder.check_contract(CHANNEL_NORM_CONV2D, args)
    ladder.check_gradients(CHANNEL_NORM_CONV2D, args)
    ladder.check_repeats(CHANNEL_NORM_CONV2D, args)


@pytest.mark.parametrize("keep", [True, False])
def test_ladder_of_the_pixels(keep: bool) -> None:
    args = head_arguments((2, 2), batch=1, ins=3, wide=4, keep=keep)
    ladder.check_contract(PIXEL_HEAD, args)
    ladder.check_gradients(PIXEL_HEAD, args)
    ladder.check_repeats(PIXEL_HEAD, head_arguments(keep=keep))


def test_strided_weights_of_a_norm_are_read_right(backend: str) -> None:
    x, weights = draw(2, 5, 4, 3).float(), draw(5, 2, seed=2).float()
    pair = weights[:, 0], weights[:, 1]
    for operator, args in (
        (CHANNEL_NORM, (x, None, *pair, 1e-6, "none", "gelu", 1.0)),
        (CHANNEL_NORM_CONV2D, (x, *pair, *ladder.cast(conv_arguments(), torch.float32)[3:])),
    ):
        found, wanted = (operator(*args, backend=name) for name in (backend, "eager"))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("before", "after"), ACTIVATIONS)
def test_norms_agree(before: str, after: str, dtype: torch.dtype) -> None:
    """Alone, before either convolution; channels that fill vectors and those that do not."""
    for channels in (3, 48):
        ladder.check_accuracy(
            CHANNEL_NORM, norm_arguments((2, channels, 3, 5), before, after), dtype
        )
    for transposed in (True, False):
        args = conv_arguments(before, after, transposed=transposed, channels=17)
        ladder.check_accuracy(CHANNEL_NORM_CONV2D, args, dtype)
    ladder.check_accuracy(
        CHANNEL_NORM_CONV2D, conv_arguments(before, after, norm=False, bias=False), dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_agree(dtype: torch.dtype) -> None:
    """Strides of one, two and four; one row, several strips; channels beyond one tile."""
    sizes: list[dict[str, Any]] = [
        {"size": (1, 1), "up": 4, "down": 1},
        {"size": (7, 1), "up": 1, "keep": False},
        {"size": (3, 5), "up": 4, "wide": 70, "mixed": 33, "batch": 1},
        {"size": (2, 3), "up": 3, "down": 3, "wide": 2},
        {"size": (2, 3), "up": 3, "down": 3, "wide": 10, "keep": False},
    ]
    for size in sizes:
        ladder.check_accuracy(PIXEL_HEAD, head_arguments(**size), dtype)


@pytest.mark.parametrize(("up", "keep"), [(1, True), (2, False), (2, True), (4, False)])
def test_a_map_of_many_strips(up: int, keep: bool) -> None:
    """Wide lines: the C++ kernels take three rows at a time here and carry lines over."""
    sizes: dict[str, Any] = {
        "ins": 3,
        "wide": 4096 // up**2,
        "mixed": 2,
        "bands": 1,
        "up": up,
        "keep": keep,
    }
    args = head_arguments((8, 40), batch=1, **sizes)
    results = [
        ladder.run_with_gradients(run, ladder.cast(args, torch.float64, grad=True))
        for run in (PIXEL_HEAD, PIXEL_HEAD.reference)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("keep", [True, False])
def test_pixels_without_a_gradient(keep: bool) -> None:
    """A loss of some patches alone: runs of pixels in a line, lines without any, none at all."""
    args = head_arguments((4, 5), wide=38, mixed=7, bands=1, keep=keep)
    scored = torch.zeros(2, 1, 16, 20, dtype=torch.float64)
    scored[:, :, 4:8] = scored[1, :, 12:, 3:6] = scored[1, :, 15, 19] = 1
    for weight in (scored, torch.zeros_like(scored)):

        def masked(run: Any, weight: Tensor = weight) -> Any:
            return lambda *given: run(*given) * weight

        found, exact = (
            ladder.run_with_gradients(masked(run), ladder.cast(args, torch.float64, grad=True))[1]
            for run in (PIXEL_HEAD, PIXEL_HEAD.reference)
        )
        torch.testing.assert_close(found, exact)
    assert not any(grad.any() for grad in found.values())


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)), half=st.integers(1, 20),
    up=st.integers(1, 4), down=st.integers(1, 3), batch=st.integers(0, 2), keep=st.booleans(),
)  # fmt: skip
def test_any_size(half: int, **sizes: Any) -> None:
    args = head_arguments(wide=2 * half, **sizes)
    found, grads = ladder.run_with_gradients(
        PIXEL_HEAD, ladder.cast(args, torch.float64, grad=True)
    )
    exact, exact_grads = ladder.run_with_gradients(
        PIXEL_HEAD.reference, ladder.cast(args, torch.float64, grad=True)
    )
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(grads, exact_grads)


@pytest.mark.parametrize("frozen", [range(1, 7), range(1, 9), [0], [0, 1, 2, 3, 4], range(7)])
def test_only_what_is_wanted(frozen: Any, backend: str) -> None:
    """Gradients of some arguments are those of all."""
    dtype = ladder.widest(PIXEL_HEAD, backend)
    args = head_arguments()
    every = ladder.cast(args, dtype, grad=True)
    some = ladder.cast(args, dtype, grad=True, constants=list(frozen))
    results = [
        ladder.run_with_gradients(lambda *v: PIXEL_HEAD(*v, backend=backend), each)[1]
        for each in (every, some)
    ]
    assert results[1].keys() == {f"argument {i}" for i in range(9) if i not in frozen}
    for name, grad in results[1].items():
        torch.testing.assert_close(grad, results[0][name])
    args = conv_arguments()
    for constants in ([0], [1, 2], [6, 7], [0, 1, 2], [0, 6]):
        leaves = ladder.cast(args, dtype, grad=True, constants=constants)
        grads = ladder.run_with_gradients(
            lambda *v: CHANNEL_NORM_CONV2D(*v, backend=backend), leaves
        )[1]
        whole = ladder.run_with_gradients(
            CHANNEL_NORM_CONV2D.reference, ladder.cast(args, dtype, grad=True)
        )[1]
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole[name])


def test_like_modules_one_after_another(backend: str) -> None:
    """The public functions, on maps in either layout; results are channels last."""
    dtype = ladder.widest(CHANNEL_NORM, backend)
    norm, convolution = nn.LayerNorm(6, eps=1e-3), nn.ConvTranspose2d(6, 4, 4, 2, 1)
    norm, convolution = norm.to(dtype), convolution.to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = draw(2, 6, 5, 3).to(dtype).contiguous(memory_format=layout)
        normed = norm(F.gelu(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out = channel_norm(x, norm, before="gelu", addend=x, scale=2.0, backend=backend)
        torch.testing.assert_close(out, normed + 2 * x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        out = channel_norm_conv2d(x, norm, convolution, before="gelu", backend=backend)
        torch.testing.assert_close(out, convolution(normed))
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_compiles_and_autocasts() -> None:
    norm, convolution = nn.LayerNorm(5), nn.Conv2d(5, 3, 3, padding=1)

    def run(x: Tensor) -> Tensor:
        return channel_norm_conv2d(channel_norm(x, norm, after="gelu", addend=x), norm, convolution)

    ladder.check_compiles(run, (draw(2, 5, 4, 3),), compiler="aot_eager")
    ladder.check_compiles(PIXEL_HEAD, head_arguments(), compiler="aot_eager")
    args = ladder.cast(head_arguments(), torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(draw(2, 5, 4, 3).float()).dtype == torch.bfloat16
        out = PIXEL_HEAD(*args)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(arg.grad.dtype == torch.float32 for arg in args[:-1])


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept(keep: bool, backend: str) -> None:
    """Beside the inputs the first convolution's map, or nothing."""
    dtype = ladder.widest(PIXEL_HEAD, backend)
    *args, _ = ladder.cast(head_arguments(), dtype, grad=True)
    pairs = [(args[place], args[place + 1]) for place in range(1, 9, 2)]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pixel_head(args[0], *pairs, keep=keep, backend=backend)
    known = {arg.data_ptr() for arg in args}
    more = sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in known)
    if backend != "eager":
        assert more == (args[0][:, :1].numel() * args[1][0].numel() if keep else 0)
    with torch.no_grad():
        assert PIXEL_HEAD.op(*args, False)[1].numel() == 0


def test_an_addend_is_not_held() -> None:
    """Its gradient needs its layout alone, which it keeps."""
    x, norm = draw(2, 5, 30, 40).float().requires_grad_(), nn.LayerNorm(5)
    for layout in (torch.channels_last, torch.contiguous_format):
        addend = draw(2, 5, 30, 40, seed=1).float().contiguous(memory_format=layout)
        addend.requires_grad_()
        held: list[int] = []

        def keep(tensor: Tensor, held: list[int] = held) -> Tensor:
            held.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = channel_norm(x, norm, addend=addend, scale=0.5, backend="cpp")
        assert sum(held) < x.nbytes + addend.nbytes / 10
        (grad,) = torch.autograd.grad(out.sum(), addend)
        assert grad.stride() == addend.stride()
        assert (grad == 0.5).all()


def test_nan_and_infinity(backend: str) -> None:
    """A position that is not a number stays one, and no other becomes one."""
    x = draw(1, 5, 3, 4).float()
    x[0, 2, 1, 2], x[0, 1, 0, 0] = torch.nan, torch.inf
    for after in ("none", "gelu", "relu", "leaky_relu"):
        out = channel_norm(x, nn.LayerNorm(5), after=after, backend=backend)  # type: ignore[arg-type]
        wrong = out.isnan().any(1)[0]
        assert wrong.nonzero().tolist() == [[0, 0], [1, 2]]
    args = ladder.cast(head_arguments((6, 6), batch=1), torch.float32)
    args[0][0, 0, 0, 0] = torch.nan
    out = PIXEL_HEAD(*args, backend=backend)
    assert out.isnan()[..., :4, :4].all()
    # Four pixels come of a line, two lines of a row, and the 3x3 convolution reaches one line on.
    assert out[..., 6:, :].isfinite().all()
    assert out[..., :, 6:].isfinite().all()


def test_large_values_cancel_nothing(backend: str) -> None:
    """Deviations are squared, not values."""
    x = (draw(1, 16, 4, 4) + 1e3).float()
    out = channel_norm(x, nn.LayerNorm(16), backend=backend).double()
    exact = channel_norm(x.double(), nn.LayerNorm(16).double(), backend="eager")
    assert ladder.relative_error(out, exact) < 1e-3


def test_empty_batches(backend: str) -> None:
    args = ladder.cast(head_arguments(batch=0), torch.float32, grad=True)
    out = PIXEL_HEAD(*args, backend=backend)
    assert out.shape == (0, 2, 12, 8)
    out.sum().backward()
    assert all(not arg.grad.any() for arg in args[:-1])
    args = ladder.cast(conv_arguments(batch=0), torch.float32, grad=True)
    out = CHANNEL_NORM_CONV2D(*args, backend=backend)
    assert out.shape == (0, 3, 4, 3)
    out.sum().backward()
    assert not args[6].grad.any()


def test_checked() -> None:
    x, norm = draw(2, 5, 3, 4).float(), nn.LayerNorm(5)
    with pytest.raises(ValueError, match=r"x: got shape \[2, 5, 3, 4\], expected \[2, 6, height"):
        channel_norm(x, nn.LayerNorm(6))
    with pytest.raises(ValueError, match="after: got 'tanh', expected one of none, gelu"):
        channel_norm(x, norm, after="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm: got one without weight or bias"):
        channel_norm(x, nn.LayerNorm(5, elementwise_affine=False))
    with pytest.raises(ValueError, match=r"addend: got shape \[2, 5, 3, 3\]"):
        channel_norm(x, norm, addend=x[..., :3])
    with pytest.raises(ValueError, match=r"convolution: got Conv2d\(5, 5, .*, expected zero"):
        channel_norm_conv2d(x, norm, nn.Conv2d(5, 5, 3, groups=5))
    with pytest.raises(ValueError, match=r"x: got shape \[2, 5, 3, 4\], expected \[2, 4, height"):
        channel_norm_conv2d(x, None, nn.Conv2d(4, 5, 3))
    args = ladder.cast(head_arguments(), torch.float32)
    pairs = [(args[place], args[place + 1]) for place in range(1, 9, 2)]
    with pytest.raises(ValueError, match="weight of mix: got shape"):
        pixel_head(args[0], pairs[0], pairs[1], pairs[3], pairs[3])
    with pytest.raises(TypeError, match=r"bias of project: got dtype torch\.float64"):
        pixel_head(args[0], pairs[0], pairs[1], pairs[2], (pairs[3][0], pairs[3][1].double()))
