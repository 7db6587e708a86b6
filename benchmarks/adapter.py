"""What the Are-adapter gains over its parts one after the other, whole and part by part.

``python -m benchmarks.adapter [--dtype float32,bfloat16] [--batch 2] [--threads 1]``: the paper's
sizes on the CPU, in the processor's time, which other work on the machine changes little. `layers`
runs the library's layers (norm, linear, convolution, batch norm, ReLU) around this package's match,
gathers and weighted sum; `fused` is `AreAdapter`, `eager` the same on the reference. In one process
and in turn; a row is printed only if they agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx_kernels import AreAdapter, use_backend
from spectralx_kernels.refine import (
    add_weighted_halves,
    gather_norm,
    gather_norm_mix,
    match_argmax,
)
from tests.kernels.ladder import relative_error

ROUNDS = 7
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Step = Callable[[], Tensor]


class Layers:
    """`AreAdapter` of the library's layers, on the parameters of one."""

    def __init__(self, adapter: AreAdapter) -> None:
        self.adapter = adapter

    @torch.no_grad()
    def match(self, tokens: Tensor, keys: tuple[Tensor, Tensor]) -> list[Tensor]:
        attributes = (self.adapter.spa_match_attn, self.adapter.spe_match_attn)
        return [
            match_argmax(each.to_q(each.norm_latents(half)), key)
            for each, half, key in zip(attributes, tokens.chunk(2, dim=-1), keys, strict=True)
        ]

    @torch.no_grad()
    def project_keys(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        attributes = (self.adapter.spa_match_attn, self.adapter.spe_match_attn)
        first, second = (
            each.to_k(each.norm_media(given))
            for each, given in zip(attributes, features, strict=True)
        )
        return first, second

    def spatial_weight(self, half: Tensor, match: Tensor) -> Tensor:
        norm = self.adapter.norm
        gathered = gather_norm(half, match, norm.weight, norm.bias, norm_eps=norm.eps)
        maps = gathered.unflatten(1, self.adapter.feature_map).permute(0, 3, 1, 2)
        weight: Tensor = self.adapter.refine_spa(maps).mean(dim=1).flatten(1)
        return weight

    def spectral_weight(self, half: Tensor, match: Tensor) -> Tensor:
        norm, layers = self.adapter.norm, self.adapter.refine_spe
        mixing = layers.get_parameter("0.weight").squeeze(-1)
        mixed = gather_norm_mix(half, match, norm.weight, norm.bias, mixing, norm_eps=norm.eps)
        weight: Tensor = layers[1:](mixed).mean(dim=2)
        return weight

    def refine(self, tokens: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        halves = tokens.chunk(2, dim=-1)
        match = self.match(tokens, keys)
        weights = (
            self.spatial_weight(halves[0], match[0]),
            self.spectral_weight(halves[1], match[1]),
        )
        return add_weighted_halves(tokens, *weights, self.adapter.scale)


def parts(adapter: Any, tokens: Tensor, features: tuple[Tensor, Tensor]) -> dict[str, Step]:
    """The parts of `adapter`, an `AreAdapter` or `Layers`, and the whole but for the keys."""
    keys = adapter.project_keys(*features)
    match = adapter.match(tokens, keys)
    halves = tokens.chunk(2, dim=-1)
    return {
        "keys": lambda: adapter.project_keys(*features)[0],
        "queries and match": lambda: adapter.match(tokens, keys)[0],
        "spatial weight": lambda: adapter.spatial_weight(halves[0], match[0]),
        "spectral weight": lambda: adapter.spectral_weight(halves[1], match[1]),
        "whole": lambda: adapter.refine(tokens, keys),
    }


def milliseconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


def both_ways(step: Step, adapter: AreAdapter, tokens: Tensor) -> Tensor:
    """Forward, and backward to everything that trains."""
    out = step()
    if not out.requires_grad:
        return out
    leaves = [tokens, *(p for n, p in adapter.named_parameters() if "match_attn" not in n)]
    torch.autograd.grad(F.relu(out).sum(), leaves, allow_unused=True)
    return out.detach()


def timed(
    steps: dict[str, Step], adapter: AreAdapter, tokens: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median milliseconds and results by way."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    found: dict[str, Tensor] = {}

    def run(way: str) -> None:
        with torch.set_grad_enabled(adapter.training):
            found[way] = both_ways(steps[way], adapter, tokens)

    for _ in range(ROUNDS):
        for way in steps:
            with use_backend("eager" if way == "eager" else "cpp", required=False):
                times[way].append(milliseconds(partial(run, way)))
    return {way: statistics.median(each[1:]) for way, each in times.items()}, found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, batch {options.batch}; medians in ms")
    for dtype in (getattr(torch, name) for name in options.dtype.split(",")):
        adapter = AreAdapter().to(dtype)
        tokens = torch.randn(options.batch, 196, 1024).to(dtype).requires_grad_()
        spatial = torch.randn(options.batch, 784, 512).to(dtype)
        features = spatial, torch.randn(options.batch, 512, 784).to(dtype)
        for training in (False, True):
            adapter.train(training)
            ways = {"eager": adapter, "layers": Layers(adapter), "fused": adapter}
            steps = {way: parts(owner, tokens, features) for way, owner in ways.items()}
            for name in steps["fused"]:
                medians, found = timed({way: steps[way][name] for way in ways}, adapter, tokens)
                error = relative_error(found["fused"], found["layers"])
                # An index may differ where two queries are a rounding apart.
                if name != "queries and match" and error > AGREEMENT[dtype]:
                    raise SystemExit(f"{name} {dtype}: got a difference of {error}")
                mode = "training, fwd+bwd" if training else "evaluation"
                row = "  ".join(f"{way} {value:7.2f}" for way, value in medians.items())
                gain = medians["layers"] / medians["fused"]
                print(f"{name:18} {str(dtype)[6:]:9} {mode:18} {row}  gain {gain:4.2f}", flush=True)


if __name__ == "__main__":
    main()
