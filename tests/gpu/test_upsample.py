"""The upsampling operators on a GPU: the proof ladder, labels, graphs, no synchronisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx.decoder import UPerNet, set_plain
from spectralx_kernels import (
    batch_norm_relu,
    confusion_matrix_update,
    upsample_argmax,
    upsample_conv2d,
    upsample_cross_entropy_argmax,
    use_backend,
)
from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D, UPSAMPLE_CONV2D_MOMENTS
from spectralx_kernels.upsample.prediction import (
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_CROSS_ENTROPY_ARGMAX,
)
from spectralx_kernels.upsample.reference import REDUCTIONS
from tests.gpu.watching import no_synchronisation
from tests.kernels import ladder
from tests.kernels.upsample.test_cross_entropy_argmax import SIZES, arguments, draw, labels
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

OPERATOR = UPSAMPLE_CONV2D
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The class weights: only the reference differentiates them on a GPU.
WEIGHT = (2,)

# batch, channels, outputs, small side, large side, kernel
CONVOLUTIONS = {
    "odd": (3, 17, 130, (5, 3), (11, 13), (3, 3)),
    "1 x 1": (5, 5, 3, (4, 4), (8, 6), (1, 1)),
    "5 x 5": (1, 3, 70, (7, 5), (9, 16), (5, 5)),
    "3 x 5, down": (2, 4, 66, (40, 33), (30, 10), (3, 5)),
    "14 to 56": (2, 64, 96, (14, 14), (56, 56), (3, 3)),
    "no images": (0, 4, 3, (2, 2), (4, 4), (3, 3)),
}


def convolution(
    size: str, *, by_taps: bool, relu: bool = False, align_corners: bool = False, last: bool = False
) -> tuple[Any, ...]:
    """Arguments of the operator; `last`: maps and weight are channels last."""
    batch, channels, outs, small, large, kernel = CONVOLUTIONS[size]
    layout = torch.channels_last if last else torch.contiguous_format
    x = draw(batch, channels, *small).contiguous(memory_format=layout)
    weight = draw(outs, channels, *kernel, seed=1) / (channels * kernel[0] * kernel[1]) ** 0.5
    padding = [kernel[0] // 2, kernel[1] // 2]
    addend = None
    if relu:  # far from 0, where rounding alone would switch a gradient on or off
        addend = 8 * draw(batch, outs, *large, seed=3).sign().contiguous(memory_format=layout)
    weight = weight.contiguous(memory_format=layout)
    return (
        x, weight, draw(outs, seed=2), addend, [*large], padding, align_corners, by_taps, relu,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_taps", [False, True], ids=["map", "taps"])
@pytest.mark.parametrize("size", CONVOLUTIONS)
def test_convolution(size: str, by_taps: bool, dtype: torch.dtype) -> None:
    for relu, align_corners, last in ((False, False, False), (True, True, True)):
        args = convolution(size, by_taps=by_taps, relu=relu, align_corners=align_corners, last=last)
        ladder.check_accuracy(UPSAMPLE_CONV2D, args, dtype, "cuda")


def test_convolution_repeats() -> None:
    for last in (False, True):
        args = convolution("14 to 56", by_taps=True, relu=True, last=last)
        ladder.check_repeats(UPSAMPLE_CONV2D, args, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_taps", [False, True], ids=["map", "taps"])
@pytest.mark.parametrize("size", ["odd", "1 x 1", "14 to 56", "no images"])
def test_moments_of_a_convolution(size: str, by_taps: bool, dtype: torch.dtype) -> None:
    for last in (False, True):
        args = convolution(size, by_taps=by_taps, last=last)[:-1]
        ladder.check_accuracy(UPSAMPLE_CONV2D_MOMENTS, args, dtype, "cuda")
    if by_taps:  # the bits of "map" are as the vendor's convolutions give them
        ladder.check_repeats(UPSAMPLE_CONV2D_MOMENTS, args, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 70, 9, 7), (2, 512, 56, 56), (9, 8, 100, 100)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """Output, gradients and running statistics against the module in float64; the same bits."""
    channels = shape[1]
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(draw(channels, seed=1))
        norm.bias.copy_(draw(channels, seed=2))
    upstream = draw(*shape, seed=9).to(dtype)

    def outcome(x: Tensor, own: nn.BatchNorm2d, *, ours: bool) -> list[Tensor]:
        x = x.detach().requires_grad_()
        out = batch_norm_relu(x, own, backend=backend) if ours else F.relu(own(x))
        grads = torch.autograd.grad(out, (x, own.weight, own.bias), upstream.to(out))
        assert own.running_mean is not None
        assert own.running_var is not None
        return [each.cpu() for each in (out, own.running_mean, own.running_var, *grads)]

    for layout in (torch.contiguous_format, torch.channels_last):
        x = (draw(*shape) * 2 + 3).to(dtype).contiguous(memory_format=layout)
        exact = outcome(x.double(), copy.deepcopy(norm).double(), ours=False)
        plain = outcome(x, copy.deepcopy(norm), ours=False)
        found, again = (outcome(x.cuda(), copy.deepcopy(norm).cuda(), ours=True) for _ in range(2))
        assert found[0].is_contiguous(memory_format=layout)
        for place, (one, own, truth, other) in enumerate(
            zip(found, plain, exact, again, strict=True)
        ):
            assert torch.equal(one, other)
            factor = FORWARD_FACTOR if place < 3 else BACKWARD_FACTOR
            bound = factor * ladder.relative_error(own, truth) + ROUND_OFF[dtype]
            assert ladder.relative_error(one, truth) <= bound, place


@pytest.mark.parametrize("size", SIZES)
def test_loss(size: str) -> None:
    for reduction, align_corners in (("mean", False), ("none", True)):
        args = arguments(size, reduction=reduction, align_corners=align_corners, batch=1)
        for dtype in DTYPES:
            loss_alone = (*args[:3], *args[4:])
            ladder.check_accuracy(UPSAMPLE_CROSS_ENTROPY, loss_alone, dtype, "cuda", WEIGHT)


@pytest.mark.parametrize("size", ["paper", "narrow", "up and down", "many classes"])
def test_loss_repeats(size: str) -> None:
    ladder.check_repeats(UPSAMPLE_CROSS_ENTROPY_ARGMAX, arguments(size), "cuda", WEIGHT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_and_probability(size: str, dtype: torch.dtype, backend: str) -> None:
    """The class is the largest of the upsampled logits, to round-off; ties go to the lowest."""
    classes, small, large = SIZES[size]
    logits = (draw(2, classes, *small) * 3).to(dtype)
    exact = F.interpolate(logits.double(), size=large, mode="bilinear", align_corners=False)
    best = exact.max(dim=1).values
    label, probability = upsample_argmax(
        logits.cuda(), large, return_probability=True, backend=backend
    )
    assert torch.equal(label, upsample_argmax(logits.cuda(), large, backend=backend))
    chosen = exact.gather(1, label.cpu()[:, None])[:, 0]
    assert float((best - chosen).max()) <= ROUND_OFF[torch.float32] * float(exact.abs().max())
    expected = exact.softmax(dim=1).max(dim=1).values
    if backend == "eager":  # torch finds the positions in float32
        torch.testing.assert_close(probability.cpu().double(), expected, rtol=2e-2, atol=0)
        return
    assert ladder.relative_error(probability.cpu(), expected) <= 2 * ROUND_OFF[dtype]
    flat = torch.zeros(1, classes, 3, 3, dtype=dtype, device="cuda")
    assert (upsample_argmax(flat, (7, 5), backend=backend) == 0).all()


@pytest.mark.parametrize("size", ["paper", "narrow", "many classes"])
def test_confusion_matrix(size: str, backend: str) -> None:
    classes, small, large = SIZES[size]
    logits, target = draw(2, classes, *small).float().cuda(), labels(classes, 2, *large).cuda()
    start = labels(9, classes, classes, seed=3).cuda()
    found = upsample_cross_entropy_argmax(
        logits, target, ignore_index=0, confusion=start, backend=backend
    )
    seen = target != 0
    pairs = target[seen] * classes + found.label[seen]
    expected = start + torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    assert found.confusion is not None
    assert torch.equal(found.confusion, expected)
    again = confusion_matrix_update(start, found.label, target, 0, backend=backend)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("wrong", [9, -1, 2**40])
def test_a_wrong_label_nobody_looked_at_is_nan(wrong: int, backend: str) -> None:
    target = labels(9, 1, 20, 20)
    target[0, 1, 2] = wrong
    with torch.no_grad():
        args = (
            draw(1, 9, 5, 5).float().cuda(),
            target.cuda(),
            None,
            [20, 20],
            -100,
            0.0,
            REDUCTIONS.index("none"),
        )
        loss = UPSAMPLE_CROSS_ENTROPY(*args, False, False, backend=backend)
    assert loss.isnan().sum() == 1
    assert loss[0, 1, 2].isnan()


def step(logits: Tensor, target: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    """A convolution with batch norm, the loss of it with its labels, and gradients."""
    norm = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    made = upsample_conv2d(logits, weight, size=20, norm=norm, backend=backend, algorithm="taps")
    confusion = torch.zeros(6, 6, dtype=torch.int64, device="cuda")
    found = upsample_cross_entropy_argmax(made, target, confusion=confusion, backend=backend)
    grads = torch.autograd.grad(found.loss, (logits, weight))
    assert found.confusion is not None
    return [found.loss, found.label, found.confusion, *grads]


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_without_synchronisation(dtype: torch.dtype, backend: str) -> None:
    logits = draw(2, 8, 5, 5).to("cuda", dtype).requires_grad_()
    weight = draw(6, 8, 3, 3, seed=1).to("cuda", dtype).requires_grad_()
    target = labels(6, 2, 40, 40).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(logits, target, weight, backend)
    torch.cuda.current_stream().wait_stream(side)
    with no_synchronisation():
        step(logits, target, weight, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, target, weight, backend)
    for seed in range(2):
        with torch.no_grad():
            logits.copy_(draw(2, 8, 5, 5, seed=seed))
        graph.replay()
        for found, expected in zip(captured, step(logits, target, weight, backend), strict=True):
            if backend == "eager":  # torch's upsampling adds with atomics
                torch.testing.assert_close(found, expected)
            else:
                assert torch.equal(found, expected)


@pytest.mark.parametrize("training", [False, True])
def test_decoder_against_the_plain_path(training: bool, backend: str) -> None:
    torch.manual_seed(0)
    model = UPerNet([32] * 4, 5, head_channels=16, dropout=0.0).cuda().train(training)
    model.head.psp_modules[0].eval()  # where two values are averaged nothing can be compared
    maps = [torch.randn(2, 32, 6, 6, device="cuda", requires_grad=True) for _ in range(4)]
    leaves = [*maps, *model.parameters()]
    results = []
    for plain in (True, False):
        set_plain(model, plain)
        with use_backend(backend, required=False):
            out = model(maps)
            upstream = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
            results.append([out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True)])
    # A bias before batch statistics has no gradient but round-off.
    least = max(float(value.abs().max()) for value in results[0][1:] if value is not None) * 1e-3
    for found, expected in zip(*results, strict=True):
        if expected is not None:
            scale = max(float(expected.abs().max()), least)
            assert float((found - expected).abs().max()) <= 1e-4 * scale
