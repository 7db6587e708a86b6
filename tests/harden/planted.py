"""A pytest plugin: kernels of a library take the place of the extension module's.

The library is named by ``SPECTRALX_PLANTED``; see `mutations`.
"""

from __future__ import annotations

import os

import torch

import tests.conftest  # noqa: F401  Triton's interpreter, before anything imports triton

import spectralx_kernels  # noqa: F401 isort: skip  defines the operators

torch.ops.load_library(os.environ["SPECTRALX_PLANTED"])
