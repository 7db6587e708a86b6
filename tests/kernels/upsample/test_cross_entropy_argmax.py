"""upsample_cross_entropy_argmax: the three operators it joins, and what the CPU kernels add.

Sizes, threads, instruction sets and strides are tried here for loss and prediction at once: they
share one pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.upsample import (
    confusion_matrix_update,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_cross_entropy_argmax,
)
from spectralx_kernels.upsample.prediction import (
    UPSAMPLE_ARGMAX_PROBABILITY,
    UPSAMPLE_CROSS_ENTROPY_ARGMAX,
)
from spectralx_kernels.upsample.reference import REDUCTIONS
from tests.kernels import ladder
from tests.kernels.aomoa.test_aomoa import ROOT

# classes, small side, large side: narrower and wider than the lanes; up, down, both, not at all.
SIZES: dict[str, tuple[int, tuple[int, int], tuple[int, int]]] = {
    "paper": (9, (56, 56), (224, 224)),
    "wide": (3, (20, 37), (31, 149)),
    "narrow": (25, (5, 3), (61, 50)),
    "down": (4, (40, 90), (11, 17)),
    "little down": (4, (33, 40), (30, 29)),
    "up and down": (5, (3, 70), (50, 30)),
    "same": (6, (19, 35), (19, 35)),
    "same rows": (6, (19, 12), (19, 35)),
    "one row": (7, (1, 18), (40, 1)),
    "one pixel": (3, (1, 1), (17, 19)),
    "many classes": (512, (3, 4), (7, 9)),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, shape, generator=generator)


def arguments(
    size: str, *, reduction: str = "mean", align_corners: bool = False, batch: int = 2
) -> tuple[Any, ...]:
    classes, small, large = SIZES[size]
    target = labels(classes, batch, *large)
    weight = draw(classes, seed=2).abs() + 0.1
    confusion = labels(9, classes, classes, seed=3)
    code = REDUCTIONS.index(reduction)
    logits = draw(batch, classes, *small) * 3
    return (logits, target, weight, confusion, [*large], 0, 0.1, code, align_corners, True)


def test_contract_and_gradients() -> None:
    logits, target = draw(2, 3, 2, 2), labels(3, 2, 3, 4)
    for confusion in (None, torch.ones(3, 3).long()):
        for reduction in ("mean", "none"):
            code = REDUCTIONS.index(reduction)
            args = (logits, target, draw(3).abs(), confusion, [3, 4], 0, 0.1, code, False, True)
            ladder.check_contract(UPSAMPLE_CROSS_ENTROPY_ARGMAX, args)
            leaves = ladder.cast(args, torch.float64, grad=True)
            # The loss alone: gradcheck confuses outputs where integers stand between.
            assert torch.autograd.gradcheck(
                lambda logits, weight, leaves=leaves: UPSAMPLE_CROSS_ENTROPY_ARGMAX.op(
                    logits, leaves[1], weight, *leaves[3:]
                )[0],
                (leaves[0], leaves[2]),
            )


# Sizes that Triton's interpreter is spared: it takes a second a pass at them.
SPARED = ("paper", "wide", "narrow", "down", "little down", "up and down")


@pytest.fixture
def spared(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the interpreter out at large sizes; `test_triton.py` has smaller ones of each kind."""
    if size in SPARED:
        monkeypatch.setattr(_backends, "INTERPRETER_DTYPES", ())


@pytest.mark.usefixtures("spared")
@pytest.mark.parametrize("size", SIZES)
def test_accuracy(size: str) -> None:
    for reduction in ("mean", "none"):
        for align_corners in (False, True):
            args = arguments(size, reduction=reduction, align_corners=align_corners, batch=1)
            ladder.check_accuracy(UPSAMPLE_CROSS_ENTROPY_ARGMAX, args, torch.float64)
            # Near-ties of random logits may fall on either side in lower precision: loss alone.
            loss_alone = (*args[:3], None, *args[4:])
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                check_loss(loss_alone, dtype)
    logits, large = args[0], args[4]
    ladder.check_accuracy(UPSAMPLE_ARGMAX_PROBABILITY, (logits, large, False), torch.float64)


