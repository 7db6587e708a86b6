"""`HyperT`: an image of any bands to the tokens of a vision transformer.

Attribute names are those of the published state dict, so its files load as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels._checks import check_range, check_shape
from spectralx_kernels.hypert.attention import attribute_match, window_attention
from spectralx_kernels.hypert.bands import resampled_convolution
from spectralx_kernels.hypert.dense import feed_forward, linear_add, norm_linear
from spectralx_kernels.hypert.positions import position_tables, wavelengths_in_nm
from spectralx_kernels.hypert.sizes import PATCH, heads_for, patches_of, sides
from spectralx_kernels.hypert.stem_module import STRIDE, Stem
from spectralx_kernels.linear import PatchConv2d

MAX_BANDS = 512
DOWN = 4  # stride of the first convolution of the low-rank path; the second makes up a patch


class _Attention(nn.Module):
    """The weights of self-attention and its projections; `_Block` runs them."""

    def __init__(self, width: int, num_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class _Mlp(nn.Module):
    """The weights of a feed-forward layer; `_Block` runs them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)


class _Block(nn.Module):
    """Pre-norm transformer block over a map [B, H, W, D], attention within windows of it."""

    def __init__(self, width: int, num_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, num_heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        norm, attn = self.norm1, self.attn
        qkv = norm_linear(
            x, norm.weight, norm.bias, attn.qkv.weight, attn.qkv.bias, norm_eps=norm.eps
        )
        # The map is padded with zeros before `qkv`, whose value there is its bias.
        attended = window_attention(
            qkv, attn.qkv.bias, num_heads=attn.num_heads, window=attn.window
        )
        x = linear_add(attended, attn.proj.weight, attn.proj.bias, x)
        return _feed_forward(x, self.norm2, self.mlp.fc1, self.mlp.fc2, residual=True)


def _feed_forward(
    x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, *, residual: bool
) -> Tensor:
    return feed_forward(
        x,
        norm.weight,
        norm.bias,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        residual=residual,
        norm_eps=norm.eps,
    )


class _AttributeMatch(nn.Module):
    """Learned queries [N, d] look for their attribute in the features [B, P, F]: [B, N, d]."""

    def __init__(self, query_width: int, feature_width: int) -> None:
        super().__init__()
        inner = max(feature_width // 2, 1)
        self.norm_media = nn.LayerNorm(feature_width)
        self.norm_latents = nn.LayerNorm(query_width)
        self.to_q = nn.Linear(query_width, inner, bias=False)
        self.to_kv = nn.Linear(feature_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, query_width, bias=False)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        projected = self.to_q(self.norm_latents(queries))  # [N, inner], once for all images
        matched = attribute_match(
            features,
            projected,
            self.norm_media.weight,
            self.norm_media.bias,
            self.to_kv.weight,
            norm_eps=self.norm_media.eps,
        )
        return linear_add(
            matched, self.to_out.weight, None, queries.expand(matched.shape[0], -1, -1)
        )


class SpatialSpectralTokenizer(nn.Module):
    """Images [B, C, H, W] to tokens [B, N, D] that carry a spatial and a spectral attribute.

    This is HyperT without its low-rank path; `HyperT` holds one as ``.proj``.

    Parameters
    ----------
    in_channels : number of bands C, 1 to 512.
    wavelengths : [C], centre wavelengths of the bands, in any order; repeated ones are fine.
    wavelength_unit : "um" (micrometres) or "nm" (nanometres).
    embed_dim : width D of a token, even; the first half is spatial, the second spectral.
    image_size : side or (height, width) in pixels, multiples of 8.
    tokens : number of tokens N; by default one for each 16 x 16 pixels, those at the lower and
        right edge that the image does not fill included.
    stem_dim : channels of the stem's result, a multiple of 4 and of `num_heads`.
    num_heads : heads of the spatial branch. The spectral branch, H/8 · W/8 wide, takes as many,
        or the next lower number that divides its width.
    resolution : metres; what one step on the stem's map is multiplied by before its sine and
        cosine are taken.

    Raises
    ------
    ValueError : a size out of range or indivisible, wavelengths that do not fit the bands.

    Source: SpectralX (arXiv 2508.01731), hyper tokenizer.
    """

    spatial_positions: Tensor
    spectral_positions: Tensor

    def __init__(
        self,
        in_channels: int,
        wavelengths: Sequence[float] | Tensor,
        *,
        wavelength_unit: str = "um",
        embed_dim: int = 1024,
        image_size: int | tuple[int, int] = 224,
        tokens: int | None = None,
        stem_dim: int = 512,
        num_heads: int = 8,
        resolution: float = 10.0,
    ) -> None:
        super().__init__()
        check_range("in_channels", in_channels, 1, MAX_BANDS)
        self.in_channels = in_channels
        self.image_size = sides(image_size)
        height, width = (side // STRIDE for side in self.image_size)
        self.map_size = height, width
        positions = height * width
        if tokens is None:
            tokens = patches_of(self.image_size)
        check_range("tokens", tokens, 1, 2**20)
        check_range("num_heads", num_heads, 1, stem_dim)
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(f"embed_dim: got {embed_dim}, expected a positive multiple of 2")
        if stem_dim < 4 or stem_dim % 4 or stem_dim % num_heads:
            raise ValueError(
                f"stem_dim: got {stem_dim}, expected a positive multiple of 4 and of num_heads "
                f"{num_heads}"
            )
        nanometres = wavelengths_in_nm(wavelengths, wavelength_unit, in_channels)
        self.wavelengths_nm = tuple(nanometres.tolist())

        self.spa_query = nn.Parameter(0.02 * torch.randn(tokens, embed_dim // 2))
        self.spe_query = nn.Parameter(0.02 * torch.randn(tokens, embed_dim // 2))
        self.downsample_module = Stem(in_channels, stem_dim)
        window = max(height // 2, 1), max(width // 2, 1)
        self.spa_semantic_module = nn.Sequential(_Block(stem_dim, num_heads, window))
        # The spectral tokens as a map of one row: attention over all channels is one window.
        self.spe_semantic_module = nn.Sequential(
            _Block(positions, heads_for(positions, num_heads), (1, stem_dim))
        )
        self.spa_match_attn = _AttributeMatch(embed_dim // 2, stem_dim)
        self.spe_match_attn = _AttributeMatch(embed_dim // 2, positions)
        self.match_ff = nn.Sequential(
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, 4 * embed_dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * embed_dim, embed_dim, bias=False),
        )
        # They follow from shapes and wavelengths: no part of the state dict.
        tables = position_tables(nanometres, self.map_size, stem_dim, resolution, self.spa_query)
        for name, table in zip(("spatial_positions", "spectral_positions"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, spatial features and spectral features of images [B, C, H, W].

        Returns
        -------
        tokens : [B, N, D].
        spatial : [B, H/8 · W/8, stem_dim], with positions; row-major.
        spectral : [B, stem_dim, H/8 · W/8], with positions.

        Raises ValueError for images of another number of bands or another size.
        """
        check_shape("images", images, ("batch", self.in_channels, *self.image_size))
        features = self.downsample_module(images)  # [B, stem_dim, H/8, W/8]
        spatial = self.spa_semantic_module(features.permute(0, 2, 3, 1)).flatten(1, 2)
        spectral = self.spe_semantic_module(features.flatten(2).unsqueeze(1)).squeeze(1)
        spatial = spatial + self.spatial_positions
        spectral = spectral + self.spectral_positions
        tokens = torch.cat(
            [
                self.spa_match_attn(spatial, self.spa_query),
                self.spe_match_attn(spectral, self.spe_query),
            ],
            dim=-1,
        )
        return self.feed_forward(tokens), spatial, spectral

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """The last layers, on both attributes of tokens [..., D] side by side."""
        norm = cast(nn.LayerNorm, self.match_ff[0])
        fc1, fc2 = cast(nn.Linear, self.match_ff[1]), cast(nn.Linear, self.match_ff[3])
        return _feed_forward(tokens, norm, fc1, fc2, residual=False)

    def for_bands(
        self, wavelengths: Sequence[float] | Tensor, *, wavelength_unit: str = "um"
    ) -> SpatialSpectralTokenizer:
        """This tokenizer for images of other bands; see `HyperT.for_bands`."""
        return _with_bands(self, wavelengths, wavelength_unit)

    def extra_repr(self) -> str:
        height, width = self.image_size
        tokens, half = self.spa_query.shape
        return (
            f"in_channels={self.in_channels}, embed_dim={2 * half}, "
            f"image_size=({height}, {width}), tokens={tokens}"
        )


_Tokenizer = TypeVar("_Tokenizer", "SpatialSpectralTokenizer", "HyperT")


def _with_bands(
    tokenizer: _Tokenizer, wavelengths: Sequence[float] | Tensor, unit: str
) -> _Tokenizer:
    count = len(wavelengths)
    check_range("bands of wavelengths", count, 1, MAX_BANDS)
    new = wavelengths_in_nm(wavelengths, unit, count)
    tensors = {id(each): each for each in (*tokenizer.parameters(), *tokenizer.buffers())}
    changed = copy.deepcopy(tokenizer, tensors).eval()
    inner = changed.proj if isinstance(changed, HyperT) else changed
    stem = inner.downsample_module
    stem.conv1 = resampled_convolution(stem.conv1, inner.wavelengths_nm, new)
    if isinstance(changed, HyperT) and changed.low_rank is not None:
        changed.down = resampled_convolution(changed.down, inner.wavelengths_nm, new)
    inner.in_channels, inner.wavelengths_nm = count, tuple(new.tolist())
    return changed


class HyperT(nn.Module):
    """The spatial-spectral tokenizer with a trainable low-rank patch projection beside it.

    Takes the place of a vision transformer's patch embedding. The tokenizer is ``.proj``; the
    low-rank path is two convolutions 4x4 of stride 4, to `low_rank` channels and to D (in general
    of stride 4 and of stride ``patch_size / 4``, or of `patch_size` and 1 below 4). Both are added
    and multiplied by ``.scaler`` [D].

    Parameters
    ----------
    in_channels, wavelengths, wavelength_unit, embed_dim, image_size, tokens, stem_dim, num_heads,
    resolution : as in `SpatialSpectralTokenizer`. With a low-rank path there is one token for each
        patch; it sees zeros where patches at the lower and right edge are not filled.
    low_rank : channels inside the low-rank path, or None to leave it and the scaler out.
    patch_size : side in pixels of a patch of the low-rank path: 1, 2 or a multiple of 4.
    trainable : "official" freezes the tokenizer at its start, as the published code does, so that
        only the low-rank path and the scaler train; "all" trains everything. Frozen or not, batch
        norms follow ``train()`` and ``eval()``.

    Raises
    ------
    ValueError : a size out of range or indivisible, wavelengths that do not fit the bands, an
        unknown `trainable`.

    Source: SpectralX (arXiv 2508.01731), hyper tokenizer.
    """

    def __init__(
        self,
        in_channels: int,
        wavelengths: Sequence[float] | Tensor,
        *,
        wavelength_unit: str = "um",
        embed_dim: int = 1024,
        image_size: int | tuple[int, int] = 224,
        tokens: int | None = None,
        stem_dim: int = 512,
        num_heads: int = 8,
        resolution: float = 10.0,
        low_rank: int | None = 16,
        patch_size: int = PATCH,
        trainable: str = "official",
    ) -> None:
        super().__init__()
        if trainable not in ("official", "all"):
            raise ValueError(f"trainable: got {trainable!r}, expected 'official' or 'all'")
        unknown = patch_size not in (1, 2) and (patch_size < 1 or patch_size % DOWN != 0)
        if low_rank is not None and unknown:
            raise ValueError(
                f"patch_size: got {patch_size}, expected 1, 2 or a multiple of {DOWN} with the "
                "low-rank path"
            )
        per_patch = tokens
        if tokens is None and low_rank is not None:
            per_patch = patches_of(sides(image_size), patch_size)
        self.proj = SpatialSpectralTokenizer(
            in_channels,
            wavelengths,
            wavelength_unit=wavelength_unit,
            embed_dim=embed_dim,
            image_size=image_size,
            tokens=per_patch,
            stem_dim=stem_dim,
            num_heads=num_heads,
            resolution=resolution,
        )
        self.proj.requires_grad_(trainable == "all")
        self.low_rank = low_rank
        self.patch_size = patch_size
        if low_rank is None:
            return
        check_range("low_rank", low_rank, 1, 2**16)
        patches = patches_of(self.proj.image_size, patch_size)
        if tokens not in (None, patches):
            raise ValueError(
                f"tokens: got {tokens}, expected {patches}, one for each patch of the low-rank path"
            )
        first, second = min(DOWN, patch_size), max(patch_size // DOWN, 1)
        self.down = PatchConv2d(in_channels, low_rank, first)
        self.up = PatchConv2d(low_rank, embed_dim, second)
        self.scaler = nn.Parameter(torch.ones(embed_dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, D], spatial [B, P, stem_dim] and spectral features [B, stem_dim, P].

        images : [B, C, H, W]. P = H/8 · W/8; tokens and positions are row-major.
        Raises ValueError for images of another number of bands or another size.
        """
        tokens, spatial, spectral = self.proj(images)
        if self.low_rank is not None:
            height, width = images.shape[2:]
            side = self.patch_size
            if height % side or width % side:
                images = F.pad(images, (0, -width % side, 0, -height % side))
            patches = self.up(self.down(images)).flatten(2).transpose(1, 2)
            tokens = self.scaler * (tokens + patches)
        return tokens, spatial, spectral

    def for_bands(
        self, wavelengths: Sequence[float] | Tensor, *, wavelength_unit: str = "um"
    ) -> HyperT:
        """This tokenizer for the images of another sensor, or with bands left out; not retrained.

        The new image's spectrum is interpolated linearly, by wavelength, to the bands trained on,
        and held constant beyond its first and last band. As that is linear it is put into the
        weights of the convolutions that see bands: those of band i become the sum over trained
        bands j of weights j times the share of i in j. So a constant spectrum gives what it
        gave, and reordered bands are an exact permutation. Where trained and new bands repeat a
        wavelength the n-th of one takes the n-th of the other, or the mean where there is none.
        Everything behind stays, spectral positions too: the channels mean what they meant.

        Parameters
        ----------
        wavelengths : [C'], of the new bands, in any order; repeated ones are fine.
        wavelength_unit : "um" (micrometres) or "nm" (nanometres).

        Returns
        -------
        A tokenizer of C' bands in evaluation mode, with frozen convolutions of its own; every
        other parameter and buffer is this one's.

        Raises
        ------
        ValueError : wavelengths out of range, or none, or more than 512.
        """
        return _with_bands(self, wavelengths, wavelength_unit)
