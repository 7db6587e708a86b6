"""Checkpoints: our own, adapters alone, public weights of backbones, the published layout.

``python -m spectralx.checkpoints inspect FILE`` says what a file is. README.md in this folder has
the formats, and what loads from where.
"""

from spectralx.checkpoints.adapters import Adapters, load_adapters, read_adapters, save_adapters
from spectralx.checkpoints.backbone import Bands, initialise_backbone
from spectralx.checkpoints.errors import CheckpointError
from spectralx.checkpoints.folder import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Checkpoint,
    folder_at,
    load,
    read_manifest,
    save,
)
from spectralx.checkpoints.inspection import inspect
from spectralx.checkpoints.lean import load_lean
from spectralx.checkpoints.official import export_official, load_official
from spectralx.checkpoints.report import Loaded
from spectralx.checkpoints.transfer import initialise_from_stage1

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "Adapters",
    "Bands",
    "Checkpoint",
    "CheckpointError",
    "Loaded",
    "export_official",
    "folder_at",
    "initialise_backbone",
    "initialise_from_stage1",
    "inspect",
    "load",
    "load_adapters",
    "load_lean",
    "load_official",
    "read_adapters",
    "read_manifest",
    "save",
    "save_adapters",
]
