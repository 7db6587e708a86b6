"""The room's Triton kernels in the interpreter, beyond one tile of pixels, classes and lines."""

from __future__ import annotations

import pytest
import torch

from spectralx_kernels import _backends

if "triton" not in _backends.available("upsample_argmax", "cpu"):
    pytest.skip("Triton's interpreter is not on", allow_module_level=True)

from spectralx_kernels._layouts import is_channels_last
from spectralx_kernels.upsample import confusion_matrix_update, upsample_cross_entropy
from spectralx_kernels.upsample import triton as kernels
from spectralx_kernels.upsample import triton_convolution as convolution
from spectralx_kernels.upsample import triton_norm as norm
from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D, UPSAMPLE_CONV2D_MOMENTS
from spectralx_kernels.upsample.prediction import (
    UPSAMPLE_ARGMAX_PROBABILITY,
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_CROSS_ENTROPY_ARGMAX,
)
from spectralx_kernels.upsample.reference import REDUCTIONS, channel_moments, resize
from spectralx_kernels.upsample.triton_axis import Axis
from tests.kernels import ladder
from tests.kernels.upsample.test_cross_entropy_argmax import draw, labels
from tests.tolerances import ROUND_OFF

# classes, small side, large side: up, down, one axis alone, not at all.
SIZES = {
    "up": (5, (4, 3), (9, 11)),
    "down": (9, (9, 13), (4, 5)),
    "up and down": (5, (2, 17), (13, 6)),
    "same": (6, (5, 7), (5, 7)),
    "same rows": (6, (4, 5), (4, 9)),
    "one row": (7, (1, 5), (8, 1)),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller than a GPU gets: many programs, and something left over in each dimension."""
    monkeypatch.setattr(kernels, "_TILE", 128)
    monkeypatch.setattr(kernels, "_MOST_CLASSES", 4)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", SIZES)
def test_beyond_one_tile(size: str) -> None:
    classes, small, large = SIZES[size]
    logits, target = draw(1, classes, *small) * 3, labels(classes, 1, *large)
    weight = draw(classes, seed=2).abs() + 0.1
    for reduction, align_corners in (("mean", False), ("none", True)):
        code = REDUCTIONS.index(reduction)
        args = (logits, target, weight, [*large], 0, 0.1, code, align_corners, True)
        ladder.check_accuracy(UPSAMPLE_CROSS_ENTROPY, args, torch.float32)
    args = (logits, [*large], False)  # type: ignore[assignment]
    ladder.check_accuracy(UPSAMPLE_ARGMAX_PROBABILITY, args, torch.float32)


@pytest.mark.parametrize("by_taps", [False, True], ids=["map", "taps"])
@pytest.mark.parametrize(
    ("small", "size", "kernel", "padding"),
    [
        ((2, 3), (4, 5), (3, 3), (2, 1)),
        ((6, 7), (3, 4), (1, 3), (0, 1)),
        ((1, 3), (1, 3), (1, 1), (0, 0)),
    ],
    ids=["up", "down", "same"],
)
def test_convolution_beyond_one_tile(
    small: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    padding: tuple[int, int],
    by_taps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolution, "_POSITIONS", 4)
    monkeypatch.setattr(convolution, "_CHANNELS", 4)
    sides = [n + 2 * p - k + 1 for n, p, k in zip(size, padding, kernel, strict=True)]
    x, weight, bias = draw(1, 2, *small), draw(3, 2, *kernel, seed=1), draw(3, seed=2)
    addend = draw(1, 3, *sides, seed=3)
    for relu, align_corners, maps in (
        (True, False, x),
        (False, True, x.to(memory_format=torch.channels_last)),
    ):
        args = (maps, weight, bias, addend, [*size], [*padding], align_corners, by_taps, relu)
        ladder.check_accuracy(UPSAMPLE_CONV2D, args, torch.float32)
        out = convolution.upsample_conv2d(*ladder.cast(args, torch.float32))
        assert is_channels_last(out) == is_channels_last(maps)
    ladder.check_accuracy(UPSAMPLE_CONV2D_MOMENTS, args[:-1], torch.float32)


def test_a_strided_bias_is_read_right() -> None:
    x, weight, bias = draw(1, 3, 2, 4).float(), draw(5, 3, 3, 3).float(), draw(10).float()
    args = (x, weight, bias[::2], None, [4, 8], [1, 1], False, True, False)
    found, wanted = (UPSAMPLE_CONV2D(*args, backend=name) for name in ("triton", "eager"))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("area", [(3, 7), (5, 5)])
def test_moments_of_many_parts(area: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a part, several parts a group, several groups; the last of each not full."""
    for name, value in {"_PIXELS": 2, "_CHANNELS": 2, "_LEAST": 4, "_JOINED": 2}.items():
        monkeypatch.setattr(norm, name, value)
    x = draw(3, 3, *area) + 2
    error = ladder.relative_error(norm.channel_moments(x.float()), channel_moments(x))
    assert error <= ROUND_OFF[torch.float32]


@pytest.mark.usefixtures("small_tiles")
def test_counts_by_program_and_by_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, target = labels(5, 2, 7, 9), labels(5, 2, 7, 9, seed=1)
    expected = torch.bincount((target * 5 + prediction).flatten(), minlength=25).view(5, 5)
    expected[2] = 0
    start = labels(9, 5, 5, seed=2)
    for bins in (4096, 0):
        monkeypatch.setattr(kernels, "_MOST_BINS", bins)
        monkeypatch.setattr(kernels, "_SPAN", 32)
        found = confusion_matrix_update(start, prediction, target, 2, backend="triton")
        assert torch.equal(found, start + expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_wrong_label_nobody_looked_at_is_nan(reduction: str) -> None:
    """As in the reference, which a GPU cannot look at either: its pixel, and no memory outside."""
    for wrong in (3, -1, 2**40):
        target = labels(3, 1, 4, 4)
        target[0, 1, 2] = wrong
        args = ladder.cast(
            (draw(1, 3, 2, 2), target, None, [4, 4], -100, 0.1, REDUCTIONS.index(reduction), False),
            torch.float32,
            grad=True,
        )
        ours = ladder.run_with_gradients(
            lambda *v: UPSAMPLE_CROSS_ENTROPY.triton_op(*v, True)[0], args
        )
        args = ladder.cast(args, torch.float32, grad=True)
        theirs = ladder.run_with_gradients(UPSAMPLE_CROSS_ENTROPY.reference, args)
        torch.testing.assert_close(ours[0][0], theirs[0][0], equal_nan=True)
        torch.testing.assert_close(ours[1], theirs[1], equal_nan=True)


def test_gradient_is_kept_or_made_again() -> None:
    """Backward of a loss that is one number, with and without the gradient of the forward pass."""
    args = ladder.cast(
        (draw(2, 4, 3, 3), labels(4, 2, 7, 5), None, None, [7, 5], 0, 0.0, 1, False), torch.float32
    )
    mask = [True] + [False] * 9
    loss, _, _, gradient = kernels.upsample_cross_entropy_argmax(*args, True)
    assert kernels.upsample_cross_entropy_argmax(*args, False)[3].shape == (0,)
    grads = [torch.full((), 3.0), None, None]
    (kept,) = kernels.upsample_cross_entropy_argmax_backward(grads, *args, True, [gradient], mask)
    (made,) = kernels.upsample_cross_entropy_argmax_backward(
        grads, *args, False, [gradient.new_empty(0)], mask
    )
    torch.testing.assert_close(kept, made)
    assert loss.isfinite()
    assert UPSAMPLE_CROSS_ENTROPY_ARGMAX.triton_module == kernels.__name__


@pytest.mark.parametrize("align_corners", [False, True])
def test_positions_are_those_of_interpolate(align_corners: bool) -> None:
    for length in range(1, 8):
        for size in range(1, 20):
            line = torch.arange(length).double().reshape(1, 1, length, 1)
            expected = resize(line, [size, 1], align_corners).flatten()
            axis = Axis.of(length, size, align_corners)
            at = torch.tensor([max(i * axis.a + axis.b, 0) for i in range(size)]).double() / axis.d
            torch.testing.assert_close(at.clamp_max(length - 1), expected)


def test_sides_beyond_32_bits_are_refused() -> None:
    logits = torch.zeros(1, 1, 1, 2**15)
    target = torch.zeros(1, 1, 2**16).byte()
    with pytest.raises(ValueError, match="size: got 65536 from 32768, expected a product below"):
        upsample_cross_entropy(logits, target, backend="triton")
