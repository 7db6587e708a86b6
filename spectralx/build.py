"""Models of both stages from the settings of an experiment and the data they meet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectralx import checkpoints
from spectralx.checkpoints.reading import sha256_of
from spectralx.cli import InputError
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from spectralx.settings import FROM_STAGE1, Settings


def reconstruction_model(settings: Settings, wavelengths: Sequence[float]) -> MaskedReconstruction:
    """The stage-1 model for bands centred at `wavelengths` (micrometres)."""
    model, stage = settings.model, settings.stage1
    if model.family == "dinov3":
        raise InputError("model.family: found dinov3; expected scalemae or satmae++ in stage 1")
    hypert = {
        "stem_dim": model.stem_dim,
        "num_heads": model.tokenizer_heads,
        "low_rank": model.low_rank,
    }
    return MaskedReconstruction(
        model.family,
        in_channels=len(wavelengths),
        wavelengths=list(wavelengths),
        adapter=model.adapter,
        image_size=settings.data.image_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        decoder_embed_dim=stage.decoder_dim,
        decoder_depth=stage.decoder_depth,
        decoder_num_heads=stage.decoder_heads,
        fcn_dim=stage.fcn_dim,
        fcn_layers=stage.fcn_layers,
        up_dim=stage.up_dim,
        mask_ratio=stage.mask_ratio,
        resolution=model.resolution,
        adapted_blocks=model.adapted_blocks,
        adapter_options=dict(model.adapter_options),
        tokenizer_options=hypert if model.adapter == "aomoa" else None,
        trainable="all" if model.trainable == "all" else "official",
    )


def segmentation_model(
    settings: Settings, wavelengths: Sequence[float], num_classes: int
) -> Segmentation:
    """The stage-2 model for bands centred at `wavelengths`; class 0 is "unlabelled"."""
    model, stage = settings.model, settings.stage2
    return Segmentation(
        model.family,
        len(wavelengths),
        num_classes,
        list(wavelengths),
        image_size=settings.data.image_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        feature_blocks=model.feature_blocks,
        adapter=model.adapter,
        adapted_blocks=model.adapted_blocks,
        adapter_options=dict(model.adapter_options),
        trainable=model.trainable,
        resolution=model.resolution,
        stem_dim=model.stem_dim,
        tokenizer_heads=model.tokenizer_heads,
        low_rank=model.low_rank,
        decoder=stage.decoder,
        decoder_kernel=stage.decoder_kernel,
        neck_channels=stage.neck_channels,
        neck_scales=stage.neck_scales,
        head_channels=stage.head_channels,
        dropout=stage.dropout,
    )


def stage1_checkpoint(settings: Settings) -> Path | None:
    """Where stage 2 starts from: a folder, or None for a start without stage 1.

    Raises
    ------
    InputError : "stage1" is asked for, and this experiment has no checkpoint of it.
    """
    if settings.stage2.init_from is None:
        return None
    if settings.stage2.init_from != FROM_STAGE1:
        return Path(settings.stage2.init_from)
    folder = Path(settings.out) / "stage1" / "best"
    if not (folder / checkpoints.MANIFEST).is_file():
        raise InputError(
            f"stage2.init_from: found no checkpoint {folder}; expected stage 1 to be trained, a "
            "folder of a checkpoint, or null to start without"
        )
    return folder


def initialise(
    model: MaskedReconstruction | Segmentation, settings: Settings
) -> checkpoints.Loaded | None:
    """Copy the weights `model` starts from: stage 1's, or the backbone's public ones, or none.

    Raises
    ------
    ValueError : a checkpoint that is missing or of other sizes; the model is unchanged.
    """
    stage1 = stage1_checkpoint(settings) if isinstance(model, Segmentation) else None
    if stage1 is not None:
        return checkpoints.initialise_from_stage1(model, stage1)
    own = settings.model
    if own.backbone_weights is not None:
        return checkpoints.initialise_backbone(
            model,
            own.backbone_weights,
            bands=own.backbone_bands,
            wavelengths=own.backbone_wavelengths,
        )
    return None


def start_identity(stage: str, settings: Settings) -> str | None:
    """Hash of the file of weights that `stage` starts from; None where it starts without.

    Raises
    ------
    ValueError : the file is missing.
    """
    stage1 = stage1_checkpoint(settings) if stage == "stage2" else None
    if stage1 is not None:
        return str(checkpoints.read_manifest(stage1)["tensors"]["sha256"])
    weights = settings.model.backbone_weights
    if weights is None:
        return None
    if not Path(weights).is_file():
        raise InputError(f"model.backbone_weights: found no file {weights}; expected one")
    return sha256_of(Path(weights))
