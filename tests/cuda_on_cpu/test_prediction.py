"""CUDA kernels of loss, prediction and counts of upsampled logits, run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels.upsample import reference
from tests.cuda_on_cpu.build import ROOT, compile_cuda, compiler, load
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.cuda_on_cpu.structure import structure
from tests.kernels.ladder import relative_error
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
DTYPES = list(TYPE_CODES)
LABEL_CODES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.uint8: 3}
FOLDER = ROOT / "csrc" / "cuda" / "upsample"
Pass = structure(FOLDER / "kernels.h", "SpectralxPrediction")
# batch, classes, small, large, align_corners
CASES: dict[str, tuple[int, int, tuple[int, int], tuple[int, int], bool]] = {
    "paper": (1, 9, (7, 7), (28, 28), False),
    "wider than a block": (2, 3, (2, 40), (5, 150), False),
    "corners": (2, 4, (3, 5), (11, 13), True),
    "down": (1, 5, (9, 31), (4, 7), False),
    "up and down": (1, 11, (3, 30), (13, 11), True),
    "same": (1, 4, (5, 6), (5, 6), False),
    "same rows": (1, 4, (5, 3), (5, 9), False),
    "one pixel": (2, 3, (1, 1), (6, 5), False),
    "one of each": (1, 1, (2, 2), (1, 1), True),
    "counts outside": (1, 70, (2, 2), (5, 4), False),
    "empty": (0, 3, (2, 2), (5, 4), False),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = load(compile_cuda([FOLDER / "prediction.cu"], "-O1", "-shared"))
    loaded.spectralx_prediction_blocks.restype = ctypes.c_int64
    return loaded


def draw(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits, labels of which some are ignored (0), class weights."""
    batch, classes, small, large, _ = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    logits = torch.randn((batch, classes, *small), generator=generator, dtype=torch.float64) * 3
    target = torch.randint(0, classes, (batch, *large), generator=generator)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
    return logits.to(dtype), target, weight


