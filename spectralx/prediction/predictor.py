"""A trained segmentation, ready to predict."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spectralx import checkpoints
from spectralx.cli import InputError
from spectralx.data.normalise import AnyNormalisation, restore_normalisation
from spectralx.prediction.bands import for_bands, normalisation_for_bands
from spectralx.prediction.tiles import whole_cells
from spectralx.segmentation import Segmentation

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

LARGEST_TILE = 8192  # pixels a side that a checkpoint may ask for by itself

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Predictor:
    """A model with what it needs to know about images.

    Attributes
    ----------
    model : in evaluation mode, on its device.
    normalisation : of the images it was trained on.
    class_names : by index, the unlabelled class first.
    wavelengths : of its bands in µm, where they are known.
    digest : sha256 of weights and manifest.
    precision : as Lightning names it.
    crop : how training images got to the model's size, where the checkpoint says so.
    tile_size : height and width, in pixels of the files, that an image of training covered, where
        the checkpoint says so.
    """

    model: Segmentation
    normalisation: AnyNormalisation
    class_names: tuple[str, ...]
    wavelengths: tuple[float, ...] | None
    digest: str
    precision: Precision = "32-true"
    crop: str | None = None
    tile_size: tuple[int, int] | None = None

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the model's logits."""
        return self.model.logits_size

    @property
    def window(self) -> tuple[int, int]:
        """Height and width in a scene of what the model sees at once, unless asked otherwise.

        What an image of training covered, to whole cells; the model's image size where the
        checkpoint does not say.
        """
        return whole_cells(self.tile_size or self.model.image_size, self.cells)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, classes, *cells]."""
        with contextlib.ExitStack() as stack:
            if self.precision in _AUTOCAST:
                dtype = _AUTOCAST[self.precision]
                stack.enter_context(torch.autocast(self.device.type, dtype=dtype))
            found: Tensor = self.model(images)
        return found

    def for_bands(self, wavelengths: Sequence[float]) -> Predictor:
        """This predictor for the bands of another sensor, in µm; not retrained."""
        if self.wavelengths is None:
            raise InputError(
                "adapt_bands: found a checkpoint without wavelengths; expected them, to resample by"
            )
        return dataclasses.replace(
            self,
            model=for_bands(self.model, wavelengths),
            normalisation=normalisation_for_bands(
                self.normalisation, self.wavelengths, wavelengths
            ),
            wavelengths=tuple(wavelengths),
        )


def load_predictor(
    checkpoint: str | Path, *, device: str | None = None, precision: Precision = "32-true"
) -> Predictor:
    """The segmentation of a checkpoint.

    Parameters
    ----------
    checkpoint : its folder.
    device : "cpu", "cuda", ...; the GPU where there is one by default.
    precision : "32-true", "bf16-mixed" or "16-mixed" (autocast).

    Raises
    ------
    ValueError : a checkpoint that cannot be used, is not one of stage 2, or does not say how images
        are scaled.
    """
    if precision not in get_args(Precision):
        raise InputError(
            f"precision: found {precision!r}; expected one of {', '.join(get_args(Precision))}"
        )
    path = Path(checkpoint)
    # Before the weights are read: what cannot predict is known at once.
    manifest = checkpoints.read_manifest(checkpoints.folder_at(path))
    if manifest["model"] != "segmentation":
        raise InputError(
            f"{path}: found a checkpoint of a {manifest['model']} model; expected a "
            "segmentation, as stage 2 trains"
        )
    if not manifest.get("normalisation"):
        raise InputError(
            f"{path}: found a checkpoint without normalisation; expected one that "
            "spectralx.train wrote, or that was saved with it"
        )
    model, _ = checkpoints.load_lean(path, _AUTOCAST.get(precision))
    assert isinstance(model, Segmentation)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = manifest.get("class_names")
    if names is None:
        names = ["unlabelled", *(f"class {index}" for index in range(1, model.num_classes))]
    if len(names) != model.num_classes:
        raise InputError(f"{path}: found {len(names)} class names; expected {model.num_classes}")
    wavelengths = manifest.get("wavelengths") or model.config["wavelengths"]
    extra = manifest.get("extra") or {}
    settings = extra.get("settings") or {}
    return Predictor(
        model,
        restore_normalisation(manifest["normalisation"]),
        tuple(names),
        None if wavelengths is None else tuple(wavelengths),
        hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
        precision,
        settings.get("data", {}).get("crop"),
        _tile_size(path, extra.get("tile_size")),
    )


def _tile_size(path: Path, stated: Any) -> tuple[int, int] | None:
    """The tile size of a manifest, if it has one."""
    if stated is None:
        return None
    plausible = isinstance(stated, list) and len(stated) == 2
    if not plausible or any(type(x) is not int or not 1 <= x <= LARGEST_TILE for x in stated):
        raise InputError(
            f"{path}: tile_size: found {stated!r}; expected height and width, 1 to {LARGEST_TILE}"
        )
    return stated[0], stated[1]
