"""CUDA kernels of masking and reconstruction losses, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spectralx_kernels._layouts import is_channels_last
from spectralx_kernels.reconstruction import reference
from spectralx_kernels.reconstruction.ops import BAND_RECONSTRUCTION_LOSS, MASKED_PATCH_LOSS
from tests.cuda_on_cpu.build import ROOT, compile_cuda, compiler, load
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.cuda_on_cpu.structure import structure
from tests.kernels.ladder import cast, relative_error
from tests.kernels.reconstruction.test_losses import CASES, LARGE, bits, draw
from tests.kernels.reconstruction.test_masking import MOVES, indices
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
DTYPES = pytest.mark.parametrize("dtype", list(TYPE_CODES), ids=lambda dtype: str(dtype)[6:])
FOLDER = ROOT / "csrc" / "cuda" / "reconstruction"
Errors = structure(FOLDER / "kernels.h", "SpectralxErrors")
MASK_CODES = {**TYPE_CODES, torch.bool: 4, torch.uint8: 4, torch.int64: 5}
LOSSES = {**CASES, **{f"large {name}": case for name, case in LARGE.items()}}
WIDER: dict[str, Any] = {
    "packs": (reference.gather_tokens, (draw(2, 5, 24), indices(2, 40, 5))),
    "more columns than a block": (
        reference.restore_tokens,
        (draw(2, 3, 150), indices(2, 35, 9), draw(150, seed=1)),
    ),
    "no tokens": (reference.restore_tokens, (draw(2, 0, 4), indices(2, 0, 3), draw(4, seed=1))),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    sources = [FOLDER / "errors.cu", FOLDER / "masking.cu"]
    loaded = load(compile_cuda(sources, "-O1", "-shared"))
    loaded.spectralx_error_cells.restype = ctypes.c_int64
    return loaded


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bind(arguments: ctypes.Structure, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        there = tensor is not None and tensor.numel() > 0
        setattr(arguments, name, tensor.data_ptr() if there and tensor is not None else None)


class Pass:
    """A prediction, cut in cells, with its images and mask, on the device."""

    def __init__(
        self, device: Device, prediction: Tensor, images: Tensor, mask: Tensor | None,
        cell: tuple[int, int], *, patches: bool = False, absolute: bool = False,
    ) -> None:  # fmt: skip
        self.device, self.dtype, self.shape = device, prediction.dtype, images.shape
        self.last = is_channels_last(prediction)
        self.prediction = self.in_memory(prediction)
        bands = images.shape[1]
        if patches:
            size = images.shape[2:]
            across, values = size[1] // cell[1], cell[0] * cell[1] * bands
            strides = [size[0] // cell[0] * across * values, 1, cell[1] * bands, bands]
            by_cell = (across * values, values)
        else:
            size, strides = prediction.shape[2:], list(prediction.stride())
            by_cell = (cell[0] * strides[2], cell[1] * strides[3])
        self.alive = [device.put(images), mask]  # guards of a mask would have to be NaN
        self.arguments = Errors(
            type=TYPE_CODES[self.dtype], image_type=TYPE_CODES[images.dtype],
            mask_type=0 if mask is None else MASK_CODES[mask.dtype], batch=images.shape[0],
            bands=bands, height=size[0], width=size[1], image_height=images.shape[2],
            image_width=images.shape[3], cell_rows=cell[0], cell_columns=cell[1],
            absolute=int(absolute), by_image=strides[0], by_cell_row=by_cell[0],
            by_cell_column=by_cell[1], by_row=strides[2], by_column=strides[3], by_band=strides[1],
            factor=1 / (cell[0] * cell[1]),
        )  # fmt: skip
        bind(self.arguments, prediction=self.prediction, images=self.alive[0], mask=mask)

    def in_memory(self, map_: Tensor) -> Tensor:
        put = self.device.put(map_.permute(0, 2, 3, 1) if self.last else map_)
        assert put is not None
        return put

    def want_errors(self) -> None:
        cells = self.device.library.spectralx_error_cells(ctypes.byref(self.arguments))
        errors = self.device.empty((self.shape[0], cells), wide(self.dtype))
        self.alive.append(errors)
        bind(self.arguments, errors=errors, gradient=None)

    def want_gradient(self, upstream: Tensor, count: Tensor | None) -> Tensor:
        gradient = self.device.empty(self.prediction.shape, self.dtype)
        self.alive += [self.device.put(upstream), count]
        bind(self.arguments, errors=None, gradient=gradient, upstream=self.alive[-2], count=count)
        return gradient.permute(0, 3, 1, 2) if self.last else gradient

    def loss(self, other: Pass | None = None) -> Tensor:
        loss = self.device.empty((1,), self.dtype)
        second = ctypes.byref(other.arguments) if other else None
        self.device.run("spectralx_mean_error", ctypes.byref(self.arguments), second, loss)
        return loss[0]

    def count(self) -> Tensor:
        count = self.device.empty((1,), wide(self.dtype))
        self.device.run("spectralx_mask_count", ctypes.byref(self.arguments), count)
        return count


def patch_loss(library: ctypes.CDLL, upstream: Tensor, *args: Any) -> list[Tensor]:
    prediction, images, mask, patch, normalize = args
    given = Pass(Device(library), prediction, images, mask, (patch, patch), patches=True)
    given.arguments.factor /= images.shape[1]
    given.want_errors()
    call = ("spectralx_patch_errors", ctypes.byref(given.arguments), int(normalize))
    given.device.run(*call)
    loss = given.loss()
    gradient = given.want_gradient(upstream, given.count())
    given.device.run(*call)
    return [loss, gradient]


def l1_loss(library: ctypes.CDLL, upstream: Tensor, *args: Any) -> list[Tensor]:
    prediction, images = args
    given = Pass(Device(library), prediction, images, None, (4, 6), absolute=True)
    given.arguments.factor = 1 / max(prediction.numel(), 1)
    given.want_errors()
    call = ("spectralx_resized_errors", ctypes.byref(given.arguments))
    given.device.run(*call)
    loss = given.loss()
    gradient = given.want_gradient(upstream, None)
    given.device.run(*call)
    return [loss, gradient]


def band_loss(library: ctypes.CDLL, upstream: Tensor, *args: Any) -> list[Tensor]:
    high, low, images, mask, grid, base_size = args
    device = Device(library)
    passes = []
    for map_ in (high, low):
        cell = (map_.shape[2] // grid[0], map_.shape[3] // grid[1])
        passes.append(Pass(device, map_, images, mask, cell))
    first, second = (ctypes.byref(each.arguments) for each in passes)
    base = device.empty((*images.shape[:2], *base_size), wide(high.dtype))
    count = device.empty((1,), wide(high.dtype))
    device.run("spectralx_band_base", first, *base_size, base, None)
    assert count.isnan().all()
    call = ("spectralx_band_errors", first, second, base, *base_size)
    for each in passes:
        each.want_errors()
    device.run(*call)
    loss = passes[0].loss(passes[1])
    device.run("spectralx_band_base", first, *base_size, base, count)
    gradients = [each.want_gradient(upstream, count) for each in passes]
    device.run(*call)
    alone = passes[1].want_gradient(upstream, count)
    passes[0].arguments.gradient = None
    device.run(*call)
    assert torch.equal(alone, gradients[1])
    return [loss, *gradients]


RUNS: dict[str, Callable[..., list[Tensor]]] = {
    "masked_patch_loss": patch_loss,
    "upsampled_l1_loss": l1_loss,
    "band_reconstruction_loss": band_loss,
}


class Results(NamedTuple):
    exact: list[Tensor]
    plain: list[Tensor]


def results_of(
    function: Callable[..., Tensor], args: Sequence[Any], places: Sequence[int], upstream: Tensor
) -> Results:
    """Value, and gradients at `places`, of these very arguments in float64 and as they are."""
    found = []
    for type_ in (torch.float64, None):
        leaves = cast(args, type_) if type_ else [*args]
        for place in places:
            leaves[place] = leaves[place].detach().requires_grad_()
        out = function(*leaves)
        grads = torch.autograd.grad(
            out, [leaves[place] for place in places], upstream.to(out).reshape(out.shape)
        )
        found.append([out.detach(), *grads])
    return Results(*found)


def check(found: Sequence[Tensor], results: Results, dtype: torch.dtype) -> None:
    for i, (value, exact, plain) in enumerate(zip(found, *results, strict=True)):
        factor = FORWARD_FACTOR if i == 0 else BACKWARD_FACTOR
        bound = factor * relative_error(plain, exact) + ROUND_OFF[dtype]
        assert relative_error(value, exact) <= bound, i


@DTYPES
@pytest.mark.parametrize("case", LOSSES)
def test_losses(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    """Predictions of every layout; images in their type and in float32; masks of any type."""
    operator, args = LOSSES[case]
    given = cast(args, dtype)
    predictions = range(2 if operator is BAND_RECONSTRUCTION_LOSS else 1)
    upstream = torch.tensor([0.7]).to(dtype)
    at = len(predictions)
    for image_type in {dtype, wide(dtype)}:
        given[at] = args[at].to(image_type)
        if len(given) > at + 1:
            mask_types = [*TYPE_CODES]
            if bool(((args[at + 1] == 0) | (args[at + 1] == 1)).all()):
                mask_types = [torch.bool, torch.int64, torch.float32]
            given[at + 1] = args[at + 1].to(mask_types[len(case) % len(mask_types)])
        results = results_of(operator.reference, given, predictions, upstream)
        found = RUNS[operator.name](library, upstream, *given)
        check([found[0], *found[1:]], results, dtype)


def test_unread_cells_and_nothing_masked(library: ctypes.CDLL) -> None:
    """What has weight 0 may be NaN; without a mask loss and gradient are 0; an empty batch."""
    upstream = torch.ones(1)
    for operator, args in (CASES["patch"], LARGE["band"]):
        given = cast(args, torch.float32)
        predictions = 2 if operator is BAND_RECONSTRUCTION_LOSS else 1
        mask = given[predictions + 1]
        run = RUNS[operator.name]
        expected = run(library, upstream, *given)
        image, cell = (mask == 0).nonzero()[0].tolist()
        if operator is MASKED_PATCH_LOSS:
            given[0][image, cell] = torch.nan
        else:
            rows = given[0].shape[2] // given[4][0]
            columns = given[0].shape[3] // given[4][1]
            top, left = cell // given[4][1] * rows, cell % given[4][1] * columns
            given[0][image, :, top : top + rows, left : left + columns] = torch.nan
        assert all(map(torch.equal, run(library, upstream, *given), expected))
        given[predictions + 1] = torch.zeros_like(mask)
        assert not any(value.any() for value in run(library, upstream, *given))
        empty = [value[:0] if isinstance(value, Tensor) else value for value in given]
        loss, *gradients = run(library, upstream, *empty)
        assert loss == 0
        assert all(gradient.numel() == 0 for gradient in gradients)


def test_nan_counts_where_it_is_read(library: ctypes.CDLL) -> None:
    _, args = CASES["normalized"]
    given = cast(args, torch.float32)
    given[2] = torch.ones_like(given[2])
    given[1][0, 0, 0, 1] = torch.nan
    loss, gradient = patch_loss(library, torch.ones(1), *given)
    assert loss.isnan()
    assert gradient[0, 0].isnan().all()
    assert gradient[0, 1:].isfinite().all()


def rank(library: ctypes.CDLL, noise: Tensor, keep: int) -> list[Tensor]:
    device, (batch, tokens) = Device(library), noise.shape
    kept, restore = torch.full((batch, keep), -1), torch.full((batch, tokens), -1)
    masked = torch.zeros(batch, tokens, dtype=torch.bool)
    device.run(
        "spectralx_rank_tokens", TYPE_CODES[noise.dtype], device.put(noise), batch, tokens, keep,
        kept, masked, restore,
    )  # fmt: skip
    return [kept, masked, restore]


@DTYPES
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_masking_is_a_stable_sort(library: ctypes.CDLL, levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(levels)
    for batch, tokens, keep in ((2, 70, 17), (3, 1, 1), (1, 33, 0), (0, 4, 2)):
        noise = (torch.randint(0, levels, (batch, tokens), generator=generator) / levels).to(dtype)
        if tokens > 8:
            special = torch.tensor([torch.nan, 0.0, torch.inf, -torch.inf, -0.0, torch.nan])
            noise[0, 2:8] = special.to(dtype)
        expected = reference.random_masking(noise, keep)
        assert all(map(torch.equal, rank(library, noise, keep), expected))


def move(
    library: ctypes.CDLL, grad: Tensor, tokens: Tensor, ids: Tensor, filler: Tensor | None = None
) -> list[Tensor]:
    """Tokens moved, and the gradients of tokens and filler."""
    device, (batch, kept, width), count = Device(library), tokens.shape, ids.shape[1]
    dtype = tokens.dtype
    out = device.empty((batch, count, width), dtype)
    flat = None if filler is None else device.put(filler.reshape(-1))
    device.run(
        "spectralx_move_tokens", tokens.element_size(), device.put(tokens), ids, flat, batch, kept,
        count, width, out,
    )  # fmt: skip
    of_tokens = device.empty(tokens.shape, dtype)
    rest = None if filler is None else device.empty((batch, width), wide(dtype))
    device.run(
        "spectralx_collect_tokens", TYPE_CODES[dtype], device.put(grad), ids, batch, kept, count,
        width, of_tokens, rest,
    )  # fmt: skip
    if filler is None or rest is None:
        return [out, of_tokens]
    return [out, of_tokens, rest.sum(0).reshape(filler.shape)]


@DTYPES
@pytest.mark.parametrize("case", [*MOVES, *WIDER])
def test_moves(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    if case in MOVES:
        function, args = MOVES[case][0].reference, MOVES[case][1]
    else:
        function, args = WIDER[case]
    given = cast(args, dtype)
    grad = draw(given[0].shape[0], given[1].shape[1], given[0].shape[2], seed=9).to(dtype)
    results = results_of(function, given, [0, 2][: len(given) - 1], grad)
    check(move(library, grad, *given), results, dtype)


def test_rows_that_are_not_there(library: ctypes.CDLL) -> None:
    ids = torch.tensor([[0, -1, 2, 7]])
    out, of_tokens = move(library, torch.ones(1, 4, 3), torch.ones(1, 3, 3), ids)
    assert out[0, :, 0].tolist() == [1, 0, 1, 0]
    assert of_tokens[0, :, 0].tolist() == [1, 0, 1]


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    noise, mask = draw(2, 50).float(), bits(2, 40).float()
    tokens, ids = draw(2, 5, 24).float(), indices(2, 40, 9)
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        found = rank(library, noise, 9)
        found += move(library, draw(2, 40, 24, seed=3).float(), tokens, ids, mask[0, :24])
        for name in LARGE:
            operator, args = LARGE[name]
            found += RUNS[operator.name](library, torch.ones(1), *cast(args, torch.float32))
        runs.append(found)
    library.spectralx_shim_order(0)
    assert all(map(torch.equal, *runs))
