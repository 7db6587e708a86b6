"""Models as programs without Python: `torch.export`, and ONNX where its packages are installed.

An exported program is of evaluation, for images of the size and bands it was exported with, in any
batch. Losses and training are not exported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spectralx.decoder import ConvUnit, MultiLevelNeck, set_plain
from spectralx.segmentation import Segmentation
from spectralx_kernels import use_backend

Output = Literal["logits", "classes"]

# How far a program may be from its model, relative to the largest value. float32, two orders of
# summation through a whole model.
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """A program that does not say what its model says."""


class _Classes(nn.Module):
    """The classes [B, H, W] that a model predicts at its images' size."""

    def __init__(self, model: Segmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.predict(images)


@contextmanager
def _evaluation(model: nn.Module, plain: bool) -> Iterator[None]:
    """The model in evaluation and, if `plain`, its decoder in convolutions of resized maps."""
    modes = [(module, module.training) for module in model.modules()]
    units = [
        (unit, unit.plain)
        for unit in model.modules()
        if isinstance(unit, (ConvUnit, MultiLevelNeck))
    ]
    try:
        model.eval()
        if plain:
            set_plain(model)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for unit, was in units:
            unit.plain = was


def export_program(
    model: nn.Module,
    images: Tensor,
    *,
    output: Output = "logits",
    portable: bool = False,
    any_batch: bool = True,
) -> ExportedProgram:
    """A model as an exported program, checked against the model on `images`.

    ``torch.export.save(program, "model.pt2")`` writes it; ``program.module()(images)`` runs it.

    Parameters
    ----------
    model : a `Segmentation`, or any module that takes images, for example one that
        `spectralx.adapt` adapted. Its mode is left as it is.
    images : [B, C, H, W] of the size to export for; B at least 2 for a program of any batch.
    output : "logits", what the model returns, or of a `Segmentation` "classes" [B, H, W].
    portable : of ATen's operators alone, which run wherever PyTorch does. Otherwise the fused
        operators are in it; they need ``import spectralx_kernels`` where the program is loaded.
    any_batch : leave the batch open.

    Raises
    ------
    ValueError : an argument that is out of range.
    ExportError : the program's output is not the model's.
    """
    _check(model, images, output, any_batch)
    whole = _Classes(model) if output == "classes" and isinstance(model, Segmentation) else model
    shapes = ({0: Dim.AUTO},) if any_batch else None
    backend = use_backend("eager") if portable else nullcontext()
    with torch.no_grad(), _evaluation(whole, plain=portable):
        expected = first_output(whole(images))
        with backend:
            program = torch.export.export(whole, (images,), dynamic_shapes=shapes)
        check_same("program", first_output(program.module()(images)), expected)
    return program


def export_onnx(
    model: nn.Module,
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    output: Output = "logits",
    any_batch: bool = True,
) -> None:
    """Write a model as ONNX, and run the file against the model where onnxruntime is installed.

    Parameters are as in `export_program`, whose portable form is what is translated. The file's
    input is ``images``, its output is named as `output`. DINOv3 rotates in bfloat16, for which
    onnxruntime has no kernels on a CPU; ``model.vit_backbone.rope_embed.dtype = torch.float32``
    makes a model that it runs.

    Raises
    ------
    ImportError : onnx or onnxscript is not installed.
    ValueError : an argument that is out of range.
    ExportError : the file's output is not the model's.
    """
    program = export_program(model, images, output=output, portable=True, any_batch=any_batch)
    torch.onnx.export(
        program.run_decompositions(_FOR_ONNX),
        f=os.fspath(path),
        input_names=["images"],
        output_names=[output],
        dynamo=True,
        verbose=False,
    )
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    (found,) = session.run([output], {"images": images.numpy(force=True)})
    with torch.no_grad():
        expected = first_output(program.module()(images))
    check_same(os.fspath(path), torch.from_numpy(found), expected)


def _attention_of_heads(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Attention of [B, N, d] as that of one head."""
    if query.dim() != 3:
        return NotImplemented
    query, key, value = (each.unsqueeze(1) for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, **options).squeeze(1)


def _stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """A stable sort as the whole of ONNX's TopK, which puts the lower of equal indices first."""
    values, indices = torch.topk(x, x.shape[dim], dim, largest=descending, sorted=True)
    return values, indices


# What ONNX's translation does not take, in what it does.
_FOR_ONNX: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attention_of_heads,
    torch.ops.aten.sort.stable: _stable_sort,
}


def first_output(made: Tensor | tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
    """The first tensor of what a model returns: itself, or of a tuple or a mapping."""
    if isinstance(made, Tensor):
        return made
    values = made.values() if isinstance(made, dict) else made
    return next(value for value in values if isinstance(value, Tensor))


def check_same(name: str, found: Tensor, expected: Tensor) -> None:
    """Raise an ExportError where `found` is not `expected` but for round-off.

    Classes may differ where two are as likely, in one pixel of ten thousand.
    """
    expected, found = expected.cpu(), found.cpu()
    if found.shape != expected.shape:
        raise ExportError(
            f"{name}: got an output of shape {list(found.shape)}, expected {list(expected.shape)}"
        )
    if expected.is_floating_point():
        largest = expected.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        off = ((found - expected).abs().amax() / largest).item()
    else:
        off = (found != expected).float().mean().item()
    if not off <= TOLERANCE:
        raise ExportError(f"{name}: got an output {off:.1e} off the model's, expected {TOLERANCE}")


def _check(model: nn.Module, images: Tensor, output: str, any_batch: bool) -> None:
    if output not in get_args(Output):
        raise ValueError(f"output: got {output!r}, expected one of {', '.join(get_args(Output))}")
    if output == "classes" and not isinstance(model, Segmentation):
        raise ValueError(
            f"output: got 'classes' of a {type(model).__name__}, expected a Segmentation"
        )
    if images.dim() != 4:
        raise ValueError(f"images: got shape {list(images.shape)}, expected [B, C, H, W]")
    if any_batch and images.shape[0] < 2:
        raise ValueError(
            f"images: got a batch of {images.shape[0]}, expected at least 2 for any_batch (a batch "
            "of one exports as a constant)"
        )
