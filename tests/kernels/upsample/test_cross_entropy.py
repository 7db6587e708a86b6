"""upsample_cross_entropy: against torch's own definition, and where that one gives NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.upsample import (
    UpsampleCrossEntropyLoss,
    check_labels,
    upsample_cross_entropy,
    upsample_cross_entropy_argmax,
)
from spectralx_kernels.upsample.prediction import UPSAMPLE_CROSS_ENTROPY
from spectralx_kernels.upsample.reference import REDUCTIONS
from tests.kernels import ladder
from tests.tolerances import ROUND_OFF


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, shape, generator=generator)


def ordinary(logits: Tensor, target: Tensor, align_corners: bool, **options: Any) -> Tensor:
    """The two calls that the operator replaces."""
    upsampled = F.interpolate(
        logits, size=target.shape[1:], mode="bilinear", align_corners=align_corners
    )
    return F.cross_entropy(upsampled, target.long(), **options)


def test_one_class_has_no_gradient() -> None:
    """Not even the round-off of a label and its smoothing, added over many pixels."""
    logits = draw(3, 1, 1, 5).float().requires_grad_()
    target = torch.zeros(3, 33, 40, dtype=torch.int64)
    for backend in _backends.available(UPSAMPLE_CROSS_ENTROPY.name, "cpu"):
        if backend == "triton":
            continue  # adds round-off up
        loss = upsample_cross_entropy(
            logits, target, label_smoothing=0.1, reduction="sum", backend=backend
        )
        (grad,) = torch.autograd.grad(loss, logits)
        assert not grad.any()


@pytest.mark.parametrize(
    ("reduction", "weighted", "label_smoothing", "with_gradient"),
    [
        ("none", False, 0.1, True),
        ("none", True, 0.1, False),
        ("mean", False, 0.0, True),
        ("mean", True, 0.1, True),
        ("mean", True, 0.1, False),
        ("sum", True, 0.0, True),
    ],
)
def test_ladder(
    reduction: str, weighted: bool, label_smoothing: float, with_gradient: bool
) -> None:
    weight = draw(3, seed=2).abs() if weighted else None
    target = labels(3, 2, 3, 4)
    code = REDUCTIONS.index(reduction)
    args = (
        draw(2, 3, 2, 2),
        target,
        weight,
        [3, 4],
        0,
        label_smoothing,
        code,
        False,
        with_gradient,
    )
    ladder.check_contract(UPSAMPLE_CROSS_ENTROPY, args)
    ladder.check_gradients(UPSAMPLE_CROSS_ENTROPY, args)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ladder.check_accuracy(UPSAMPLE_CROSS_ENTROPY, args, dtype)
    ladder.check_repeats(UPSAMPLE_CROSS_ENTROPY, args)


def test_compiles() -> None:
    def run(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits, target, weight=weight, ignore_index=0, label_smoothing=0.1
        )

    ladder.check_compiles(run, (draw(2, 4, 2, 3), labels(4, 2, 9, 5), draw(4).abs()))


@given(
    batch=st.integers(1, 3),
    classes=st.integers(1, 6),
    small=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    weighted=st.booleans(),
    ignore_index=st.sampled_from([-100, 0, 255]),
    label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    align_corners=st.booleans(),
    reference=st.booleans(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_equals_torch(
    batch: int,
    classes: int,
    small: tuple[int, int],
    size: tuple[int, int],
    weighted: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
    reference: bool,
) -> None:
    target = labels(classes, batch, *size)
    # Some pixels do not count, but the first always does: torch's mean over none is NaN.
    target[labels(3, batch, *size, seed=1) == 0] = ignore_index
    target[0, 0, 0] = classes - 1
    if ignore_index == classes - 1:
        ignore_index = -100
    options: dict[str, Any] = {
        "weight": draw(classes, seed=3).abs() + 0.1 if weighted else None,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    logits = draw(batch, classes, *small, seed=5) * 3

    def expected(values: Tensor) -> Tensor:
        return ordinary(values, target, align_corners, **options)

    def found(values: Tensor) -> Tensor:
        backend = "eager" if reference else None
        return upsample_cross_entropy(
            values, target, align_corners=align_corners, backend=backend, **options
        )

    exact = ladder.run_with_gradients(expected, ladder.cast([logits], torch.float64, grad=True))
    ours = ladder.run_with_gradients(found, ladder.cast([logits], torch.float64, grad=True))
    assert ours[0][0].shape == exact[0][0].shape
    # A single class has loss 0: absolute there.
    torch.testing.assert_close(ours[0][0], exact[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1]["argument 0"], exact[1]["argument 0"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_valid_is_zero_with_zero_gradient(
    reduction: str, label_smoothing: float, backend: str
) -> None:
    logits = draw(2, 3, 2, 2).to(ladder.widest(UPSAMPLE_CROSS_ENTROPY, backend)).requires_grad_()
    target = torch.full((2, 4, 4), 255)
    loss = upsample_cross_entropy(
        logits,
        target,
        ignore_index=255,
        reduction=reduction,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    assert (loss == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_classes_of_weight_zero_alone_are_zero(backend: str) -> None:
    logits = draw(1, 2, 2, 2).to(ladder.widest(UPSAMPLE_CROSS_ENTROPY, backend)).requires_grad_()
    weight = torch.tensor([0.0, 1.0]).to(logits)
    loss = upsample_cross_entropy(
        logits, torch.zeros(1, 4, 4, dtype=torch.int64), weight=weight, backend=backend
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_empty_batch(backend: str) -> None:
    logits = torch.zeros(0, 3, 2, 2, requires_grad=True)
    target = torch.zeros(0, 4, 4, dtype=torch.int64)
    loss = upsample_cross_entropy(logits, target, backend=backend)
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 3, 2, 2)
    none = upsample_cross_entropy(logits, target, reduction="none", backend=backend)
    assert none.shape == (0, 4, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    logits, target = draw(2, 3, 2, 2), labels(3, 2, 5, 5)
    target[0] = 255
    expected = upsample_cross_entropy(logits, target, ignore_index=255)
    assert torch.equal(upsample_cross_entropy(logits, target.to(dtype), ignore_index=255), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitudes_up_to_1e4_stay_finite(dtype: torch.dtype, backend: str) -> None:
    if backend not in _backends.available(UPSAMPLE_CROSS_ENTROPY.name, "cpu", dtype):
        pytest.skip(f"{backend} does not take {dtype} here")
    logits = (draw(2, 4, 3, 3) * 1e4).to(dtype).requires_grad_()
    loss = upsample_cross_entropy(logits, labels(4, 2, 7, 7), label_smoothing=0.1, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_nan_stays_nan(backend: str) -> None:
    logits = draw(1, 3, 2, 2).to(ladder.widest(UPSAMPLE_CROSS_ENTROPY, backend))
    logits[0, 1, 0, 0] = torch.nan
    assert upsample_cross_entropy(logits, labels(3, 1, 8, 8), backend=backend).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_wrong_label_nobody_looked_at_is_nan_in_loss_and_gradient(reduction: str) -> None:
    """Where the values cannot be looked at, as on a GPU: never a plausible number."""
    logits = draw(1, 3, 2, 2).requires_grad_()
    for wrong in (3, -1, 2**40):
        target = labels(3, 1, 4, 4)
        target[0, 1, 2] = wrong
        code = REDUCTIONS.index(reduction)
        loss = UPSAMPLE_CROSS_ENTROPY.reference(
            logits, target, None, [4, 4], -100, 0.0, code, False
        )
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isnan()
        assert grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_wrong_label_is_refused_by_name(reduction: str, dtype: torch.dtype, backend: str) -> None:
    logits, target = draw(2, 3, 2, 2).requires_grad_(), labels(3, 2, 9, 4).to(dtype)
    target[1, 8, 3] = 77
    message = "target: got label 77, expected 0 to 2 or ignore_index -100"
    with pytest.raises(ValueError, match=message):
        upsample_cross_entropy(logits, target, reduction=reduction, backend=backend)
    with pytest.raises(ValueError, match=message):
        upsample_cross_entropy_argmax(logits, target, reduction=reduction, backend=backend)


def test_autocast_computes_in_float32() -> None:
    logits, target = draw(2, 4, 3, 3).bfloat16().requires_grad_(), labels(4, 2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = upsample_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    expected = ordinary(logits.double(), target, False)
    assert abs(loss.item() - expected.item()) <= ROUND_OFF[torch.float32] * expected.item()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_module_holds_the_class_weights() -> None:
    weight = torch.tensor([0.0, 1.0, 2.0])
    module = UpsampleCrossEntropyLoss(weight, ignore_index=0, label_smoothing=0.1)
    assert torch.equal(module.state_dict()["weight"], weight)
    logits, target = draw(2, 3, 2, 2).float(), labels(3, 2, 5, 6)
    expected = ordinary(logits, target, False, weight=weight, ignore_index=0, label_smoothing=0.1)
    torch.testing.assert_close(module(logits, target), expected)


def test_check_labels_names_the_label() -> None:
    check_labels(torch.tensor([0, 4, 255]), 5, 255)
    check_labels(torch.zeros(0, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="mask: got label 5, expected 0 to 4 or ignore_index 255"):
        check_labels(torch.tensor([0, 5, 255], dtype=torch.uint8), 5, 255, name="mask")
    with pytest.raises(ValueError, match="target: got label -1, expected 0 to 4"):
        check_labels(torch.tensor([0, -1]), 5)
    with pytest.raises(TypeError, match=r"target: got dtype torch\.float32"):
        check_labels(torch.zeros(2), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4, 4)}, r"logits: got shape \[3, 4, 4\], expected \[batch, cl"),
        ({"logits": torch.zeros(2, 0, 4, 4)}, "logits: got shape .* expected classes"),
        ({"logits": torch.zeros(2, 3, 4, 4).long()}, "logits: got dtype torch.int64"),
        ({"target": torch.zeros(2, 8, 8)}, "target: got dtype torch.float32, expected an integer"),
        ({"target": torch.zeros(1, 8, 8).long()}, r"target: got shape \[1, 8, 8\], expected \[2"),
        ({"target": torch.full((2, 8, 8), 3)}, "target: got label 3, expected 0 to 2"),
        ({"target": torch.zeros(2, 8, 8, device="meta").long()}, "target: got device meta"),
        ({"size": (8, 9)}, r"target: got shape \[2, 8, 8\], expected \[2, 8, 9\]"),
        ({"target": torch.zeros(2, 0, 8).long()}, "size: got .* expected two integers"),
        ({"weight": torch.zeros(2)}, r"weight: got shape \[2\], expected \[3\]"),
        ({"weight": torch.zeros(3).long()}, "weight: got dtype torch.int64"),
        ({"label_smoothing": 1.5}, r"label_smoothing: got 1.5, expected 0.0 to 1.0"),
        ({"reduction": "median"}, "reduction: got 'median', expected one of none, mean, sum"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "logits": torch.zeros(2, 3, 4, 4),
        "target": torch.zeros(2, 8, 8).long(),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        upsample_cross_entropy(**{**good, **change})  # type: ignore[arg-type]
