"""What is to be done for a scene, known from its header alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from spectralx.cli import InputError
from spectralx.data.normalise import MeasuredNormalisation
from spectralx.data.raster import open_raster
from spectralx.prediction.bands import choose_bands
from spectralx.prediction.output import Georeference
from spectralx.prediction.predictor import Predictor
from spectralx.prediction.scene import SceneReading
from spectralx.prediction.store import Layer
from spectralx.prediction.tiles import Axis, map_offset, overlap_cells, plan_axis, tile_pixels
from spectralx_kernels import __version__

Probabilities = Literal["none", "top", "all"]

CLASSES = "classes"
PROBABILITY = "probability"
BATCH_ON_GPU, BATCH_ON_CPU = 8, 2


@dataclass(frozen=True)
class Options:
    """How scenes are predicted.

    Attributes
    ----------
    window : side, or (height, width), in pixels of the scene of what the model sees at once; None
        for what an image of its training covered. Tiles of another size than the model's are
        resized to it.
    overlap : share of a tile that it has in common with its neighbour, 0 to 0.5.
    batch_size : tiles at a time; None for 8 on a GPU and 2 on a CPU, where more take memory and no
        less time.
    probabilities : "none"; "top", a second file of the probability of the map's class; or "all",
        of every class, one band each.
    quicklook : write a PNG of scene and map.
    wavelengths : of the scene's bands in µm, instead of what the file states.
    adapt_bands : resample HyperT's weights to the scene's bands if the model was trained on others.
    nodata : value of missing pixels for files that state none.
    statistics_from : another GeoTIFF whose extremes scale the bands, for models trained with
        per-image scaling; None takes the scene's own.
    """

    window: int | tuple[int, int] | None = None
    overlap: float = 0.25
    batch_size: int | None = None
    probabilities: Probabilities = "none"
    quicklook: bool = True
    wavelengths: tuple[float, ...] | None = None
    adapt_bands: bool = False
    nodata: float | None = None
    statistics_from: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size: found {self.batch_size}; expected at least 1")
        if self.probabilities not in get_args(Probabilities):
            raise InputError(
                f"probabilities: found {self.probabilities!r}; expected one of "
                + ", ".join(get_args(Probabilities))
            )


@dataclass(frozen=True)
class Job:
    """A scene, the predictor for its bands, and where its tiles lie."""

    predictor: Predictor
    reading: SceneReading
    rows: Axis
    columns: Axis
    place: Georeference
    options: Options
    output: Path

    @property
    def batch_size(self) -> int:
        """Tiles at a time."""
        on_gpu = self.predictor.device.type == "cuda"
        return self.options.batch_size or (BATCH_ON_GPU if on_gpu else BATCH_ON_CPU)

    @property
    def probability(self) -> Path | None:
        """File of probabilities."""
        if self.options.probabilities == "none":
            return None
        return self.output.with_name(f"{self.output.stem}_probability.tif")

    @property
    def quicklook(self) -> Path | None:
        """File of the picture."""
        return self.output.with_suffix(".png") if self.options.quicklook else None

    @property
    def categories(self) -> Path:
        """GDAL's sidecar, with the names of the classes."""
        return self.output.with_name(f"{self.output.name}.aux.xml")

    def fingerprint(self) -> str:
        """Of everything the output depends on."""
        other = self.options.statistics_from
        plan = {
            "version": __version__,
            "checkpoint": self.predictor.digest,
            "precision": self.predictor.precision,
            "device": self.predictor.device.type,
            "scene": _file_facts(self.reading.info.path),
            "bands": self.reading.bands,
            "statistics": None if other is None else _file_facts(Path(other)),
            "options": asdict(self.options),
        }
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def layers(self) -> dict[str, Layer]:
        """What is written."""
        info, classes = self.reading.info, len(self.predictor.class_names)
        dtype = "uint8" if classes <= 256 else "uint16"
        made = [Layer(CLASSES, dtype, 1, info.height, info.width)]
        if self.options.probabilities != "none":
            bands = classes if self.options.probabilities == "all" else 1
            made.append(Layer(PROBABILITY, "uint8", bands, info.height, info.width))
        return {layer.name: layer for layer in made}


def _file_facts(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def prepare(predictor: Predictor, scene: str | Path, output: str | Path, options: Options) -> Job:
    """What is to be done for a scene, from its header alone.

    Raises
    ------
    ValueError : a file that is no GeoTIFF, bands the model was not trained on, options that do not
        fit, an output that is the scene itself or a folder.
    """
    scene, output = Path(scene), Path(output)
    with open_raster(scene) as raster:
        info, place = raster.info, Georeference.of(raster)
    if output.is_dir() or (output.exists() and output.samefile(scene)):
        raise InputError(
            f"{output}: found {'a folder' if output.is_dir() else 'the scene itself'}; expected "
            "the name of a new GeoTIFF"
        )
    if options.statistics_from is not None and isinstance(
        predictor.normalisation, MeasuredNormalisation
    ):
        raise InputError(
            f"statistics_from: found {options.statistics_from} for a model that has the statistics "
            "of its training; expected none"
        )
    stated = options.wavelengths or info.wavelengths
    try:
        bands = choose_bands(
            scene, info.bands, stated, predictor.wavelengths, predictor.model.in_channels
        )
    except InputError:
        if not options.adapt_bands or stated is None or len(stated) != info.bands:
            raise
        bands = list(range(info.bands))
        predictor = predictor.for_bands(stated)
    window = predictor.window if options.window is None else options.window
    tile = tile_pixels(window, predictor.cells)
    axes = [
        plan_axis(
            pixels,
            tile=cells,
            cell=side // cells,
            overlap=overlap_cells(options.overlap, cells),
            offset=offset,
        )
        for pixels, side, cells, offset in zip(
            (info.height, info.width),
            tile,
            predictor.cells,
            map_offset(info.transform),
            strict=True,
        )
    ]
    nodata = info.nodata if info.nodata is not None else options.nodata
    reading = SceneReading(info, tuple(bands), nodata)
    return Job(predictor, reading, axes[0], axes[1], place, options, output)
