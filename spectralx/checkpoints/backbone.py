"""Public weights of a backbone into a model of either stage, tensor by tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spectralx.adapters import ConvAdapter, LinearAdapter
from spectralx.backbones.dinov3 import DINOv3
from spectralx.backbones.positions import sincos_positions
from spectralx.checkpoints.errors import CheckpointError, some
from spectralx.checkpoints.folder import note_base
from spectralx.checkpoints.official import without_prefixes
from spectralx.checkpoints.reading import Source, read_file
from spectralx.checkpoints.report import Loaded
from spectralx.checkpoints.resample import (
    band_interpolation,
    band_weights,
    resample_bands,
    resample_patches,
    resample_positions,
)
from spectralx.checkpoints.sources import Weights, translate
from spectralx.checkpoints.transfer import backbone_tensors
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from spectralx_kernels import AoMoALinear, HyperT

Bands = Literal["wavelength", "official", "start"]

SAME_BAND = 0.03  # micrometres: bands this near are the same band
_FIXED_TOLERANCE = 2e-3  # of a table that was rounded to bfloat16 or float16
_PATCH_WEIGHT = "patch_embed.proj.weight"
# Heads of stage 1 that predict bands, and the dimension of their bands.
_PREDICTS = re.compile(r"^(decoder_pred\.(weight|bias)|fcn_(high|low)\.pred\.7\.(weight|bias))$")
# Stage 1's tensors that are as wide as there are bands; they train.
_BAND_WIDE = re.compile(r"^(proj_up_(conv|norm)|up_block)\.")
_DECODER = re.compile(r"^(decoder_|mask_token|fpn\.|fcn\.|fcn_|proj_up_|up_block)")
_CLASSIFIER = re.compile(r"^(head|head_dist|fc_norm|pre_logits)\.")
_CONSTANT = re.compile(r"(^rope_embed\.periods|\.bias_mask)$")


@dataclass
class _Plan:
    """What is to be copied, by own name, and the four lists of the report by public name."""

    copied: dict[str, Tensor] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)


def initialise_backbone(
    model: MaskedReconstruction | Segmentation,
    weights: Source,
    *,
    bands: Bands = "wavelength",
    wavelengths: Sequence[float] | None = None,
    strict: bool = True,
    sha256: str | None = None,
) -> Loaded:
    """Copy the public weights of a backbone into a model of either stage, name by name.

    For SatMAE++ (also trained on groups of bands), ScaleMAE, MAE, timm's ViTs, and DINOv3 in its
    own names or those of transformers or timm. What adapters stand beside gets its weights inside
    them. Half-precision files are converted.

    Parameters
    ----------
    model : its sizes of tokens and blocks must be those of the weights.
    weights : a file or a state dict, as `reading.read_file` takes them.
    bands : where the file has other bands than the model: "wavelength" makes the patch
        convolution and the heads of stage 1 fit by wavelength (`resample.band_weights`);
        "official" repeats them as the paper's code does, where the model's number of bands is a
        multiple, and leaves them at their start otherwise; "start" leaves them at their start.
    wavelengths : of the file's bands, micrometres, in the order of its channels; known for RGB
        and for SatMAE++ on Sentinel-2.
    strict : refuse names in the file that nothing is known of, and a file without some of the
        backbone's tensors; otherwise they are reported.
    sha256 : what the file must have; see `reading.read_file`.

    Returns
    -------
    What was loaded, adapted, left out and missing.

    Raises
    ------
    CheckpointError : unreadable, not a backbone, other sizes, or see `strict`; the model is
        unchanged.
    """
    if bands not in get_args(Bands):
        raise ValueError(f"bands: got {bands!r}, expected one of {', '.join(get_args(Bands))}")
    file = read_file(weights, sha256=sha256)
    found = translate(file.where, without_prefixes(file.tensors))
    if wavelengths is not None:
        found = Weights(
            found.source, found.tensors, tuple(wavelengths), found.adapted, found.left_out
        )
    plan = _Placing(model, found, file.where, bands).plan()
    if strict and plan.unexpected:
        raise CheckpointError(
            f"{file.where}: {len(plan.unexpected)} tensors not expected: {some(plan.unexpected)}"
        )
    required = [name for name, why in plan.missing.items() if why == _ABSENT]
    if strict and required:
        raise CheckpointError(f"{file.where}: {len(required)} tensors missing: {some(required)}")
    plan.left_out |= dict.fromkeys(plan.unexpected, "not known here")
    model.load_state_dict(plan.copied, strict=False)
    note_base(
        model,
        {"file": Path(file.where).name, "source": found.source, "sha256": file.sha256},
    )
    return Loaded(
        file.where,
        found.source,
        file.sha256,
        plan.loaded,
        plan.adapted,
        plan.left_out,
        plan.missing,
    )


_ABSENT = "not in the file"


class _Placing:
    """Finds a place in `model` for each tensor of `found`; nothing is changed."""

    def __init__(
        self, model: MaskedReconstruction | Segmentation, found: Weights, where: str, bands: Bands
    ) -> None:
        self.model, self.found, self.where, self.bands = model, found, where, bands
        self.own = backbone_tensors(model)
        backbone = model.vit_backbone if isinstance(model, Segmentation) else model
        self.dinov3 = isinstance(backbone, DINOv3)
        self.hypert = isinstance(backbone.patch_embed.proj, HyperT)
        self.patch = found.tensors.get(_PATCH_WEIGHT)
        listed = model.config["wavelengths"]
        self.wavelengths = None if listed is None else [float(each) for each in listed]

    def plan(self) -> _Plan:
        plan = _Plan(left_out=dict(self.found.left_out))
        tensors = self._fold_layer_scale(plan)
        for name, tensor in tensors.items():
            why = self._no_place(name, tensor)
            if why is not None:
                plan.left_out[name] = why
            elif name not in self.own or self._is_added(name):
                plan.unexpected.append(name)
            else:
                self._place(plan, name, tensor)
        placed = {*plan.loaded, *plan.adapted, *plan.missing}
        for name in self.own:
            if name not in placed:
                plan.missing[name] = self._why_missing(name)
        return plan

    def _place(self, plan: _Plan, name: str, tensor: Tensor) -> None:
        own_name, own = self.own[name]
        if name.endswith(".bias_mask") and not torch.equal(tensor.to(own.dtype), own):
            raise CheckpointError(
                f"{self.where}: {name}: got other values, expected 1, and 0 in the key third"
            )
        fitted, how = self._fit(name, tensor, own)
        if fitted is None:
            plan.missing[name] = how or _ABSENT
            plan.left_out[name] = how or _ABSENT
            return
        if fitted.shape != own.shape:
            raise CheckpointError(
                f"{self.where}: {name}: got shape {list(tensor.shape)}, expected {list(own.shape)}"
            )
        plan.copied[own_name] = fitted
        notes = [
            note for note in (plan.adapted.get(name), self.found.adapted.get(name), how) if note
        ]
        if notes:
            plan.adapted[name] = "; ".join(notes)
        else:
            plan.loaded.append(name)

    def _fold_layer_scale(self, plan: _Plan) -> dict[str, Tensor]:
        """The file's tensors, layer scales multiplied into what they scale where none is here."""
        tensors = dict(self.found.tensors)
        if self.dinov3:
            return tensors
        for name in list(tensors):
            match = re.fullmatch(r"(blocks\.\d+)\.ls([12])\.gamma", name)
            if not match:
                continue
            gamma = tensors.pop(name)
            layer = f"{match[1]}.{'attn.proj' if match[2] == '1' else 'mlp.fc2'}"
            for key in (f"{layer}.weight", f"{layer}.bias"):
                if key in tensors:
                    scale = gamma[:, None] if tensors[key].ndim == 2 else gamma
                    tensors[key] = tensors[key] * scale
                    plan.adapted[key] = "times the layer scale"
            plan.left_out[name] = f"multiplied into {layer}"
        return tensors

    def _no_place(self, name: str, tensor: Tensor) -> str | None:
        """Why a known tensor of the file has no place in the model; None if it may have one."""
        if _CLASSIFIER.match(name):
            return "classifier"
        if self.hypert and name.startswith("patch_embed."):
            return "patch convolution, in whose place HyperT stands"
        if name == "pos_embed" and not self.dinov3:
            return self._fixed_positions(tensor)
        if isinstance(self.model, Segmentation):
            if self.dinov3:
                known = self.model.vit_backbone.official_inert
                return "of pre-training" if name in known else None
            if name.startswith("norm."):
                return "final norm, which features of inner blocks do not meet"
            return "decoder of pre-training" if _DECODER.match(name) else None
        if name == "decoder_pos_embed":
            return "fixed table, computed here"
        inert = name == "mask_token_decoder" and self.model.family == "scalemae"
        return "without effect" if inert else None

    def _fixed_positions(self, table: Tensor) -> str | None:
        """Why the file's table is not needed: it is the sine-cosine one. None if learned."""
        dim = self.own["cls_token"][1].shape[-1]
        if "groups" in self.found.source and table.shape[-1] != dim:
            return "fixed table of another width, computed here"
        side = math.isqrt(max(table.shape[1] - 1, 0)) if table.ndim == 3 else 0
        if side < 1 or side**2 != table.shape[1] - 1 or table.shape[2] % 4:
            return None
        fixed = sincos_positions(table.shape[2], (side, side), class_token=True)
        same = torch.allclose(table[0].float(), fixed, rtol=0, atol=_FIXED_TOLERANCE)
        return "fixed table, computed here for the model's grid" if same else None

    def _fit(self, name: str, tensor: Tensor, own: Tensor) -> tuple[Tensor | None, str | None]:
        """`tensor` with the shape of `own` where that can be, and how; None and why it is left."""
        if name == "pos_embed":
            return self._fit_positions(tensor, own)
        if _BAND_WIDE.match(name) and tensor.shape != own.shape:
            return None, "as wide as there are bands"
        if name == _PATCH_WEIGHT and tensor.ndim == 4 and tensor.shape[0] == own.shape[0]:
            fitted, how = self._fit_bands(name, tensor, 1)
            if fitted is not None and fitted.shape[2:] != own.shape[2:]:
                sizes = "x".join(map(str, fitted.shape[2:]))
                fitted = resample_patches(fitted, (own.shape[2], own.shape[3]))
                how = "; ".join(filter(None, (how, f"patches resampled from {sizes}")))
            return fitted, how
        if _PREDICTS.match(name):
            return self._fit_prediction(name, tensor, own)
        return tensor, None

    def _fit_bands(
        self, name: str, tensor: Tensor, dim: int, *, predicts: bool = False
    ) -> tuple[Tensor | None, str | None]:
        """`tensor` with the model's bands along `dim`."""
        held, wanted = tensor.shape[dim], self.model.in_channels
        theirs, ours = self.found.wavelengths, self.wavelengths
        known = theirs is not None and ours is not None and len(theirs) == held
        if held == wanted and (
            not known
            or self.bands != "wavelength"
            or max(abs(a - b) for a, b in zip(theirs or (), ours or (), strict=True)) < SAME_BAND
        ):
            return tensor, None
        if self.bands == "start":
            return None, f"{held} bands in the file, {wanted} here"
        if self.bands == "official":
            if wanted % held:
                return None, f"{wanted} bands are no multiple of the file's {held}"
            times = [wanted // held if axis == dim else 1 for axis in range(tensor.ndim)]
            return tensor.repeat(times), f"{held} bands repeated"
        if theirs is None or ours is None or len(theirs) != held:
            raise CheckpointError(
                f"{self.where}: {name}: got {held} bands, expected {wanted}: fitting them needs "
                "the wavelengths of both (or bands='official' or 'start')"
            )
        if predicts:
            mix = band_interpolation(theirs, ours)
            return resample_bands(tensor, mix, dim), f"{held} bands interpolated by wavelength"
        mix = band_weights(theirs, ours)
        unused = int((mix.sum(1) == 0).sum())
        far = f", {unused} far from all of them at zero" if unused else ""
        return resample_bands(tensor, mix, dim), f"{held} bands fitted by wavelength{far}"

    def _fit_prediction(
        self, name: str, tensor: Tensor, own: Tensor
    ) -> tuple[Tensor | None, str | None]:
        if name.startswith("fcn_"):
            return self._fit_bands(name, tensor, 1 if name.endswith("weight") else 0, predicts=True)
        if self.patch is None or self.patch.ndim != 4:
            return tensor, None
        bands, height, width = self.patch.shape[1:]
        if tensor.shape[0] != bands * height * width or height * width != self.model.patch_size**2:  # type: ignore[union-attr,operator]
            return None, "patches of another size"
        by_band = tensor.unflatten(0, (height * width, bands))
        fitted, how = self._fit_bands(name, by_band, 1, predicts=True)
        return None if fitted is None else fitted.flatten(0, 1), how

    def _fit_positions(self, table: Tensor, own: Tensor) -> tuple[Tensor | None, str | None]:
        if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != own.shape[2]:
            return table, None  # an error of shape
        count = table.shape[1]
        prefix = 0 if math.isqrt(count) ** 2 == count else 1
        side = math.isqrt(count - prefix)
        if side**2 != count - prefix:
            return table, None
        how = []
        if (side, side) != self.model.grid:
            rows, columns = self.model.grid
            table = resample_positions(table, prefix, self.model.grid)
            how.append(f"positions resampled from {side}x{side} to {rows}x{columns}")
        if prefix == 0:
            table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
            how.append("no position of the class token in the file: zero")
        return table, "; ".join(how) or None

    def _is_added(self, name: str) -> bool:
        return self._why_missing(name) in (_ADAPTER, _HYPERT)

    def _why_missing(self, name: str) -> str:
        """Why the model's tensor may well not be in the file; `_ABSENT` if it should be."""
        if self.hypert and name.startswith("patch_embed."):
            return _HYPERT
        owner = self.model.get_submodule(self.own[name][0].rpartition(".")[0])
        if owner in self._adapters():
            return _ADAPTER
        if name == "pos_embed":
            return "fixed table, computed here"
        if _CONSTANT.search(name):
            return "constant"
        if _BAND_WIDE.match(name):
            return "as wide as there are bands"
        return _ABSENT

    def _adapters(self) -> set[nn.Module]:
        """Modules that are, or lie in, an adapter but not in the layer it holds."""
        added: set[nn.Module] = set()
        for module in self.model.modules():
            if isinstance(module, (AoMoALinear, LinearAdapter)):
                added |= {*module.modules()} - {*module.linear.modules()}
            elif isinstance(module, ConvAdapter):
                added |= {*module.modules()} - {*module.proj.modules()}
        return added


_ADAPTER = "adapter"
_HYPERT = "HyperT"
