"""Stage 2 from stage 1, and the names a backbone's tensors have with and without adapters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from torch import Tensor, nn

from spectralx.checkpoints.errors import CheckpointError
from spectralx.checkpoints.folder import Checkpoint, load, note_base
from spectralx.checkpoints.report import Loaded
from spectralx.segmentation import Segmentation

# Tensors that depend on the bands or the image size, which may differ.
_MAY_DIFFER = ("patch_embed.", "pos_embed")
# What an adapter puts before the name of the layer it holds.
_INSIDE_ADAPTER = re.compile(
    r"\.linear(?=\.(weight|bias|bias_mask)$)|(?<=^patch_embed\.proj)\.proj(?=\.(weight|bias)$)"
)
_BACKBONE = "vit_backbone."


def plain_name(name: str) -> str:
    """The name of a layer's tensor, whether or not an adapter holds the layer."""
    return _INSIDE_ADAPTER.sub("", name)


def backbone_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Public name -> own name and tensor, of the backbone of a model of either stage."""
    prefix = _BACKBONE if isinstance(model, Segmentation) else ""
    return {
        plain_name(name.removeprefix(prefix)): (name, tensor)
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }


def initialise_from_stage1(
    model: nn.Module, stage1: Checkpoint | nn.Module | str | os.PathLike[str]
) -> Loaded:
    """Copy tokenizer, backbone, adapters and norms of stage 1 into a stage-2 model, by name.

    Tensors that depend on the bands or on the image size stay as they are where shapes differ;
    what else the backbone has under the same name must have the same shape.

    Parameters
    ----------
    model : a `Segmentation`.
    stage1 : a checkpoint of a `MaskedReconstruction`, its folder, or such a model.

    Returns
    -------
    What was copied and what was not.

    Raises
    ------
    CheckpointError : not a stage-1 checkpoint, nothing in common, or other sizes; the model is
        unchanged.
    """
    base = None
    if isinstance(stage1, nn.Module):
        where, tensors = "stage1", stage1.state_dict()
        base = getattr(stage1, "base_weights", None)
    else:
        checkpoint = stage1 if isinstance(stage1, Checkpoint) else load(stage1)
        where, tensors = str(checkpoint.path), checkpoint.tensors
        kind = checkpoint.manifest["model"]
        if kind != "reconstruction":
            raise CheckpointError(
                f"{where}: got a checkpoint of a {kind} model, expected one of reconstruction"
            )
        base = checkpoint.manifest.get("base")
    report = _copy_by_name(model, tensors, where)
    note_base(model, base)
    return report


def _copy_by_name(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Loaded:
    """Copy what `tensors` have of the backbone of `model`, adapted or not on either side."""
    theirs = {plain_name(name): tensor for name, tensor in tensors.items()}
    copied: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    placed = set()
    for plain, (name, own) in backbone_tensors(model).items():
        placed.add(plain)
        if plain not in theirs:
            kept[name] = "not there"
        elif theirs[plain].shape == own.shape:
            copied[name] = theirs[plain]
        else:
            shapes = f"got shape {list(theirs[plain].shape)}, expected {list(own.shape)}"
            if not plain.startswith(_MAY_DIFFER):
                raise CheckpointError(f"{where}: {plain}: {shapes}")
            kept[name] = shapes
    if not any("blocks." in name for name in copied):
        raise CheckpointError(f"{where}: got no blocks of a transformer, expected its tensors")
    model.load_state_dict(copied, strict=False)
    left_out = {name: "no place in stage 2" for name in theirs if name not in placed}
    return Loaded(where, "stage 1", None, list(copied), left_out=left_out, missing=kept)
