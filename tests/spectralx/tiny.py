"""An experiment small enough for tests: seconds on one core."""

from __future__ import annotations

from pathlib import Path

from spectralx.options import load_settings
from spectralx.settings import Settings

TINY = """
data: {task: WS-WD, image_size: 32, cache: true}
model:
  {family: scalemae, embed_dim: 16, depth: 4, num_heads: 2, stem_dim: 8, tokenizer_heads: 2,
   low_rank: 4, trainable: all}
stage1:
  decoder_dim: 16
  decoder_depth: 1
  decoder_heads: 2
  fcn_dim: 8
  fcn_layers: 1
  run: {steps: 4, batch_size: 2, validate_every: 2, pictures: 1}
  optimizer: {lr: 1.0e-3, schedule: constant}
stage2:
  head_channels: 8
  run: {steps: 4, batch_size: 2, validate_every: 2, pictures: 1}
  optimizer: {lr: 1.0e-3}
trainer: {accelerator: cpu, log_every: 1, progress: false}
"""


def tiny_config(folder: Path) -> Path:
    """A YAML file of the tiny experiment."""
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    return path


def tiny_settings(root: Path, out: Path, *overrides: str) -> Settings:
    """The tiny experiment on the data in `root`."""
    out.mkdir(parents=True, exist_ok=True)
    config = tiny_config(out)
    return load_settings(config, [f"--data.root={root}", f"--out={out / 'run'}", *overrides])