def run(
    library: ctypes.CDLL, case: str, logits: Tensor, wanted: Mapping[str, tuple[int, ...]],
    target: Tensor | None = None, **given: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Outputs `wanted` (name -> shape) of a pass; `given` are further members."""
    batch, classes, small, large, align_corners = CASES[case]
    device, dtype = Device(library), logits.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = Pass(
        type=TYPE_CODES[dtype], batch=batch, classes=classes, height=small[0], width=small[1],
        out_height=large[0], out_width=large[1], align_corners=int(align_corners),
        ignore_index=given.pop("ignore_index", 0), mean=int(given.pop("mean", False)),
        label_smoothing=given.pop("label_smoothing", 0.0),
    )  # fmt: skip
    alive = []

    def bind(name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.numel():
            alive.append(tensor)
            setattr(arguments, name, tensor.data_ptr())

    bind("logits", device.put(logits))
    if target is not None:
        arguments.label_type = LABEL_CODES[target.dtype]
        bind("target", target)
    for name, value in given.items():
        bind(name, device.put(value.to(wide)) if isinstance(value, Tensor) else None)
    found = {}
    for name, shape in wanted.items():
        if name in ("label", "confusion"):
            found[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            found[name] = device.empty(shape, wide)
        bind(name, found[name])
    blocks = library.spectralx_prediction_blocks(ctypes.byref(arguments))
    assert blocks == batch * small[0]
    if "loss" in wanted:
        bind("loss_parts", device.empty((max(blocks, 1), 2), wide))
    if "gradient" in wanted:
        bind("gradient_parts", device.empty((batch, small[0], 2, classes, small[1]), wide))
    device.run("spectralx_prediction", ctypes.byref(arguments))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    logits, target, weight = draw(case, dtype)
    batch, classes, small, large, align_corners = CASES[case]
    for smoothing, weights, mean in ((0.0, None, True), (0.1, weight, True), (0.1, weight, False)):
        options = ([*large], 0, smoothing, 1 if mean else 2, align_corners)
        losses_of = {}
        for name, type_ in (("exact", torch.float64), ("plain", dtype)):
            leaf = logits.to(type_).requires_grad_()
            kept = None if weights is None else weights.to(type_)
            loss = reference.upsample_cross_entropy(leaf, target, kept, *options)
            (grad,) = torch.autograd.grad(loss, leaf)
            losses_of[name] = (loss.detach(), grad)
        label_type = list(LABEL_CODES)[len(case) % 4]
        found = run(
            library, case, logits,
            {
                "loss": (2,), "gradient": (batch, classes, *small), "label": (batch, *large),
                "confusion": (classes, classes),
            },
            target.to(label_type), mean=mean, label_smoothing=smoothing, weight=weights,
        )  # fmt: skip
        (exact, exact_grad), (plain, plain_grad) = losses_of["exact"], losses_of["plain"]
        bound = FORWARD_FACTOR * relative_error(plain, exact) + ROUND_OFF[dtype]
        if batch > 0 and classes > 1:
            assert relative_error(found["loss"][0], exact) <= bound
        else:
            assert found["loss"][0] == 0
        bound = BACKWARD_FACTOR * relative_error(plain_grad, exact_grad) + ROUND_OFF[dtype]
        if classes > 1:
            assert relative_error(found["gradient"], exact_grad) <= bound
        certain = torch.ones_like(target, dtype=torch.bool)
        if classes > 1 and batch > 0:
            upsampled = reference.resize(logits.double(), [*large], align_corners)
            top = upsampled.topk(2, dim=1).values
            certain = top[:, 0] - top[:, 1] > 1e-4
        expected = reference.upsample_argmax(logits.double(), [*large], align_corners)
        assert torch.equal(found["label"][certain], expected[certain])
        counted = reference.confusion_matrix_update(
            torch.zeros(classes, classes).long(), found["label"], target, 0
        )
        assert torch.equal(found["confusion"], counted)


@pytest.mark.parametrize("case", ["corners", "down", "wider than a block"])
def test_pixel_losses_and_probabilities_with_their_gradients(
    library: ctypes.CDLL, case: str
) -> None:
    logits, target, weight = draw(case, torch.float64)
    batch, classes, small, large, align_corners = CASES[case]
    upstream = torch.randn(batch, *large, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    losses = reference.upsample_cross_entropy(
        leaf, target, weight, [*large], 0, 0.2, 0, align_corners
    )
    probability, _ = reference.upsample_argmax_probability(leaf, [*large], align_corners)
    shapes = {"gradient": (batch, classes, *small)}
    pixels = (batch, *large)
    found = run(
        library, case, logits, {**shapes, "losses": pixels}, target, weight=weight,
        label_smoothing=0.2, upstream=upstream,
    )  # fmt: skip
    torch.testing.assert_close(found["losses"], losses.detach())
    (grad,) = torch.autograd.grad((losses * upstream).sum(), leaf)
    torch.testing.assert_close(found["gradient"], grad)
    found = run(library, case, logits, {**shapes, "probability": pixels}, upstream=upstream)
    torch.testing.assert_close(found["probability"], probability.detach())
    (grad,) = torch.autograd.grad((probability * upstream).sum(), leaf)
    torch.testing.assert_close(found["gradient"], grad)
    factor = torch.tensor([2.5]).double()
    scaled = run(library, case, logits, shapes, upstream=upstream, factor=factor)
    torch.testing.assert_close(scaled["gradient"], grad * 2.5)


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    case = "wider than a block"
    logits, target, weight = draw(case, torch.float32)
    batch, classes, small, large, _ = CASES[case]
    wanted = {
        "loss": (2,), "gradient": (batch, classes, *small), "losses": (batch, *large),
        "label": (batch, *large), "confusion": (classes, classes),
    }  # fmt: skip
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        runs.append(run(library, case, logits, wanted, target, weight=weight, mean=True))
    library.spectralx_shim_order(0)
    for name, found in runs[0].items():
        assert torch.equal(found, runs[1][name]), name


def test_wrong_labels_are_nan_and_not_counted(library: ctypes.CDLL) -> None:
    logits, target, _ = draw("paper", torch.float32)
    for wrong in (9, -1, 2**40):
        target[0, 13, 5] = wrong
        found = run(
            library, "paper", logits,
            {
                "loss": (2,), "losses": (1, 28, 28), "gradient": (1, 9, 7, 7), "label": (1, 28, 28),
                "confusion": (9, 9),
            },
            target, mean=True,
        )  # fmt: skip
        assert found["loss"][0].isnan()
        assert found["losses"].isnan().nonzero().tolist() == [[0, 13, 5]]
        assert 0 < found["gradient"].isnan().sum() <= 9 * 4
        counted = reference.confusion_matrix_update(
            torch.zeros(9, 9).long(), found["label"], target, 0
        )
        assert torch.equal(found["confusion"], counted)


def test_nothing_counts(library: ctypes.CDLL) -> None:
    logits, target, _ = draw("paper", torch.float32)
    wanted = {"loss": (2,), "gradient": (1, 9, 7, 7)}
    found = run(library, "paper", logits, wanted, torch.zeros_like(target), mean=True)
    assert found["loss"].tolist() == [0, 1]
    assert not found["gradient"].any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_as_in_the_reference(library: ctypes.CDLL, value: float) -> None:
    for case in ("corners", "down", "same", "same rows"):
        logits, target, _ = draw(case, torch.float64)
        batch, classes, small, large, align_corners = CASES[case]
        logits[0, 1, 0, 0] = logits[0, 2, -1, -1] = value
        leaf = logits.clone().requires_grad_()
        losses = reference.upsample_cross_entropy(
            leaf, target, None, [*large], -100, 0.0, 0, align_corners
        )
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        pixels = (batch, *large)
        found = run(
            library, case, logits,
            {"losses": pixels, "label": pixels, "gradient": (batch, classes, *small)}, target,
            ignore_index=-100,
        )  # fmt: skip
        torch.testing.assert_close(found["losses"], losses.detach(), equal_nan=True)
        assert torch.equal(
            found["label"], reference.upsample_argmax(logits, [*large], align_corners)
        )
        assert torch.equal(found["gradient"].isnan(), grad.isnan())


@pytest.mark.parametrize("classes", [3, 70])
def test_confusion_counts(library: ctypes.CDLL, classes: int) -> None:
    prediction = torch.randint(-1, classes + 1, (1000,))
    target = torch.randint(0, classes + 1, (1000,), dtype=torch.int16)
    confusion = torch.randint(0, 9, (classes, classes))
    expected = reference.confusion_matrix_update(confusion, prediction, target, 1)
    Device(library).run(
        "spectralx_confusion", prediction, 0, target, 2, 1000, classes, 1, confusion
    )
    assert torch.equal(confusion, expected)
