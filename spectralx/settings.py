"""Everything an experiment is made of, as typed settings with the paper's as defaults.

`spectralx.options` reads them from YAML and the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from spectralx.run_settings import OptimizerSettings, RunSettings, TrainerSettings
from spectralx.run_settings import require as _require

__all__ = [
    "FROM_STAGE1",
    "DataSettings",
    "ModelSettings",
    "OptimizerSettings",
    "RunSettings",
    "Settings",
    "Stage1Settings",
    "Stage2Settings",
    "TrainerSettings",
]

FROM_STAGE1 = "stage1"

Family = Literal["scalemae", "satmae++", "dinov3"]
Adapter = Literal["aomoa", "lora", "slr", "ia3"]


@dataclass
class DataSettings:
    """What is learnt from and scored on.

    Parameters
    ----------
    root
        Folder of the data set.
    task
        Name of a task, e.g. WS-WD; "folder" for a folder of tiles (spectralx.data.tasks lists
        them all); or a YAML file that describes data of your own (root plays no part then).
    image_size
        Side in pixels that the model sees.
    crop
        How training images get there: "resize", "crop" or "resized-crop".
    flips
        Random flips of training images.
    turns
        Random quarter turns of training images.
    spectral_jitter
        Deviation of a random offset of each band of a training image, in the units of what
        normalisation gives, whose bands vary by 1 on average where whitened, by 0.25 where fixed.
    normalisation
        "image" scales each band of each image to [0, 1] by its own extremes (the paper's);
        "fixed" by the mean and deviation of each band over the training images; "whitened" takes
        the correlation of the bands away as well, for hyperspectral images.
    label_offset
        Rows down and columns to the right, in pixels, from where a label stands to the place in
        the image that it describes, where the two are not laid over each other exactly. Images are
        resampled to their labels, in training and in tests; maps of scenes are where the scene is.
    official
        The published protocol: selection on the target domain, scores at the model's size,
        classes absent from the truth dropped, scores never reset between validations.
    cache
        Keep all images in memory: for small data sets.
    cache_folder
        Keep decoded images in this folder, on a fast disk, and read them from there.
    scale_on
        Where training images are scaled and resized: "workers" as they are read, "device" from the
        type they are stored in, "auto" on a GPU where there is one.
    workers
        Processes that read data; 0 reads in the main process.
    skip_damaged
        Leave files that cannot be read out of training and validation, named and counted; by
        default one ends the run. All files are read once before the first step to find them.
    wavelengths
        Band centres in micrometres, for folders whose files do not state them.
    class_names
        Names of the classes from 1 on, for folders; null names them by number.
    nodata
        Value of missing pixels, for folders whose files do not state it.
    """

    root: str = "data"
    task: str = "WS-WD"
    image_size: int = 224
    crop: Literal["resize", "crop", "resized-crop"] = "resize"
    flips: bool = True
    turns: bool = True
    spectral_jitter: float = 0.0
    normalisation: Literal["image", "fixed", "whitened"] = "image"
    label_offset: tuple[float, float] = (0.0, 0.0)
    official: bool = False
    cache: bool = False
    cache_folder: str | None = None
    scale_on: Literal["auto", "workers", "device"] = "auto"
    workers: int = 0
    skip_damaged: bool = False
    wavelengths: list[float] | None = None
    class_names: list[str] | None = None
    nodata: float | None = None

    def __post_init__(self) -> None:
        _require(self.image_size > 0, "data.image_size", self.image_size, "at least 1")
        jitter = self.spectral_jitter
        _require(jitter >= 0, "data.spectral_jitter", jitter, "at least 0")
        _require(self.workers >= 0, "data.workers", self.workers, "at least 0")
        _require(
            not self.cache or self.cache_folder is None,
            "data.cache_folder",
            self.cache_folder,
            "null with data.cache, which keeps images in memory",
        )


@dataclass
class ModelSettings:
    """The backbone and what adapts it, the same in both stages.

    Parameters
    ----------
    family
        Backbone: scalemae, satmae++ or dinov3 (stage 2 only).
    patch_size
        Side of a patch in pixels; with HyperT 1, 2 or a multiple of 4. ScaleMAE takes 16 alone in
        stage 1.
    embed_dim
        Width of a token.
    depth
        Number of transformer blocks.
    num_heads
        Attention heads of a block.
    adapter
        What adapts the backbone: aomoa (with HyperT), lora, slr, ia3 (with a patch convolution)
        or null.
    adapter_options
        Keywords of the adapter, e.g. {experts: 8} or {rank: 8}.
    adapted_blocks
        Blocks that get the adapter; null takes every sixth.
    feature_blocks
        Four blocks whose tokens stage 2 sees; null takes the last of each quarter.
    trainable
        "adapters" trains what the paper trains on a pre-trained backbone; "all" trains the
        backbone too, for one that starts from scratch.
    backbone_weights
        File of the backbone's public weights to start from; stage 2 takes them only where it
        does not start from stage 1.
    backbone_bands
        Where that file has other bands than the data: "wavelength" fits its patch convolution (and
        the heads of stage 1) by wavelength, "official" repeats its bands as the published code
        does, "start" leaves the model's at their start. HyperT has no patch convolution.
    backbone_wavelengths
        Of that file's bands, in micrometres; null where they are known (RGB, SatMAE++ on
        Sentinel-2).
    resolution
        Metres on the ground a pixel covers, for positions.
    stem_dim
        Width of HyperT's feature map.
    tokenizer_heads
        Attention heads of HyperT.
    low_rank
        Width of HyperT's low-rank path.
    """

    family: Family = "scalemae"
    patch_size: int = 16
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    adapter: Adapter | None = "aomoa"
    adapter_options: dict[str, int] = field(default_factory=dict)
    adapted_blocks: list[int] | None = None
    feature_blocks: list[int] | None = None
    trainable: Literal["adapters", "all"] = "adapters"
    backbone_weights: str | None = None
    backbone_bands: Literal["wavelength", "official", "start"] = "wavelength"
    backbone_wavelengths: list[float] | None = None
    resolution: float = 10.0
    stem_dim: int = 512
    tokenizer_heads: int = 8
    low_rank: int = 16

    def __post_init__(self) -> None:
        heads = max(self.num_heads, 1)
        _require(
            self.num_heads > 0 and self.embed_dim % heads == 0,
            "model.embed_dim",
            self.embed_dim,
            f"a multiple of num_heads, {self.num_heads}",
        )
        for name in ("adapted_blocks", "feature_blocks"):
            blocks = getattr(self, name)
            _require(
                blocks is None or all(0 <= block < self.depth for block in blocks),
                f"model.{name}",
                blocks,
                f"blocks 0 to {self.depth - 1}",
            )


@dataclass
class Stage1Settings:
    """Masked reconstruction.

    Parameters
    ----------
    run
        Length and batch.
    optimizer
        AdamW and its schedule.
    mask_ratio
        Share of patches hidden.
    decoder_dim
        Width of the decoder.
    decoder_depth
        Blocks of the decoder; null takes the family's, 8 (satmae++) or 3 (scalemae).
    decoder_heads
        Attention heads of the decoder.
    fcn_dim
        Width of ScaleMAE's two convolutional heads.
    fcn_layers
        Blocks of ScaleMAE's two convolutional heads.
    up_dim
        Width of SatMAE++'s convolutions to the image of twice the side; null takes four times the
        bands, which is much for a hyperspectral sensor.
    """

    run: RunSettings = field(default_factory=RunSettings)
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(schedule="plateau")
    )
    mask_ratio: float = 0.75
    decoder_dim: int = 512
    decoder_depth: int | None = None
    decoder_heads: int = 16
    fcn_dim: int = 512
    fcn_layers: int = 2
    up_dim: int | None = None

    def __post_init__(self) -> None:
        width = self.up_dim
        _require(width is None or width > 0, "stage1.up_dim", width, "at least 1")
        _require(0 < self.mask_ratio < 1, "stage1.mask_ratio", self.mask_ratio, "between 0 and 1")


@dataclass
class Stage2Settings:
    """Semantic segmentation.

    Parameters
    ----------
    run
        Length and batch.
    optimizer
        AdamW and its schedule.
    init_from
        Checkpoint of stage 1 to start from: a folder, "stage1" for the best of this experiment,
        or null to start without.
    decoder
        What makes logits of the feature maps: "upernet" (the paper's), or "linear", one linear
        layer for each token, for few labels that change from patch to patch; it has no neck.
    decoder_kernel
        Side, odd, of a kernel over tokens that the linear decoder adds to each channel, for what a
        sensor blurs and for labels a little beside the image; 1 is none. Where labels are beside
        it to one side, data.flips and data.turns hide to which.
    head_channels
        Width of the UPerNet head.
    neck_channels
        Width of the feature pyramid; null takes the backbone's.
    neck_scales
        Size of each map of the pyramid over the map of tokens, the largest first, one a feature
        block; null takes 4, 2, 1, 1/2. With a patch for each pixel, 1 and less are enough.
    dropout
        Channel dropout before the classes.
    label_smoothing
        Share of the target spread over all classes.
    cutmix
        Probability of a training image to have a random rectangle replaced, labels with it, by
        that of another image of its batch: against learning few scenes by heart.
    class_weights
        "balanced" weights each class by the inverse square root of its share of the training
        pixels.
    """

    run: RunSettings = field(default_factory=lambda: RunSettings(steps=30_000))
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    init_from: str | None = FROM_STAGE1
    decoder: Literal["upernet", "linear"] = "upernet"
    decoder_kernel: int = 1
    head_channels: int = 512
    neck_channels: int | None = None
    neck_scales: list[float] | None = None
    dropout: float = 0.1
    label_smoothing: float = 0.0
    cutmix: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"

    def __post_init__(self) -> None:
        _require(0 <= self.cutmix <= 1, "stage2.cutmix", self.cutmix, "0 to 1")
        kernel = self.decoder_kernel
        _require(
            kernel % 2 == 1 and (kernel == 1 or (kernel > 1 and self.decoder == "linear")),
            "stage2.decoder_kernel",
            kernel,
            "an odd number, and 1 with UPerNet",
        )
        for name in ("neck_channels", "neck_scales"):
            found = getattr(self, name)
            _require(
                self.decoder == "upernet" or found is None,
                f"stage2.{name}",
                found,
                "null with the linear decoder",
            )


@dataclass
class Settings:
    """One experiment.

    Parameters
    ----------
    data
        What is learnt from.
    model
        What learns.
    stage1
        Masked reconstruction.
    stage2
        Segmentation.
    trainer
        The machine.
    out
        Folder for checkpoints, logs and pictures; each stage has its own folder in it.
    seed
        Of everything random.
    """

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    stage1: Stage1Settings = field(default_factory=Stage1Settings)
    stage2: Stage2Settings = field(default_factory=Stage2Settings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    out: str = "runs/spectralx"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        for stage in ("stage1", "stage2"):
            patience = getattr(self, stage).run.early_stopping
            _require(
                patience is None or not self.data.official,
                f"{stage}.run.early_stopping",
                patience,
                "null with data.official, which validates on the target domain",
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as YAML and JSON hold them."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
