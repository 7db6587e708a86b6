"""Pictures of a run: learning curves, a reconstruction, a prediction beside its truth, confusion.

Everything is drawn without a display, straight to PNG files.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

# Centres (micrometres) shown as red, green and blue. Infrared, red, green is the standard
# false-colour composite: vegetation is red, water nearly black.
INFRARED = (0.86, 0.66, 0.56)
NATURAL = (0.66, 0.56, 0.48)
_DPI = 110

Curve = tuple[list[float], list[float]]


def composite_bands(
    wavelengths: Sequence[float], centres: Sequence[float] = INFRARED, *, reach: float = 0.1
) -> tuple[int, int, int]:
    """Indices of the three bands shown as red, green and blue.

    Parameters
    ----------
    wavelengths : micrometres, one a band.
    centres : wanted wavelengths. The nearest bands are taken; if one is more than `reach` away,
        three bands spread evenly over the sensor are, longest wavelength first.
    """
    known = np.asarray(wavelengths, dtype=float)
    nearest = [int(np.abs(known - centre).argmin()) for centre in centres]
    far = any(
        abs(known[band] - centre) > reach for band, centre in zip(nearest, centres, strict=True)
    )
    if far:
        order = np.argsort(-known, kind="stable")
        nearest = [int(order[round(part * (len(order) - 1))]) for part in (0.0, 0.5, 1.0)]
    return nearest[0], nearest[1], nearest[2]


def _stretch(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The 2nd and 98th percentile of each channel of `image` [H, W, 3]."""
    low, high = np.nanpercentile(image, (2, 98), axis=(0, 1))
    return low, np.maximum(high - low, 1e-6)


def _composite(image: Tensor, wavelengths: Sequence[float]) -> NDArray[np.float32]:
    bands = list(composite_bands(wavelengths))
    shown = image.detach().float().cpu()[bands].permute(1, 2, 0).numpy()
    return np.asarray(shown, dtype=np.float32)


