"""Data: readers of the data sets' own layouts, tasks by name, augmentation.

``build_task("WS-WD", root)`` gives the datasets of a task; each dataset, and the task, states its
``wavelengths`` (µm), ``bands``, ``class_names`` (index 0: "unlabelled") and ``num_classes``.
Synthetic scenes in the same layouts are written by :mod:`spectralx.data.scenes`.
"""

from .augment import (
    Compose,
    RandomCrop,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCrop,
    Resize,
    Transform,
)
from .dfc2020 import Dfc2020
from .domains import Domains, described_domains
from .folder import FolderDataset
from .foreign import ForeignDataset, domains_of, domains_of_datamodule
from .mts12 import Mts12
from .normalise import (
    FixedStatistics,
    ImageMinMax,
    Normalisation,
    Whitened,
    fit_statistics,
    fit_whitening,
)
from .raster import DataError, RasterInfo, raster_info, read_image, read_raster, write_raster
from .samples import ImageDataset, Sample, collate, finish
from .tasks import Task, build_task, register_task, task_names
from .tiles import Pair, TileDataset
from .whu_ohs import WhuOhs, WhuOhsTransfer

__all__ = [
    "Compose",
    "DataError",
    "Dfc2020",
    "Domains",
    "FixedStatistics",
    "FolderDataset",
    "ForeignDataset",
    "ImageDataset",
    "ImageMinMax",
    "Mts12",
    "Normalisation",
    "Pair",
    "RandomCrop",
    "RandomFlip",
    "RandomQuarterTurn",
    "RandomResizedCrop",
    "RasterInfo",
    "Resize",
    "Sample",
    "Task",
    "TileDataset",
    "Transform",
    "Whitened",
    "WhuOhs",
    "WhuOhsTransfer",
    "build_task",
    "collate",
    "described_domains",
    "domains_of",
    "domains_of_datamodule",
    "finish",
    "fit_statistics",
    "fit_whitening",
    "raster_info",
    "read_image",
    "read_raster",
    "register_task",
    "task_names",
    "write_raster",
]
