"""The paper's published stage-2 weights, and what they predict.

    python examples/official_checkpoint.py
    python examples/official_checkpoint.py --checkpoint scalemae_whu.pth --image tile.tif \\
        --classes 25 --wavelengths 0.466 0.48 ... --out classes.npy

Without a file the example writes one of random weights, in the published names, and reads that.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx.checkpoints import load_official
from spectralx.segmentation import Segmentation
from spectralx_kernels import official_inert, official_parameters

SMALL: dict[str, Any] = {
    "image_size": 32,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "stem_dim": 16,
    "tokenizer_heads": 2,
    "head_channels": 16,
}


def write_official(model: Segmentation, path: Path) -> None:
    """The model's weights under the published names, and what the published model has besides."""
    own = model.state_dict()
    published = {name: at.of(own[at.name]) for name, at in official_parameters(model).items()}
    for name, at in official_parameters(model).items():
        if at.name.endswith("to_k.weight"):  # published with values, which have no effect
            published[name] = torch.cat([own[at.name], torch.zeros_like(own[at.name])])
    besides = {name: torch.zeros(shape) for name, shape in official_inert(model).items()}
    torch.save({"state_dict": {**published, **besides}}, path)


def read_image(path: Path | None, bands: int, size: tuple[int, int]) -> Tensor:
    """[1, C, *size], each band between 0 and 1: of a GeoTIFF, or noise."""
    if path is None:
        return torch.rand(1, bands, *size)
    from spectralx.data import raster
    from spectralx.data.normalise import ImageMinMax

    values, valid, _ = raster.read_image(path, count=bands)
    images = torch.from_numpy(ImageMinMax()(values, valid))[None]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def main(argv: Sequence[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="the published file (ViT-L)")
    parser.add_argument("--family", default="scalemae", help="scalemae, satmae++ or dinov3")
    parser.add_argument("--wavelengths", type=float, nargs="+", default=[0.49, 0.56, 0.665, 0.842])
    parser.add_argument("--classes", type=int, default=5, help="with class 0, unlabelled")
    parser.add_argument("--image", type=Path, help="a GeoTIFF of as many bands")
    parser.add_argument("--out", type=Path, help=".npy file for the classes")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = SMALL if options.checkpoint is None else {}
    bands = len(options.wavelengths)

    def make_model() -> Segmentation:
        return Segmentation(options.family, bands, options.classes, options.wavelengths, **sizes)

    with tempfile.TemporaryDirectory() as folder:
        file = options.checkpoint
        if file is None:
            file = Path(folder, "official.pth")
            write_official(make_model(), file)
        model = make_model().eval()
        load_official(model, file)
    images = read_image(options.image, bands, model.image_size)
    classes = model.predict(images)[0]
    shares = classes.flatten().bincount(minlength=options.classes) / classes.numel()
    print(f"{file.name}: every tensor loaded; image {list(images.shape[1:])}")
    print("share of each class:", ", ".join(f"{share:.2f}" for share in shares.tolist()))
    if options.out is not None:
        np.save(options.out, classes.numpy().astype(np.uint8))
    return classes


if __name__ == "__main__":
    main()
