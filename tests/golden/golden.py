"""Reader of the golden files: draws the tensors they name and compares the arrays they hold."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectralx_kernels import AoMoALinear
from spectralx_kernels._official_names import official_parameters
from tests.tolerances import (
    GOLDEN_CURVE_SPREAD,
    GOLDEN_FLOOR,
    GOLDEN_GRADIENT_QUANTILE,
    GOLDEN_SPREAD_FACTOR,
    GOLDEN_UNLISTED_SPREAD,
    GOLDEN_ZERO_GRADIENT,
)

FOLDER = Path(os.environ.get("SPECTRALX_GOLDEN_DIR", Path(__file__).parent / "data"))
_GRADIENTS = ("grad/", "gnorm/")
Arrays = dict[str, Tensor | NDArray[Any]]


class Golden:
    """One golden file: `meta`, the drawn tensors, and the arrays to agree with."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with np.load(path) as file:
            self.arrays = {key: file[key] for key in file.files if key != "meta"}
            self.meta: dict[str, Any] = json.loads(bytes(file["meta"]))
        self.seed: int = self.meta["seed"]
        spreads = path.parent / "tolerance.json"
        self.spread: Mapping[str, float] = (
            json.loads(spreads.read_text()).get(self.name, {}) if spreads.exists() else {}
        )
        listed = [
            self.spread.get(key, GOLDEN_UNLISTED_SPREAD)
            for key in self.arrays
            if key.startswith(_GRADIENTS)
        ]
        self.gradient_spread = float(np.quantile(listed or [0.0], GOLDEN_GRADIENT_QUANTILE))

    def generator(self, key: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(key.encode())])

    def draw(self, key: str, shape: tuple[int, ...] | list[int]) -> Tensor:
        """A standard normal float32 tensor keyed by name."""
        drawn = self.generator(key).standard_normal(tuple(shape)).astype(np.float32)
        return torch.from_numpy(np.asarray(drawn))

    def _scaled(self, key: str, entry: Mapping[str, Any]) -> Tensor:
        drawn = self.draw(key, entry["shape"])
        drawn = drawn.abs() if entry.get("abs") else drawn
        offset = np.float32(entry.get("offset", 0.0)).item()
        return offset + np.float32(entry["scale"]).item() * drawn

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of ``meta["params"]`` under its published name."""
        return {name: self._scaled(name, entry) for name, entry in self.meta["params"].items()}

    def input(self, name: str, entry_name: str | None = None) -> Tensor:
        """Input `name`, drawn as ``meta["inputs"][entry_name or name]`` says."""
        entry = self.meta["inputs"][entry_name or name]
        return self._scaled(name, entry) if isinstance(entry, dict) else self.draw(name, entry)

    def mask_noise(self, step: int, shape: tuple[int, int]) -> Tensor:
        """Uniform noise of the random masking at `step`."""
        return torch.from_numpy(self.generator(f"mask{step}").random(shape).astype(np.float32))

    def integers(self, key: str, high: int, shape: tuple[int, ...]) -> Tensor:
        """Labels in [0, high)."""
        return torch.from_numpy(self.generator(key).integers(0, high, shape))

    def tolerance(self, array: str) -> float:
        """Allowed difference, relative to the largest value of the array."""
        spread = self.spread.get(array, GOLDEN_UNLISTED_SPREAD)
        if array.startswith(_GRADIENTS):
            spread = max(spread, self.gradient_spread)
        if "stage-2 training curve" in self.meta["module"]:
            spread = max(spread, GOLDEN_CURVE_SPREAD)
        return max(GOLDEN_FLOOR, GOLDEN_SPREAD_FACTOR * spread)

    def zero_gradient(self, array: str) -> float | None:
        """Largest value a bias gradient may have that is zero in exact arithmetic, else None.

        A bias before batch statistics changes nothing; what the published code stored for it is
        round-off, many orders under the gradient of the weight beside it.
        """
        kind, _, name = array.partition("/")
        if kind not in ("grad", "gnorm") or not name.endswith(".bias"):
            return None
        norm = self.arrays.get(f"gnorm/{name}")
        weight_norm = self.arrays.get(f"gnorm/{name.removesuffix('bias')}weight")
        if norm is None or weight_norm is None:
            return None
        bound = GOLDEN_ZERO_GRADIENT * float(weight_norm)
        return bound if float(norm) < bound else None

    @contextmanager
    def gate_noise(self) -> Iterator[None]:
        """Inside the block every `AoMoALinear` draws the file's gate noise, in call order."""
        calls = iter(range(1 << 30))

        def draw(module: AoMoALinear, tokens: int, like: Tensor) -> Tensor:
            drawn = [
                self.draw(f"noise{next(calls)}", (tokens, module.experts))
                for _ in range(module.attributes)
            ]
            return torch.stack(drawn).to(like)

        before: Callable[..., Tensor] = AoMoALinear.draw_noise
        AoMoALinear.draw_noise = draw  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            AoMoALinear.draw_noise = before  # type: ignore[method-assign]

    def gradients(self, model: nn.Module) -> Arrays:
        """``grad/<name>`` and ``gnorm/<name>`` of the model, for the names the file holds."""
        own = dict(model.named_parameters())
        found: Arrays = {}
        for official, where in official_parameters(model).items():
            parameter = own.get(where.name)
            if parameter is None or parameter.grad is None:
                continue
            gradient = where.of(parameter.grad)
            if f"grad/{official}" in self.arrays:
                length = self.arrays[f"grad/{official}"].size
                found[f"grad/{official}"] = gradient.flatten()[:length]
            if f"gnorm/{official}" in self.arrays:
                found[f"gnorm/{official}"] = gradient.double().norm()
        return found

    def check(self, found: Arrays) -> None:
        """Every array of the file is in `found` and agrees: integers exactly."""
        missing = sorted(self.arrays.keys() - found.keys())
        assert not missing, f"{self.name}: not computed: {missing}"
        wrong = []
        for key, expected in self.arrays.items():
            value = found[key]
            value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            if value.shape != expected.shape:
                wrong.append(f"{key}: shape {value.shape}, expected {expected.shape}")
            elif not np.issubdtype(expected.dtype, np.floating):
                differing = int((value != expected).sum())
                if differing:
                    wrong.append(f"{key}: {differing} of {expected.size} differ")
            else:
                if key.startswith("gates") and not np.array_equal(value > 0, expected > 0):
                    wrong.append(f"{key}: other experts chosen")
                zero = self.zero_gradient(key)
                if zero is not None:
                    if not np.abs(value).max(initial=0.0) < zero:
                        wrong.append(f"{key}: expected zero to round-off, below {zero:.3g}")
                    continue
                scale = max(float(np.abs(expected).max(initial=0.0)), 1e-30)
                difference = np.abs(value.astype(np.float64) - expected).max(initial=0.0)
                error = float(difference) / scale
                if not error <= self.tolerance(key):
                    wrong.append(f"{key}: error {error:.3g}, allowed {self.tolerance(key):.3g}")
        assert not wrong, f"{self.name}: " + "; ".join(wrong)
