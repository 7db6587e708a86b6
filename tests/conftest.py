"""What the whole test tree shares: packages that are not here, and Triton without a GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

# Triton kernels run in its interpreter, on CPU tensors; triton reads this when it is imported.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"

# Test files and folders that need more than PyTorch, and the packages they need.
NEEDS = {
    "harden": ("jsonargparse", "lightning", "rasterio", "safetensors", "scipy", "torchmetrics"),
    "spectralx/data": ("rasterio", "scipy", "tqdm"),
    "spectralx/prediction": ("jsonargparse", "matplotlib", "rasterio", "safetensors", "tqdm"),
    "spectralx/test_cli.py": ("jsonargparse", "rasterio"),
    "spectralx/test_evaluate.py": ("jsonargparse", "lightning", "rasterio", "torchmetrics"),
    "spectralx/test_comparison.py": ("jsonargparse", "lightning", "rasterio", "torchmetrics"),
    "spectralx/test_evaluation.py": ("jsonargparse", "lightning", "rasterio", "torchmetrics"),
    "spectralx/test_metrics.py": ("torchmetrics",),
    "spectralx/test_options.py": ("jsonargparse", "rasterio"),
    "spectralx/test_quickstart.py": ("jsonargparse", "lightning", "rasterio", "torchmetrics"),
    "spectralx/test_distributed.py": ("jsonargparse", "lightning", "rasterio", "tensorboard"),
    "spectralx/test_resume.py": ("jsonargparse", "lightning", "rasterio", "tensorboard"),
    "spectralx/test_sampling.py": ("jsonargparse", "lightning", "rasterio"),
    "spectralx/test_training_options.py": ("jsonargparse", "lightning", "rasterio"),
    "spectralx/test_pictures.py": ("matplotlib",),
    "spectralx/test_train.py": ("jsonargparse", "lightning", "rasterio", "torchmetrics"),
    "spectralx/test_backbone_weights.py": ("safetensors",),
    "spectralx/test_checkpoints.py": ("safetensors",),
    "spectralx/test_damaged_files.py": ("jsonargparse", "lightning", "rasterio", "tensorboard"),
    "spectralx/test_published_names.py": ("safetensors",),
    "spectralx/test_report_page.py": ("jsonargparse", "lightning", "rasterio", "torchmetrics"),
    "spectralx/test_starting_weights.py": ("safetensors",),
    "spectralx/test_wandb.py": ("jsonargparse", "lightning", "rasterio", "tensorboard"),
    "spectralx/test_tensor_files.py": ("safetensors",),
}

_HERE = Path(__file__).parent
_missing = {
    path: [name for name in names if importlib.util.find_spec(name) is None]
    for path, names in NEEDS.items()
}
collect_ignore = [str(_HERE / path) for path, names in _missing.items() if names]


def pytest_report_header() -> list[str]:
    """Says aloud what is left out."""
    return [
        f"NOT RUN: tests/{path} needs {', '.join(names)}"
        for path, names in _missing.items()
        if names
    ]
