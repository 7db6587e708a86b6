"""A checkpoint's model for prediction, made in no more memory than its tensors take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectralx.checkpoints.errors import CheckpointError, check_names
from spectralx.checkpoints.folder import (
    checked_tensors,
    folder_at,
    make_model,
    note_base,
    read_manifest,
)
from spectralx.cli import one_line

# Whose parameters are nearly all of a model.
_PRODUCTS = (nn.Linear, nn.Conv2d)


class _NothingDrawn(TorchFunctionMode):
    """No numbers are drawn for tensors on the meta device, which have none.

    torch does it in Python, and imports its compiler and Triton for that: seconds, and memory.
    """

    DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in self.DRAWS:
            drawn: Tensor = args[0] if args else named["tensor"]
            if drawn.is_meta:
                return drawn
        return func(*args, **named)


@contextmanager
def products_without_memory() -> Iterator[None]:
    """Linear layers and convolutions made in this block have parameters on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and isinstance(module, _PRODUCTS):
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        with _NothingDrawn():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_each(file: Path, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file as `change` makes them, by name, each read by itself.

    Raises
    ------
    CheckpointError : it is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
        found = {}
        for name in names:
            # Opened anew: what is mapped of a file counts as memory until it is closed.
            with safe_open(file, framework="pt") as stored:
                found[name] = change(name, stored.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {one_line(error)}") from error
    return found


def products(model: nn.Module) -> set[str]:
    """Names of the weights of the linear layers of transformer blocks.

    Autocast brings these to its type wherever they are used. Biases, a tokenizer's weights and a
    decoder's, which are joined with its norms before, are used in float32 too.
    """
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".blocks." in f".{path}."
    }


def load_lean(
    path: str | os.PathLike[str], autocast: torch.dtype | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint in evaluation mode, not to be trained, and its manifest.

    Nothing but the tensors themselves takes memory, where `checkpoints.load` and ``build`` hold
    them twice.

    Parameters
    ----------
    path : folder of the checkpoint, or its manifest.
    autocast : type under whose autocast alone the model will run: `products` are kept in it, in
        half the memory, to the same results.

    Raises
    ------
    CheckpointError : as `spectralx.checkpoints.load` and `Checkpoint.build`.
    """
    folder = folder_at(path)
    manifest = read_manifest(folder)
    file = checked_tensors(folder, manifest)
    with products_without_memory():
        model = make_model(folder, manifest)
    lowered = products(model) if autocast is not None else set()

    def change(name: str, tensor: Tensor) -> Tensor:
        # A copy starts where products are fastest, and the same wherever the file has the tensor.
        return tensor.to(autocast) if name in lowered else tensor.clone()

    tensors = read_each(file, change)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_names(str(folder), found, own)
    model.load_state_dict(tensors, assign=True)
    note_base(model, manifest.get("base"))
    return model.requires_grad_(False).eval(), manifest
