"""HyperT's operators on a GPU: the proof ladder at odd and the paper's sizes, graphs, whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels import HyperT, use_backend
from spectralx_kernels.hypert.attention import ATTRIBUTE_MATCH, WINDOW_ATTENTION
from spectralx_kernels.hypert.stem import RESIDUAL_HALVING
from tests.gpu.watching import no_synchronisation
from tests.kernels import ladder
from tests.kernels.hypert.test_attention import MATCHES, WINDOWS, match_args, window_args
from tests.kernels.hypert.test_ops import draw
from tests.kernels.hypert.test_stem import CASES, stem_args
from tests.tolerances import FORWARD_FACTOR, ROUND_OFF

OPERATOR = RESIDUAL_HALVING
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# map, heads, width of a head, window: spatial and spectral attention of the paper
PAPER = {"spatial": ((28, 28), 4, 64, (7, 7)), "spectral": ((1, 512), 4, 98, (1, 512))}

# bands (None: 128 channels come in), channels inside and out of the paper's stem, pixels
STEMS = {
    "32 bands": (32, 64, 128, (56, 40)),
    "13 bands": (13, 64, 128, (30, 34)),
    "128 bands": (128, 64, 128, (28, 28)),
    "second half": (None, 128, 256, (28, 28)),
}


def paper_args(name: str) -> list[Any]:
    side, heads, dim, window = PAPER[name]
    channels = 3 * heads * dim
    return [draw(1, *side, channels), draw(channels, seed=1), heads, list(window)]


@pytest.mark.parametrize("dtype", DTYPES[:2])  # float16 at the paper's sizes
@pytest.mark.parametrize("name", WINDOWS)
def test_window_attention(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(WINDOW_ATTENTION, window_args(name), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAPER)
def test_window_attention_at_the_papers_sizes(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(WINDOW_ATTENTION, paper_args(name), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MATCHES)
def test_attribute_match(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(ATTRIBUTE_MATCH, match_args(name), dtype, "cuda")


def test_repeats_without_synchronising() -> None:
    for operator, args in (
        (WINDOW_ATTENTION, paper_args("spatial")),
        (ATTRIBUTE_MATCH, match_args("several tiles", batch=3)),
    ):
        ladder.check_repeats(operator, args, "cuda")
        there = ladder.cast(ladder.moved(args, "cuda"), torch.float32)
        operator(*there)
        with no_synchronisation():
            operator(*there)


def paper_stem(name: str, *, norms: bool = True, batch: int = 2, keep: bool = True) -> list[Any]:
    bands, middle, outs, size = STEMS[name]
    args = stem_args(
        bands, middle=middle, outs=outs, size=size, batch=batch, norm=norms, half_norm=norms,
        keep=keep,
    )  # fmt: skip
    for place in (1, 3, 7):  # as torch starts convolutions
        if args[place] is not None:
            args[place] = args[place] / args[place][0].numel() ** 0.5
    return args


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_residual_halving(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(RESIDUAL_HALVING, CASES[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [True, False], ids=["norms", "folded norms"])
@pytest.mark.parametrize("name", STEMS)
def test_residual_halving_at_the_papers_widths(name: str, norms: bool, dtype: torch.dtype) -> None:
    ladder.check_accuracy(RESIDUAL_HALVING, paper_stem(name, norms=norms), dtype, "cuda")


@pytest.mark.parametrize("name", STEMS)
def test_residual_halving_repeats(name: str) -> None:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        ladder.check_repeats(RESIDUAL_HALVING, paper_stem(name), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEMS)
def test_what_is_not_kept_is_written_over(name: str, dtype: torch.dtype, backend: str) -> None:
    """The output with nothing kept, where passes run in place; planes and channels-last alike."""
    results = []
    for keep, layout in ((True, torch.contiguous_format), (False, torch.channels_last)):
        args = ladder.moved(ladder.cast(paper_stem(name, keep=keep), dtype), "cuda")
        args[0] = args[0].contiguous(memory_format=layout)
        given = args[0].clone()
        results.append(RESIDUAL_HALVING(*args, backend=backend))
        assert torch.equal(args[0], given)
    for one, other in zip(*results, strict=True):
        assert ladder.relative_error(one, other) <= 2 * ROUND_OFF[dtype]


def test_a_mean_far_from_zero(backend: str) -> None:
    args = ladder.moved(ladder.cast(stem_args(batch=3), torch.float32), "cuda")
    args[4] += 1000.0
    found = RESIDUAL_HALVING(*args, backend=backend)[1].cpu().double()
    exact = RESIDUAL_HALVING.reference(*ladder.cast(ladder.moved(args, "cpu"), torch.float64))[1]
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_no_images_and_nan(backend: str) -> None:
    for norms in (True, False):
        args = ladder.moved(paper_stem("32 bands", batch=0, norms=norms), "cuda")
        out, grads = ladder.run_with_gradients(
            lambda *values: RESIDUAL_HALVING(*values, backend=backend),
            ladder.cast(args, torch.float32, grad=True),
        )
        assert out[0].shape == (0, 128, 28, 20)
        assert not any(grad.any() for grad in grads.values())
    args = ladder.moved(ladder.cast(paper_stem("32 bands", norms=False), torch.float32), "cuda")
    args[0][0, 5, 2, 1] = torch.nan
    out = RESIDUAL_HALVING(*args, backend=backend)[0]
    assert out[0, :, 0:2, 0:2].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stem_in_graphs_without_synchronisation(dtype: torch.dtype, backend: str) -> None:
    args = ladder.moved(ladder.cast(paper_stem("32 bands"), dtype), "cuda")
    leaves = [arg.requires_grad_() for arg in args if isinstance(arg, Tensor)]

    def step() -> list[Tensor]:
        outputs = RESIDUAL_HALVING(*args, backend=backend)
        upstream = torch.ones_like(outputs[0]) * outputs[0].detach()
        return [*outputs, *torch.autograd.grad(outputs[0], leaves, upstream)]

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with no_synchronisation():
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            leaves[0].copy_(leaves[0].flip(0))
        graph.replay()
        for place, (found, expected) in enumerate(zip(captured, step(), strict=True)):
            assert ladder.relative_error(found, expected) <= ROUND_OFF[dtype], place


@pytest.mark.parametrize("bands", [6, 64])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_tokenizer(training: bool, bands: int, backend: str) -> None:
    """HyperT whole: outputs and running statistics against float64 on the CPU."""
    torch.manual_seed(0)
    wavelengths = [0.4 + 0.01 * band for band in range(bands)]
    model = HyperT(bands, wavelengths, embed_dim=64, image_size=32, stem_dim=64).train(training)
    images = torch.rand(2, bands, 32, 32)
    results = []
    for device, dtype, name in (
        ("cpu", torch.float64, "eager"), ("cpu", torch.float32, "eager"),
        ("cuda", torch.float32, backend),
    ):  # fmt: skip
        own = copy.deepcopy(model).to(device, dtype)
        with use_backend(name, required=False), torch.no_grad():
            outputs = own(images.to(device, dtype))
        results.append([each.cpu() for each in (*outputs, *own.buffers())])
    for place, (exact, plain, found) in enumerate(zip(*results, strict=True)):
        bound = FORWARD_FACTOR * ladder.relative_error(plain, exact) + ROUND_OFF[torch.float32]
        assert ladder.relative_error(found, exact) <= bound, place
