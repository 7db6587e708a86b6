"""`AreAdapter`: refines tokens by the attributes that HyperT found in the image.

Attribute names are those of the published state dict. Published tensors that have no effect are
dropped on loading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels._checks import check_range, check_shape
from spectralx_kernels._official_names import OfficialNames
from spectralx_kernels.hypert.dense import norm_linear
from spectralx_kernels.kept import Kept
from spectralx_kernels.refine.ops import (
    add_weighted_halves,
    gather_norm,
    gather_norm_mix,
    match_argmax,
)
from spectralx_kernels.upsample import fold_batch_norm


class _Folded:
    """Convolution and batch norm in evaluation as one convolution, whose weight is kept."""

    def __init__(self) -> None:
        self._kept = Kept()

    def __call__(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        """``relu(norm(conv(x)))``."""

        def fold() -> tuple[Tensor, Tensor]:
            weight, bias = fold_batch_norm(conv.weight, conv.bias, norm)
            return weight.contiguous(memory_format=torch.channels_last), bias

        used = (conv.weight, conv.bias, *norm.parameters(), norm.running_mean, norm.running_var)
        weight, bias = self._kept.of([each for each in used if each is not None], fold)
        convolved = F.conv2d(x, weight, bias, conv.stride, conv.padding)  # type: ignore[arg-type]
        return F.relu(convolved, inplace=True)

    def forget(self) -> None:
        self._kept.forget()


class _Match(OfficialNames):
    """Which token [B, M, H] each feature [B, N, F] belongs to: [B, N].

    The published layer also has values and an output projection; only the index is used.
    """

    official_names: ClassVar[Mapping[str, str]] = {"to_k.weight": "to_kv.weight"}

    def __init__(self, token_width: int, feature_width: int) -> None:
        super().__init__()
        inner = max(feature_width // 2, 1)
        self.norm_latents = nn.LayerNorm(token_width)
        self.norm_media = nn.LayerNorm(feature_width)
        self.to_q = nn.Linear(token_width, inner, bias=False)
        self.to_k = nn.Linear(feature_width, inner, bias=False)

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        return {"to_out.weight": (self.to_q.in_features, self.to_q.out_features)}

    def from_official(self, own_name: str, tensor: Tensor) -> Tensor:
        """Keys are the first half of the published keys and values."""
        return tensor[: tensor.shape[0] // 2]

    def to_official(self, own_name: str, tensor: Tensor) -> Tensor:
        """Keys, and zero for the published values, which have no effect."""
        return torch.cat([tensor, torch.zeros_like(tensor)])

    def keys(self, features: Tensor) -> Tensor:
        norm = self.norm_media
        return norm_linear(features, norm.weight, norm.bias, self.to_k.weight, norm_eps=norm.eps)

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        return match_argmax(self.to_q(self.norm_latents(tokens)), keys)


def _map_size(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, int):
        side = math.isqrt(max(size, 0))
        if side * side != size or side < 1:
            raise ValueError(f"{name}: got {size}, expected a square number or (height, width)")
        return side, side
    check_range(f"height of {name}", size[0], 1, 2**15)
    check_range(f"width of {name}", size[1], 1, 2**15)
    return size


class AreAdapter(OfficialNames):
    """Attribute-refined adapter: weighs both halves of each token and adds them to it.

    Parameters
    ----------
    embed_dim : width D of a token, a multiple of 4; the first half is the spatial attribute.
    tokens : number of tokens of a square map, or (height, width) of the map.
    spatial_dim : width of HyperT's spatial features, which is the number of its spectral ones.
    positions : positions of HyperT's spatial features, a number or (height, width); half of it,
        rounded up, is the map of tokens, or it divides the map of tokens, as that of patches of 8
        pixels and smaller does: then tokens at one position share its weight. Twice the map of
        tokens by default.

    `scale` starts at 0.01. No gradient reaches the layers that only choose the match.

    Raises
    ------
    ValueError : a size out of range, or maps that do not fit together.

    Source: SpectralX (arXiv 2508.01731), attribute-refined adapter (Are-adapter).
    """

    def __init__(
        self,
        embed_dim: int = 1024,
        tokens: int | tuple[int, int] = 196,
        *,
        spatial_dim: int = 512,
        positions: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 4 or embed_dim % 4:
            raise ValueError(f"embed_dim: got {embed_dim}, expected a positive multiple of 4")
        check_range("spatial_dim", spatial_dim, 1, 2**20)
        height, width = _map_size("tokens", tokens)
        self.token_map = height, width
        if positions is None:
            positions = 2 * height, 2 * width
        self.feature_map = _map_size("positions", positions)
        halved = tuple((side + 1) // 2 for side in self.feature_map)
        stride, self.shared = 2, (1, 1)
        if halved != self.token_map:
            down, across = self.feature_map
            if height % down or width % across:
                raise ValueError(
                    f"positions: got a map of {self.feature_map}, which halves to {halved}, "
                    f"expected to halve to the tokens' {self.token_map} or to divide it"
                )
            stride, self.shared = 1, (height // down, width // across)
        self.embed_dim = embed_dim
        self.spatial_dim = spatial_dim
        half = embed_dim // 2
        count, places = math.prod(self.token_map), math.prod(self.feature_map)
        self.scale = nn.Parameter(torch.tensor(0.01))
        self.norm = nn.LayerNorm(half)
        self.spa_match_attn = _Match(half, spatial_dim)
        self.spe_match_attn = _Match(half, places)
        self.refine_spa = nn.Sequential(
            nn.Conv2d(half, half // 2, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(half // 2),
            nn.ReLU(),
            nn.Conv2d(half // 2, half // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(half // 2),
            nn.ReLU(),
        )
        self.refine_spe = nn.Sequential(
            nn.Conv1d(spatial_dim, count, 1, bias=False), nn.BatchNorm1d(count), nn.ReLU()
        )

        self._folded = _Folded(), _Folded()

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        count, places = math.prod(self.token_map), math.prod(self.feature_map)
        return {
            "spa_mlp.weight": (count, places),
            "spa_mlp.bias": (count,),
            "spe_mlp.weight": (count, self.spatial_dim),
            "spe_mlp.bias": (count,),
        }

    @torch.no_grad()
    def project_keys(self, spatial: Tensor, spectral: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, P, inner] and [B, spatial_dim, inner] of HyperT's two features.

        They depend on the image only: an adapter that runs after several blocks needs them once.

        spatial : [B, P, spatial_dim], spectral : [B, spatial_dim, P]; else a ValueError.
        """
        places = math.prod(self.feature_map)
        check_shape("spatial", spatial, ("batch", places, self.spatial_dim))
        check_shape("spectral", spectral, (spatial.shape[0], self.spatial_dim, places))
        return self.spa_match_attn.keys(spatial), self.spe_match_attn.keys(spectral)

    @torch.no_grad()
    def match(self, tokens: Tensor, keys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Index of the best token for each position [B, P] and each channel [B, spatial_dim].

        tokens : [B, N, D] without the class token; keys : as `project_keys` returns them.
        """
        check_shape("tokens", tokens, (keys[0].shape[0], math.prod(self.token_map), self.embed_dim))
        first, second = tokens.chunk(2, dim=-1)
        return self.spa_match_attn(first, keys[0]), self.spe_match_attn(second, keys[1])

    def _convolved(self, maps: Tensor) -> Tensor:
        """`refine_spa`; in evaluation without gradients its norms are in the convolutions' weights,
        which are kept: folding them takes longer than the norms do."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.refine_spa(maps)  # type: ignore[no-any-return]
        layers = list(self.refine_spa)
        pairs = [(layers[0], layers[1]), (layers[3], layers[4])]
        for folded, (conv, norm) in zip(self._folded, pairs, strict=True):
            # Others: an adapted convolution, a norm that averages over processes.
            if (
                type(conv) is nn.Conv2d
                and type(norm) is nn.BatchNorm2d
                and not norm.training
                and norm.running_mean is not None
            ):
                maps = folded(maps, conv, norm)
            else:
                maps = F.relu(norm(conv(maps)))
        return maps

    def spatial_weight(self, half: Tensor, match: Tensor) -> Tensor:
        """Weights [B, N] of the first halves [B, N, D/2] of the tokens; match : [B, P]."""
        norm = self.norm
        gathered = gather_norm(half, match, norm.weight, norm.bias, norm_eps=norm.eps)
        maps = gathered.unflatten(1, self.feature_map).permute(0, 3, 1, 2)  # channels last
        weights = self._convolved(maps).mean(dim=1)
        for axis, count in enumerate(self.shared, start=1):
            if count > 1:
                weights = weights.repeat_interleave(count, axis)
        return weights.flatten(1)

    def spectral_weight(self, half: Tensor, match: Tensor) -> Tensor:
        """Weights [B, N] of the second halves [B, N, D/2]; match : [B, spatial_dim]."""
        norm = self.norm
        mixing = self.refine_spe.get_parameter("0.weight").squeeze(-1)  # [N, spatial_dim]
        mixed = gather_norm_mix(half, match, norm.weight, norm.bias, mixing, norm_eps=norm.eps)
        weight: Tensor = self.refine_spe[1:](mixed).mean(dim=2)
        return weight

    def train(self, mode: bool = True) -> AreAdapter:
        """As of ``nn.Module``; forgets the folded weights."""
        for folded in self._folded:
            folded.forget()
        return super().train(mode)

    def refine(self, tokens: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        """Refined tokens [B, N, D]; `keys` as `project_keys` returns them."""
        match_spatial, match_spectral = self.match(tokens, keys)
        first, second = tokens.chunk(2, dim=-1)
        spatial_weight = self.spatial_weight(first, match_spatial)
        spectral_weight = self.spectral_weight(second, match_spectral)
        return add_weighted_halves(tokens, spatial_weight, spectral_weight, self.scale)

    def forward(self, tokens: Tensor, spatial: Tensor, spectral: Tensor) -> Tensor:
        """Refined tokens [B, N, D].

        tokens : [B, N, D] without the class token. spatial : [B, P, spatial_dim] and
        spectral : [B, spatial_dim, P], as `HyperT` returns them. Raises ValueError for other
        shapes.
        """
        return self.refine(tokens, self.project_keys(spatial, spectral))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, tokens={self.token_map}, "
            f"spatial_dim={self.spatial_dim}, positions={self.feature_map}"
        )