def _show(axes: Axes, picture: NDArray[np.float32], title: str) -> None:
    axes.imshow(np.nan_to_num(np.clip(picture, 0, 1)), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` under another name first, so that a reader never meets half a file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        FigureCanvasAgg(figure).print_png(str(partial))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def reconstruction(
    path: str | os.PathLike[str],
    images: Tensor,
    predictions: Tensor,
    masks: Tensor,
    wavelengths: Sequence[float],
) -> None:
    """Rows of input, masked input and reconstruction, in false colour.

    The reconstruction shows predicted pixels where the input was masked and the input elsewhere.
    All three share the input's stretch.

    Parameters
    ----------
    path : PNG file to write.
    images, predictions : [B, C, H, W].
    masks : [B, H, W], true or 1 where the model did not see the input.
    wavelengths : micrometres, C of them.
    """
    rows = images.shape[0]
    figure = Figure(figsize=(7.2, 2.5 * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    for row in range(rows):
        image = _composite(images[row], wavelengths)
        low, span = _stretch(image)
        shown = (image - low) / span
        hidden = masks[row].detach().cpu().bool().numpy()[..., None]
        predicted = (_composite(predictions[row], wavelengths) - low) / span
        _show(grid[row, 0], shown, "input")
        _show(grid[row, 1], np.where(hidden, 0.5, shown), f"masked {100 * hidden.mean():.0f} %")
        _show(grid[row, 2], np.where(hidden, predicted, shown), "reconstructed")
    _save(figure, path)


def class_colours(count: int) -> ListedColormap:
    """Black for class 0 (unlabelled) and distinct colours for the others."""
    tables = [*colormaps["tab20"].colors, *colormaps["tab20b"].colors]  # type: ignore[attr-defined]
    return ListedColormap([(0.0, 0.0, 0.0), *(tables[i % len(tables)] for i in range(count - 1))])


def segmentation(
    path: str | os.PathLike[str],
    images: Tensor,
    predictions: Sequence[Tensor],
    truths: Sequence[Tensor],
    class_names: Sequence[str],
    wavelengths: Sequence[float],
) -> None:
    """Rows of false-colour image, prediction and truth, with a legend of the classes shown.

    Parameters
    ----------
    path : PNG file to write.
    images : [B, C, H, W].
    predictions, truths : int64, B of [H, W] each, class 0 unlabelled.
    class_names : one name a class.
    wavelengths : micrometres, C of them.
    """
    rows = images.shape[0]
    colours = class_colours(len(class_names))
    figure = Figure(figsize=(9.2, 2.5 * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False)
    shown: set[int] = set()
    for row in range(rows):
        image = _composite(images[row], wavelengths)
        low, span = _stretch(image)
        _show(grid[row, 0], (image - low) / span, "image")
        for column, (title, labels) in enumerate((("prediction", predictions), ("truth", truths))):
            values = labels[row].detach().cpu().numpy()
            shown.update(int(value) for value in np.unique(values))
            axes = grid[row, column + 1]
            axes.imshow(
                values, cmap=colours, vmin=0, vmax=len(class_names) - 1, interpolation="nearest"
            )
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    handles = [Patch(color=colours(index), label=class_names[index]) for index in sorted(shown)]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    _save(figure, path)


def read_curves(path: str | os.PathLike[str]) -> dict[str, Curve]:
    """Every logged quantity of a ``metrics.csv``: name -> (steps, values)."""
    curves: dict[str, Curve] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name not in ("step", "epoch") and text:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(text))
    return curves


def learning_curves(path: str | os.PathLike[str], curves: Mapping[str, Curve]) -> None:
    """Losses, scores and learning rate over optimiser steps, one panel each.

    Parameters
    ----------
    path : PNG file to write.
    curves : ``<split>/<quantity>`` -> (steps, values), as `read_curves` gives them. Quantities
        named ``loss`` or ``*_loss`` share the first panel, ``lr`` has the last.
    """
    panels: dict[str, dict[str, Curve]] = {"loss": {}, "score": {}, "learning rate": {}}
    for name, curve in sorted(curves.items()):
        quantity = name.rpartition("/")[2]
        if quantity.endswith("loss"):
            panels["loss"][name] = curve
        elif quantity == "lr":
            panels["learning rate"][name] = curve
        elif "/" in name:
            panels["score"][name] = curve
    kept = {title: lines for title, lines in panels.items() if lines}
    figure = Figure(figsize=(4.6 * max(len(kept), 1), 3.4), dpi=_DPI, layout="constrained")
    for position, (title, lines) in enumerate(kept.items(), start=1):
        axes = figure.add_subplot(1, len(kept), position)
        for name, (steps, values) in lines.items():
            axes.plot(steps, values, label=name, marker="." if len(steps) < 20 else None)
        drawn = [value for _, values in lines.values() for value in values if value > 0]
        if title == "loss" and drawn and max(drawn) > 20 * min(drawn) and math.isfinite(max(drawn)):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    _save(figure, path)


def confusion(
    path: str | os.PathLike[str], matrix: Tensor, class_names: Sequence[str], title: str
) -> None:
    """A confusion matrix as shares of each true class, classes that occur nowhere left out.

    Parameters
    ----------
    path : PNG file to write.
    matrix : int64 [K, K], rows are the truth, columns the prediction; row 0 is not shown, column 0
        where it was predicted.
    class_names : K names, index 0 unlabelled.
    title : above it.
    """
    counts = matrix.detach().cpu().double().numpy().copy()
    counts[0] = 0
    truth, predicted = counts.sum(1), counts.sum(0)
    columns: list[int] = np.flatnonzero(truth + predicted).tolist()
    rows = [column for column in columns if column > 0]
    shares = 100 * counts[np.ix_(rows, columns)] / np.maximum(truth[rows], 1)[:, None]
    cell = 0.42
    size = (4.0 + cell * max(len(columns), 6), 2.4 + cell * max(len(rows), 4))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares if shares.size else np.zeros((1, 1)), cmap="Blues", vmin=0, vmax=100)
    for row, column in np.argwhere(shares >= 0.5):
        value = shares[row, column]
        axes.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
            color="white" if value > 60 else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(columns)), [class_names[k] for k in columns], rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), [f"{class_names[k]} ({int(truth[k]):,})" for k in rows])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("prediction", fontsize=9)
    axes.set_ylabel("truth (pixels)", fontsize=9)
    axes.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    _save(figure, path)


def comparison(
    path: str | os.PathLike[str],
    scores: Mapping[str, Sequence[float]],
    parameters: Mapping[str, int],
    title: str,
) -> None:
    """Scores of methods: bars of means with a point a seed, and means over what trains.

    Parameters
    ----------
    path : PNG file to write.
    scores : method -> one score a seed.
    parameters : method -> number of trainable parameters beside the decoder.
    title : what the scores are.
    """
    figure = Figure(figsize=(10.0, 3.8), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(scores)
    means = [float(np.mean(scores[name])) for name in names]
    colours = [colormaps["tab10"](index % 10) for index in range(len(names))]
    left.bar(names, means, color=colours, alpha=0.5)
    for index, name in enumerate(names):
        left.plot([index] * len(scores[name]), scores[name], "o", color=colours[index], ms=5)
        right.plot(parameters[name], means[index], "o", color=colours[index], ms=7, label=name)
    left.set_ylabel(title, fontsize=9)
    left.tick_params(axis="x", rotation=25, labelsize=8)
    right.set_xscale("symlog", linthresh=10_000)  # a frozen backbone has none
    right.set_xlim(left=-1000)
    right.set_xlabel("trainable parameters beside the decoder", fontsize=9)
    right.set_ylabel(title, fontsize=9)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
    _save(figure, path)


def map_with_legend(
    path: str | os.PathLike[str],
    image: NDArray[np.float32],
    labels: NDArray[np.integer],
    class_names: Sequence[str],
    shares: Sequence[float],
) -> None:
    """A scene in false colour beside its map, with a legend of the classes that occur.

    Parameters
    ----------
    path : PNG file to write.
    image : [H, W, 3], NaN where it is missing.
    labels : [H, W], class 0 unlabelled or missing.
    class_names : one name a class.
    shares : of each class in the map, 0 to 1, shown in the legend.
    """
    height, width = labels.shape
    side = 5.0 / max(height, width)  # inches a pixel
    beside = width <= 2 * height
    panels = (1, 2) if beside else (2, 1)
    size = (2.2 + panels[1] * max(width * side, 2.5), 0.4 + panels[0] * max(height * side, 1.5))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    first, second = figure.subplots(*panels).ravel()
    if np.isfinite(image).all(-1).any():
        low, span = _stretch(image)
        image = (image - low) / span
    _show(first, image, "scene")
    colours = class_colours(len(class_names))
    drawn = colours(labels)[..., :3].astype(np.float32)
    _show(second, drawn, "map")
    handles = [
        Patch(color=colours(index), label=f"{name}  {100 * share:.1f} %")
        for index, (name, share) in enumerate(zip(class_names, shares, strict=True))
        if share > 0
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    _save(figure, path)