def check_loss(args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """`ladder.check_accuracy` without the labels, which are compared where they are certain."""
    from spectralx_kernels.upsample.prediction import UPSAMPLE_CROSS_ENTROPY

    ladder.check_accuracy(UPSAMPLE_CROSS_ENTROPY, (*args[:3], *args[4:]), dtype)
    logits = args[0].to(dtype)
    exact = torch.nn.functional.interpolate(
        logits.double(), size=args[4], mode="bilinear", align_corners=args[8]
    )
    top = exact.topk(2, dim=1).values
    certain = top[:, 0] - top[:, 1] > 1e-4
    found = upsample_argmax(logits, args[4], align_corners=args[8])
    assert torch.equal(found[certain], exact.argmax(dim=1)[certain])
    assert certain.float().mean() > 0.9


def test_compiles() -> None:
    def run(logits: Tensor, target: Tensor, confusion: Tensor) -> tuple[Tensor, ...]:
        found = upsample_cross_entropy_argmax(
            logits, target, confusion=confusion, ignore_index=0, label_smoothing=0.1
        )
        assert found.confusion is not None
        return found.loss, found.label, found.confusion

    args = (draw(2, 4, 2, 3), labels(4, 2, 9, 5), torch.zeros(4, 4).long())
    ladder.check_compiles(run, args, compiler="aot_eager")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_devices_without_a_kernel_keep_the_same_gradient(reduction: str) -> None:
    """The default kernel: the same outputs, the hidden ones included."""
    args = arguments("wide", reduction=reduction)
    expected = UPSAMPLE_CROSS_ENTROPY_ARGMAX._forward_kernel(*args)
    found = UPSAMPLE_CROSS_ENTROPY_ARGMAX.op(*args)
    assert len(found) == len(expected) == 4
    assert expected[3].shape == ((0,) if reduction == "none" else args[0].shape)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(
    batch=st.integers(0, 2),
    classes=st.integers(1, 6),
    small=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    ignore_index=st.sampled_from([-100, 0, 255]),
    align_corners=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_three_operators_of_the_reference(
    batch: int,
    classes: int,
    small: tuple[int, int],
    size: tuple[int, int],
    ignore_index: int,
    align_corners: bool,
) -> None:
    target = labels(classes, batch, *size)
    target[labels(3, batch, *size, seed=1) == 0] = 0 if ignore_index < 0 else ignore_index
    start = labels(9, classes, classes, seed=3)
    before = start.clone()

    def joined(logits: Tensor) -> Tensor:
        found = upsample_cross_entropy_argmax(
            logits, target, confusion=start, ignore_index=ignore_index, align_corners=align_corners
        )
        torch.testing.assert_close(found.label, label)
        assert found.confusion is not None
        torch.testing.assert_close(found.confusion, counted)
        return found.loss

    def apart(logits: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits,
            target,
            ignore_index=ignore_index,
            align_corners=align_corners,
            backend="eager",
        )

    logits = draw(batch, classes, *small, seed=4)
    label = upsample_argmax(logits, size, align_corners=align_corners, backend="eager")
    counted = confusion_matrix_update(start, label, target, ignore_index, backend="eager")
    expected = ladder.run_with_gradients(apart, ladder.cast([logits], torch.float64, grad=True))
    found = ladder.run_with_gradients(joined, ladder.cast([logits], torch.float64, grad=True))
    assert torch.equal(start, before)
    torch.testing.assert_close(found[0][0], expected[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found[1]["argument 0"], expected[1]["argument 0"], rtol=0, atol=1e-12
    )


@pytest.mark.usefixtures("spared")
@pytest.mark.parametrize("size", ["paper", "down", "wide"])
def test_any_number_of_threads_gives_the_same_bits(size: str) -> None:
    threads = torch.get_num_threads()
    for reduction in ("mean", "none"):
        runs = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(
                ladder.run_with_gradients(
                    UPSAMPLE_CROSS_ENTROPY_ARGMAX,
                    ladder.cast(arguments(size, reduction=reduction), torch.float32, grad=True),
                )
            )
        torch.set_num_threads(threads)
        for other in runs[1:]:
            for one, two in zip(runs[0][0], other[0], strict=True):
                assert torch.equal(one, two)
            for name, grad in runs[0][1].items():
                assert torch.equal(grad, other[1][name]), name
    ladder.check_repeats(UPSAMPLE_CROSS_ENTROPY_ARGMAX, arguments(size))


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The kernels that this processor would not choose agree too, in a process of their own."""
    code = (
        "import torch\n"
        "from tests.kernels.upsample.test_cross_entropy_argmax import *\n"
        "for size in ('narrow', 'wide', 'down', 'same', 'one row'):\n"
        "    args = arguments(size)\n"
        "    check_loss((*args[:3], None, *args[4:]), torch.float32)\n"
        "    ladder.check_accuracy(UPSAMPLE_ARGMAX_PROBABILITY, (args[0], args[4], True),"
        " torch.float64)\n"
    )
    environment = {**os.environ, "SPECTRALX_CPU_CAPABILITY": capability, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_any_strides(backend: str) -> None:
    dtype = ladder.widest(UPSAMPLE_CROSS_ENTROPY_ARGMAX, backend)
    logits, target = draw(2, 5, 7, 9).to(dtype), labels(5, 2, 20, 33)
    expected = upsample_cross_entropy_argmax(logits, target, reduction="none", backend=backend)
    padded = torch.full((4, 5, 14, 18), torch.nan, dtype=dtype)
    padded[::2, :, ::2, ::2] = logits
    for variant in (logits.to(memory_format=torch.channels_last), padded[::2, :, ::2, ::2]):
        for labels_ in (target, target.mT.contiguous().mT):
            found = upsample_cross_entropy_argmax(
                variant, labels_, reduction="none", backend=backend
            )
            assert torch.equal(found.loss, expected.loss)
            assert torch.equal(found.label, expected.label)
    # An expanded incoming gradient, and one that is not contiguous.
    grads = []
    for variant in (logits, padded[::2, :, ::2, ::2]):
        leaf = variant.detach().requires_grad_()
        loss = upsample_cross_entropy(leaf, target, reduction="none", backend=backend)
        grads += [
            torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0]
            for upstream in (torch.ones((), dtype=dtype).expand(loss.shape), draw(2, 33, 20).mT)
        ]
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[3])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("size", [(4, 3), (4, 19), (9, 19), (2, 2)])
def test_infinities_and_nan_as_in_the_reference(
    size: tuple[int, int], value: float, backend: str
) -> None:
    """Zero times infinity is NaN: also at borders, and where one axis keeps its size."""
    for align_corners in (False, True):
        for place in ((0, 1, 0, 0), (0, 2, 3, 2), (0, 0, 1, 1)):
            # The reference in float64: in float32 it rounds positions, and a source is another.
            exact = draw(1, 3, 4, 3).float().double()
            exact[place] = value
            logits = exact.to(ladder.widest(UPSAMPLE_CROSS_ENTROPY_ARGMAX, backend))
            target = labels(3, 1, *size)
            found, expected = (
                ladder.run_with_gradients(
                    lambda leaf, backend=backend, align_corners=align_corners, target=target: (
                        upsample_cross_entropy(
                            leaf,
                            target,
                            align_corners=align_corners,
                            reduction="none",
                            backend=backend,
                        )
                    ),
                    [values.clone().requires_grad_()],
                )
                for backend, values in ((backend, logits), ("eager", exact))
            )
            torch.testing.assert_close(found[0][0], expected[0][0].to(logits), equal_nan=True)
            torch.testing.assert_close(
                found[1]["argument 0"].isnan(), expected[1]["argument 0"].isnan()
            )
            label = upsample_argmax(logits, size, align_corners=align_corners, backend=backend)
            truth = upsample_argmax(exact, size, align_corners=align_corners, backend="eager")
            assert torch.equal(label, truth)


def test_gradients_of_an_empty_batch(backend: str) -> None:
    logits = torch.zeros(0, 3, 2, 2, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    found = upsample_cross_entropy_argmax(
        logits,
        torch.zeros(0, 4, 4).byte(),
        weight=weight,
        confusion=torch.ones(3, 3).long(),
        backend=backend,
    )
    grads = torch.autograd.grad(found.loss, (logits, weight))
    assert found.loss == 0
    assert found.label.shape == (0, 4, 4)
    assert found.confusion is not None
    assert found.confusion.sum() == 9
    assert grads[0].shape == logits.shape
    assert not grads[1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confusion": torch.zeros(3, 3)}, r"confusion: got dtype torch.float32, expected torch.i"),
        ({"confusion": torch.zeros(4, 4).long()}, r"confusion: got shape \[4, 4\], expected \[3"),
        ({"confusion": torch.zeros(3, 3, device="meta").long()}, "confusion: got device meta"),
        ({"target": torch.zeros(2, 8, 9).long()[:, :0]}, "size: got .* expected two integers"),
        ({"weight": torch.zeros(2)}, r"weight: got shape \[2\], expected \[3\]"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"logits": torch.zeros(2, 3, 4, 4), "target": torch.zeros(2, 8, 8).int()}
    with pytest.raises((TypeError, ValueError), match=message):
        upsample_cross_entropy_argmax(**{**good, **change})
