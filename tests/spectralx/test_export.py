"""Exported programs and ONNX files against the models they are of."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectralx import adapt
from spectralx.backbones.vit import Block
from spectralx.export import (
    TOLERANCE,
    ExportError,
    check_same,
    export_onnx,
    export_program,
    first_output,
)
from spectralx.segmentation import Segmentation

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "num_classes": 4,
    "wavelengths": [0.45, 0.55, 1.6],
    "image_size": 32,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "stem_dim": 16,
    "tokenizer_heads": 2,
    "low_rank": 4,
    "neck_channels": 16,
    "head_channels": 8,
}


def small(family: Any = "scalemae") -> Segmentation:
    torch.manual_seed(0)
    model = Segmentation(family, **SMALL)
    for parameter in model.parameters():  # gates that choose, scales that matter
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def operators(program: torch.export.ExportedProgram) -> set[str]:
    found = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return {name.split(".")[1] for name in found if name.startswith("spectralx.")}


@pytest.mark.parametrize("family", ["scalemae", "dinov3"])
def test_the_fused_program_is_the_model_in_evaluation(family: str) -> None:
    model = small(family).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = export_program(model, images(2))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert operators(program) >= {"aomoa", "upsample_conv2d"}
    model.eval()
    for batch in (1, 2, 5):
        with torch.no_grad():
            expected = model(images(batch))
        check_same("program", program.module()(images(batch)), expected)


@pytest.mark.parametrize(("output", "portable"), [("logits", True), ("classes", False)])
def test_a_program_is_saved_and_loaded(output: Any, portable: bool) -> None:
    model = small().eval()
    program = export_program(model, images(2), output=output, portable=portable)
    fused = {"aomoa", "upsample_conv2d", "upsample_argmax"}
    assert operators(program) & fused == (set() if portable else fused)
    assert not (portable and operators(program))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    run = model.predict if output == "classes" else model
    with torch.no_grad():
        check_same("program", loaded(images(3)), run(images(3)))
    assert not any(getattr(module, "plain", False) for module in model.modules())


def test_a_program_of_one_batch_refuses_others() -> None:
    program = export_program(nn.Conv2d(3, 2, 4).eval(), images(1), any_batch=False)
    with pytest.raises(Exception, match="size"):
        program.module()(images(2))


def test_an_adapted_model_of_another_maker_is_exported() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), Turned(), Block(16, 2)).eval()
    adapt(model, method="aomoa", example=images(2))
    program = export_program(model, images(2))
    assert operators(program) == {"aomoa"}
    with torch.no_grad():
        check_same("program", program.module()(images(4)), model(images(4)))


class Turned(nn.Module):
    """[B, D, N] to [B, N, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Differs(nn.Module):
    """Returns another number when it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1.0 if torch.compiler.is_exporting() else 0.0)


def test_a_program_that_says_something_else_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"program: got an output .* off the model's"):
        export_program(Differs(), images(2))


def test_check_same() -> None:
    expected = torch.tensor([[1.0, -200.0]])
    check_same("it", expected + 0.5 * TOLERANCE * 200, expected)
    with pytest.raises(ExportError, match="it: got an output"):
        check_same("it", expected + 2 * TOLERANCE * 200, expected)
    with pytest.raises(ExportError, match="off the model's"):
        check_same("it", torch.full_like(expected, torch.nan), expected)
    with pytest.raises(ExportError, match=r"shape \[2\], expected \[1, 2\]"):
        check_same("it", expected[0], expected)
    classes = torch.arange(10)
    check_same("it", classes, classes)
    with pytest.raises(ExportError):
        check_same("it", classes.flip(0), classes)


def test_first_output() -> None:
    x = torch.ones(1)
    assert first_output(x) is x
    assert first_output((x, x + 1)) is x
    assert first_output({"hidden": x}) is x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "loss"}, "output: got 'loss', expected one of logits, classes"),
        ({"images": images(1)}, "images: got a batch of 1, expected at least 2"),
        ({"images": images(2)[0]}, r"images: got shape \[3, 32, 32\]"),
        ({"model": nn.Identity(), "output": "classes"}, "'classes' of a Identity, expected a Segm"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    given = {"model": nn.Identity(), "images": images(2), **arguments}
    with pytest.raises(ValueError, match=message):
        export_program(given.pop("model"), given.pop("images"), **given)


@pytest.mark.parametrize("output", ["logits", "classes"])
def test_onnx(output: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    model, path = small().eval(), tmp_path / "model.onnx"
    export_onnx(model, images(2), path, output=output)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    run = model.predict if output == "classes" else model
    for batch in (1, 3):
        (found,) = session.run([output], {"images": images(batch).numpy()})
        with torch.no_grad():
            check_same("file", torch.from_numpy(found), run(images(batch)))
