"""Stage 2: semantic segmentation with an adapted backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spectralx.adapt import Method, adapt, adapter_blocks, freeze
from spectralx.backbones.dinov3 import DINOv3
from spectralx.backbones.encoder import PatchEmbed, PositionedEncoder
from spectralx.backbones.positions import sincos_positions
from spectralx.decoder import NECK_SCALES, MultiLevelNeck, UPerHead, UPerNet, decode
from spectralx.linear_decoder import LinearDecoder
from spectralx_kernels import (
    AreAdapter,
    HyperT,
    OfficialNames,
    PatchConv2d,
    upsample_argmax,
    upsample_cross_entropy,
)

Family = Literal["scalemae", "satmae++", "dinov3"]
Tokenizer = Literal["hypert", "conv"]
Decoder = Literal["upernet", "linear"]
Trainable = Literal["adapters", "decoder", "all"]


def _check_one_of(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(get_args(choices))}")


class Segmentation(OfficialNames):
    """Class logits of multispectral and hyperspectral images.

    The tokenizer makes patch tokens, adapted transformer blocks follow, the Are-adapter refines
    the tokens after each feature block, and UPerNet makes logits of the feature maps. State
    dicts of the published implementation load by their own names.

    Parameters
    ----------
    family : "scalemae", "satmae++" or "dinov3": positions and blocks of the backbone.
    in_channels : number of bands C.
    num_classes : number of classes, class 0 ("unlabelled") included.
    wavelengths : [C], centre wavelengths of the bands in micrometres; HyperT needs them.
    image_size : side, or height and width, of the images in pixels; multiples of `patch_size`.
    patch_size : side of a patch in pixels.
    embed_dim, depth, num_heads, mlp_ratio : of the transformer. ViT-L is 1024, 24, 16, 4.
    feature_blocks : ascending indices of one to four blocks whose tokens the decoder sees; by
        default the last of each quarter (5, 11, 17, 23 of 24).
    adapter : "aomoa" (SpectralX), "lora", "slr" or "ia3" (baselines), or None.
    adapted_blocks : indices of the blocks that get the adapter; by default every sixth (5, 11, 17,
        23 of 24).
    adapter_options : keywords of the adapter, for example ``{"experts": 8}`` or ``{"rank": 8}``.
    tokenizer : "hypert", or "conv", a patch convolution that the adapter adapts too (AoMoA cannot
        and leaves it frozen); by default HyperT for AoMoA, the convolution for all else.
    refine : whether the Are-adapter runs; by default with AoMoA on HyperT.
    trainable : "adapters" trains adapters, norms of the backbone, HyperT's low-rank path, the
        Are-adapter and the decoder (SpectralX), and without an adapter the decoder alone;
        "decoder" the decoder and the Are-adapter; "all" everything (full fine-tuning, training
        from scratch).
    resolution : metres on the ground a pixel covers.
    stem_dim, tokenizer_heads, low_rank : of `HyperT`.
    storage_tokens : of DINOv3.
    decoder : "upernet" (SpectralX), or "linear", a `LinearDecoder` on the same feature maps.
    decoder_kernel : side of the linear decoder's kernel over tokens, odd; 1 is none.
    neck_channels, head_channels : of `UPerNet`.
    dropout : of either decoder.
    neck_scales : size of each map of UPerNet's pyramid over the map of tokens, finest first, one a
        feature block; by default the first of 4, 2, 1, 1/2. Logits have the finest one's size.

    Attributes
    ----------
    config : the arguments, by name; ``Segmentation(**model.config)`` builds such a model again.

    Raises
    ------
    ValueError : an unknown choice, or sizes that do not fit each other.

    Source: SpectralX, stage 2.
    """

    def __init__(
        self,
        family: Family,
        in_channels: int,
        num_classes: int,
        wavelengths: Sequence[float] | None = None,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        feature_blocks: Sequence[int] | None = None,
        adapter: Method | None = "aomoa",
        adapted_blocks: Sequence[int] | None = None,
        adapter_options: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        refine: bool | None = None,
        trainable: Trainable = "adapters",
        resolution: float = 10.0,
        stem_dim: int = 512,
        tokenizer_heads: int = 8,
        low_rank: int | None = 16,
        storage_tokens: int = 4,
        decoder: Decoder = "upernet",
        decoder_kernel: int = 1,
        neck_channels: int | None = None,
        head_channels: int = 512,
        neck_scales: Sequence[float] | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        wavelengths = None if wavelengths is None else [float(each) for each in wavelengths]
        self.config: dict[str, Any] = {
            name: list(value) if isinstance(value, (tuple, list, range)) else value
            for name, value in locals().items()
            if name not in ("self", "__class__")
        }
        _check_one_of("family", family, Family)
        _check_one_of("trainable", trainable, Trainable)
        _check_one_of("decoder", decoder, Decoder)
        tokenizer = tokenizer or ("hypert" if adapter == "aomoa" else "conv")
        _check_one_of("tokenizer", tokenizer, Tokenizer)
        with_hypert = tokenizer == "hypert"
        refine = (with_hypert and adapter == "aomoa") if refine is None else refine
        if refine and not with_hypert:
            raise ValueError("refine: got True, expected False without HyperT (tokenizer)")
        self.image_size = _image_size(image_size, patch_size)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        tokens = self.grid[0] * self.grid[1]
        self.feature_blocks = _feature_blocks(feature_blocks, depth)

        proj: nn.Module
        if with_hypert:
            if wavelengths is None:
                raise ValueError("wavelengths: got None, expected one for each band with HyperT")
            proj = HyperT(
                in_channels,
                wavelengths,
                embed_dim=embed_dim,
                image_size=self.image_size,
                tokens=tokens,
                stem_dim=stem_dim,
                num_heads=tokenizer_heads,
                resolution=resolution,
                low_rank=low_rank,
                patch_size=patch_size,
                trainable="all" if trainable == "all" else "official",
            )
        else:
            proj = PatchConv2d(in_channels, embed_dim, patch_size)
        patch_embed = PatchEmbed(proj)
        self.vit_backbone: DINOv3 | PositionedEncoder
        if family == "dinov3":
            self.vit_backbone = DINOv3(
                patch_embed,
                embed_dim,
                depth,
                num_heads,
                mlp_ratio=mlp_ratio,
                storage_tokens=storage_tokens,
            )
        else:
            # ScaleMAE counts positions in metres, SatMAE++ in patches.
            positions = sincos_positions(
                embed_dim,
                self.grid,
                resolution=resolution if family == "scalemae" else 1.0,
                class_token=True,
            )
            self.vit_backbone = PositionedEncoder(
                patch_embed, positions, depth, num_heads, mlp_ratio=mlp_ratio
            )
        if adapter is not None:
            blocks = adapter_blocks(depth) if adapted_blocks is None else adapted_blocks
            options = adapter_options or {}
            adapt(self.vit_backbone, method=adapter, blocks=blocks, **options)
            if not with_hypert and adapter != "aomoa":
                adapt(patch_embed, method=adapter, targets="^proj$", **options)
        self.AreApt = (
            AreAdapter(embed_dim, self.grid, spatial_dim=stem_dim, positions=proj.proj.map_size)
            if refine and isinstance(proj, HyperT)
            else None
        )
        widths = [embed_dim] * len(self.feature_blocks)
        self.neck: MultiLevelNeck | None = None
        self.head: UPerHead | LinearDecoder
        if decoder == "linear":
            self.head = LinearDecoder(
                widths, num_classes, dropout=dropout, kernel_size=decoder_kernel
            )
        else:
            upernet = UPerNet(
                widths,
                num_classes,
                neck_channels=neck_channels,
                head_channels=head_channels,
                scales=neck_scales or NECK_SCALES[: len(self.feature_blocks)],
                dropout=dropout,
            )
            self.neck, self.head = upernet.neck, upernet.head
        if trainable == "adapters":
            freeze(self.vit_backbone, norms=adapter is not None)
        else:
            self.vit_backbone.requires_grad_(trainable == "all")

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        """A norm of the published model that nothing passes through."""
        width = self.config["embed_dim"]
        return {"norm.weight": (width,), "norm.bias": (width,)}

    @property
    def logits_size(self) -> tuple[int, int]:
        """Rows and columns of the logits: the patch grid's times ``neck_scales[0]``, 4 by default.

        With the linear decoder, the patch grid's.
        """
        rows, columns = self.grid
        if self.neck is None:
            return rows, columns
        return self.neck.finest_size(rows, columns)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images [B, C, H, W], each [B, D, rows, columns], one a feature block.

        Raises
        ------
        ValueError : images of another size or another number of bands.
        """
        expected = (self.in_channels, *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: got shape {list(images.shape)}, expected [batch, "
                + ", ".join(map(str, expected))
                + "]"
            )
        patches, spatial, spectral = self.vit_backbone.patch_embed(images)
        are, refine = self.AreApt, None
        if are is not None:
            keys = are.project_keys(spatial, spectral)

            def refine(tokens: Tensor) -> Tensor:
                return are.refine(tokens, keys)

        features = self.vit_backbone.features(patches, self.grid, self.feature_blocks, refine)
        return [x.transpose(1, 2).unflatten(2, self.grid) for x in features]

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, classes, *logits_size]."""
        features = self.features(images)
        if isinstance(self.head, LinearDecoder):
            logits: Tensor = self.head(features)
            return logits
        assert self.neck is not None
        return decode(self.neck, self.head, features)

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        ignore_index: int = 0,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of the logits, bilinearly upsampled to the labels' size.

        Parameters
        ----------
        images : [B, C, H, W].
        labels : [B, h, w], integers; pixels of `ignore_index` do not count.
        weight : [classes], of each class.
        label_smoothing : share of the target spread over all classes.
        """
        return upsample_cross_entropy(
            self(images),
            labels,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    @torch.no_grad()
    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Classes [B, *size] of images [B, C, H, W], at the images' size by default."""
        return upsample_argmax(self(images), size or (images.shape[-2], images.shape[-1]))


def _image_size(size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Height and width, if they are whole patches."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if patch_size < 1 or len(sides) != 2 or min(sides) < 1 or any(s % patch_size for s in sides):
        raise ValueError(
            f"image_size: got {size}, expected positive multiples of patch_size {patch_size}"
        )
    return sides[0], sides[1]


def _feature_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    """`blocks` if they can be feature blocks, else the last of each quarter of the depth."""
    if blocks is None:
        return sorted({block for block in (depth * q // 4 - 1 for q in range(1, 5)) if block >= 0})
    found = sorted(set(blocks))
    if list(blocks) != found or not 1 <= len(found) <= 4 or found[0] < 0 or found[-1] >= depth:
        raise ValueError(
            f"feature_blocks: got {list(blocks)}, expected one to four ascending block numbers "
            f"below depth {depth}"
        )
    return found
