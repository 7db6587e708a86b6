"""Stage 1: reconstruct masked images, training adapters of a frozen masked autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from spectralx.adapt import Method, adapt, adapter_blocks, check_method, freeze
from spectralx.backbones.channel_norm import ChannelNorm
from spectralx.backbones.encoder import PatchEmbed
from spectralx.backbones.mae import MaskedAutoencoder
from spectralx.backbones.satmaepp import UpsamplingBlock
from spectralx.backbones.scalemae import ConvHead, FeaturePyramid
from spectralx.backbones.vit import init_linear
from spectralx_kernels import (
    HyperT,
    Linear,
    PatchConv2d,
    band_reconstruction_loss,
    masked_patch_loss,
    patchify,
    unpatchify,
    upsampled_l1_loss,
)

Family = Literal["satmae++", "scalemae"]
FAMILIES: tuple[Family, ...] = get_args(Family)
PATCH_WEIGHT, UPSAMPLED_WEIGHT = 0.6, 0.4  # of SatMAE++'s two losses
DECODER_DEPTH: Mapping[Family, int] = {"satmae++": 8, "scalemae": 3}
SCALEMAE_UPSAMPLING = 16  # the pyramid's low level and its head: a patch becomes 16 x 16 pixels

# Parameters outside adapters and norms that train, by published name.
_TOKENS = r"^(cls_token|mask_token)$"
_SATMAEPP_HEAD = r"^(proj_up_conv|up_block)\."
_SCALEMAE_HEAD = r"^fcn_(high|low)\.pred\.7\."


class Reconstruction(NamedTuple):
    """What a training step needs.

    Attributes
    ----------
    loss : scalar.
    prediction : [B, patches, P*P*C], predicted patches; each runs row, column, band.
    mask : [B, patches], 1 where a patch was hidden from the encoder.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class ReconstructedImages(NamedTuple):
    """What a picture of the reconstruction needs; images are [B, C, H, W].

    Attributes
    ----------
    images : the input.
    masked : the input with its hidden pixels at 0.
    reconstructed : the input with its hidden pixels as predicted.
    predicted : the prediction everywhere.
    mask : [B, H, W], true where a pixel was hidden.
    """

    images: Tensor
    masked: Tensor
    reconstructed: Tensor
    predicted: Tensor
    mask: Tensor


def _image_size(size: int | Sequence[int], multiple: int) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if multiple < 1:
        raise ValueError(f"patch_size: got {multiple}, expected at least 1")
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(
            f"image_size: got {height}x{width}, expected multiples of patch_size {multiple}"
        )
    return height, width


class MaskedReconstruction(MaskedAutoencoder):
    """A masked autoencoder of the SatMAE++ or the ScaleMAE family, adapted to spectral images.

    The defaults are the paper's, on ViT-L/16. State-dict names are the published ones, or load
    from them.

    Parameters
    ----------
    family : "satmae++" predicts patches and an image of twice the side; "scalemae" predicts the
        image and its high frequencies at twice the side, with positions in metres.
    in_channels : number of bands C.
    wavelengths : [C], micrometres, centre of each band; needed by HyperT.
    adapter : "aomoa" (SpectralX), "lora", "slr", "ia3", or None for a frozen autoencoder. It sits
        on the encoder blocks `adapter_blocks`, on every decoder block and on the decoder's first
        and last linear layer.
    tokenizer : "hypert", or "conv", a patch convolution that the adapter adapts too (AoMoA cannot
        and leaves it frozen). None is "hypert" for AoMoA and "conv" for all else.
    image_size : side, or height and width, in pixels; a multiple of `patch_size`.
    patch_size : side of a patch in pixels. ScaleMAE takes 16 only.
    embed_dim, depth, num_heads : of the encoder.
    decoder_embed_dim, decoder_depth, decoder_num_heads : of the decoder; a depth of None is 8 for
        SatMAE++ and 3 for ScaleMAE.
    mlp_ratio : hidden width of an MLP over its tokens' width.
    fcn_dim, fcn_layers : width and blocks of ScaleMAE's two convolutional heads.
    up_dim : width of SatMAE++'s convolutions to the image of twice the side; None is 4 C.
    mask_ratio : share of patches hidden from the encoder.
    resolution : metres a pixel, for HyperT's and ScaleMAE's positions.
    adapted_blocks : encoder blocks to adapt; None is every sixth (5, 11, 17, 23 of 24).
    adapter_options : keywords of the adapter, for example ``{"rank": 8}``.
    tokenizer_options : further keywords of HyperT, for example ``{"stem_dim": 64}``; None with a
        patch convolution.
    trainable : "official" trains what the paper's code trains (see `spectralx.adapt.freeze`),
        "all" trains everything but the layers inside adapters.

    Attributes
    ----------
    config : the arguments, by name; ``MaskedReconstruction(**model.config)`` builds such a model
        again.

    Raises
    ------
    ValueError : an unknown name, or sizes that do not fit each other.

    Source: SpectralX (arXiv 2508.01731), stage 1.
    """

    def __init__(
        self,
        family: Family = "scalemae",
        *,
        in_channels: int,
        wavelengths: Sequence[float] | None = None,
        adapter: Method | None = "aomoa",
        tokenizer: Literal["hypert", "conv"] | None = None,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int | None = None,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        fcn_dim: int = 512,
        fcn_layers: int = 2,
        up_dim: int | None = None,
        mask_ratio: float = 0.75,
        resolution: float = 10.0,
        adapted_blocks: Sequence[int] | None = None,
        adapter_options: Mapping[str, Any] | None = None,
        tokenizer_options: Mapping[str, Any] | None = None,
        trainable: Literal["official", "all"] = "official",
    ) -> None:
        config = {
            name: list(value) if isinstance(value, (tuple, list, range)) else value
            for name, value in locals().items()
            if name not in ("self", "__class__")
        }
        if wavelengths is not None:
            config["wavelengths"] = [float(wavelength) for wavelength in wavelengths]
        if family not in FAMILIES:
            raise ValueError(f"family: got {family!r}, expected one of {', '.join(FAMILIES)}")
        if adapter is not None:
            check_method(adapter)
        if trainable not in ("official", "all"):
            raise ValueError(f"trainable: got {trainable!r}, expected 'official' or 'all'")
        if tokenizer is None:
            tokenizer = "hypert" if adapter == "aomoa" else "conv"
        if up_dim is not None and up_dim < 1:
            raise ValueError(f"up_dim: got {up_dim}, expected at least 1")
        size = _image_size(image_size, patch_size)
        if patch_size != SCALEMAE_UPSAMPLING and family == "scalemae":
            raise ValueError(f"patch_size: got {patch_size}, expected 16 with scalemae")
        if tokenizer == "hypert":
            if wavelengths is None:
                raise ValueError("wavelengths: got None, expected the bands' with hypert")
            proj: nn.Module = HyperT(
                in_channels,
                wavelengths,
                embed_dim=embed_dim,
                image_size=size,
                patch_size=patch_size,
                resolution=resolution,
                trainable=trainable,
                **(tokenizer_options or {}),
            )
        elif tokenizer == "conv":
            if tokenizer_options:
                raise ValueError(f"tokenizer_options: got {tokenizer_options}, expected hypert")
            proj = PatchConv2d(in_channels, embed_dim, patch_size)
            nn.init.xavier_uniform_(proj.weight.data.flatten(1))
        else:
            raise ValueError(f"tokenizer: got {tokenizer!r}, expected 'hypert' or 'conv'")
        scalemae = family == "scalemae"
        super().__init__(
            PatchEmbed(proj),
            (size[0] // patch_size, size[1] // patch_size),
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=DECODER_DEPTH[family] if decoder_depth is None else decoder_depth,
            decoder_num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
            resolution=resolution if scalemae else 1.0,
            decoder_class_token=not scalemae,
            mask_ratio=mask_ratio,
        )
        self.config: dict[str, Any] = config
        self.family = family
        self.in_channels = in_channels
        self.image_size = size
        self.patch_size = patch_size
        if scalemae:
            self.fpn = FeaturePyramid(decoder_embed_dim)
            self.fcn_high = ConvHead(decoder_embed_dim, fcn_dim, fcn_layers, in_channels)
            self.fcn_low = ConvHead(decoder_embed_dim, fcn_dim, fcn_layers, in_channels)
        else:
            self.decoder_pred = Linear(decoder_embed_dim, patch_size**2 * in_channels)
            init_linear(self.decoder_pred)
            width = 4 * in_channels if up_dim is None else up_dim
            self.proj_up_conv = nn.Conv2d(in_channels, width, 1)
            self.proj_up_norm = ChannelNorm(width)
            self.up_block = UpsamplingBlock(width, in_channels)
        if adapter is not None:
            self._adapt(adapter, tokenizer, adapted_blocks, adapter_options or {})
        if trainable == "official":
            self._freeze(adapter)

    def _adapt(
        self,
        method: Method,
        tokenizer: str,
        blocks: Sequence[int] | None,
        options: Mapping[str, Any],
    ) -> None:
        layers = r"mlp\.fc[12]" if method == "aomoa" else r"(attn\.(qkv|proj)|mlp\.fc[12])"
        blocks = adapter_blocks(len(self.blocks)) if blocks is None else blocks
        adapt(self, method=method, targets=rf"^blocks\.\d+\.{layers}$", blocks=blocks, **options)
        # The published LoRA leaves the last layer of SatMAE++'s decoder alone; the others do not.
        ends = "embed" if method == "lora" else "embed|pred"
        targets = rf"^(decoder_blocks\.\d+\.{layers}|decoder_({ends}))$"
        adapt(self, method=method, targets=targets, **options)
        if tokenizer == "conv" and method != "aomoa":
            adapt(self, method=method, targets=r"^patch_embed\.proj$", **options)

    def _freeze(self, adapter: Method | None) -> None:
        kept = [_TOKENS]
        if self.family == "satmae++":
            kept.append(_SATMAEPP_HEAD)
        elif adapter is not None:
            kept.append(_SCALEMAE_HEAD)
        freeze(self, norms=adapter is not None, keep="|".join(kept))

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        """Published tensors without a place here: fixed tables, ScaleMAE's unused mask token."""
        unused = {"mask_token_decoder": (1, 1, self.decoder_embed_dim)}
        return {**super().official_inert, **(unused if self.family == "scalemae" else {})}

    def draw_mask_noise(self, images: Tensor) -> Tensor:
        """Uniform noise [B, patches] in float32 on the device of `images`."""
        return torch.rand(images.shape[0], self.patches, device=images.device)

    def predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the family's loss scores, of the decoder's tokens [B, N, decoder_embed_dim].

        SatMAE++: patches [B, patches, P*P*C] and the image of twice the side. ScaleMAE: the high
        frequencies at twice the side [B, C, 2H, 2W] and the image [B, C, H, W].
        """
        if self.family == "scalemae":
            high, low = self.fpn(tokens.transpose(1, 2).unflatten(2, self.grid))
            return self.fcn_high(high), self.fcn_low(low)
        # The class token takes part in `decoder_pred`: AoMoA's gates draw noise for it too.
        prediction = self.decoder_pred(tokens)[:, 1:]
        image = unpatchify(prediction, self.patch_size, self.image_size)
        # All maps behind have their channels side by side, as the norms over them want it.
        image = image.contiguous(memory_format=torch.channels_last)
        return prediction, self.up_block(self.proj_up_conv(image), self.proj_up_norm)

    def score(
        self, predicted: tuple[Tensor, Tensor], images: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of what `predict` gave, and the predicted patches [B, patches, P*P*C]."""
        if self.family == "scalemae":
            high, low = predicted
            loss = band_reconstruction_loss(high, low, images, mask, grid=self.grid)
            return loss, patchify(low, self.patch_size)
        prediction, upsampled = predicted
        loss = PATCH_WEIGHT * masked_patch_loss(prediction, images, mask, self.patch_size)
        loss = loss + UPSAMPLED_WEIGHT * upsampled_l1_loss(upsampled, images)
        return loss, prediction

    def forward(self, images: Tensor, mask_noise: Tensor | None = None) -> Reconstruction:
        """Loss and prediction of images [B, C, H, W], normalised by the caller.

        Parameters
        ----------
        images : [B, in_channels, *image_size].
        mask_noise : [B, patches]; patches with the smallest noise stay visible. Drawn if None.

        Raises
        ------
        ValueError : images of another shape.
        """
        expected = [self.in_channels, *self.image_size]
        if images.dim() != 4 or list(images.shape[1:]) != expected:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"images: got shape {list(images.shape)}, expected [B, {wanted}]")
        noise = self.draw_mask_noise(images) if mask_noise is None else mask_noise
        latent, mask, ids_restore = self.encode(images, noise)
        predicted = self.predict(self.decode(latent, ids_restore))
        loss, prediction = self.score(predicted, images, mask)
        return Reconstruction(loss, prediction, mask)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_noise: Tensor | None = None) -> ReconstructedImages:
        """Input, masked and reconstructed images; arguments as in `forward`.

        The model runs in the mode it is in: call ``eval()`` first for a result free of gate noise.
        """
        _, prediction, mask = self(images, mask_noise)
        predicted = unpatchify(prediction, self.patch_size, self.image_size).to(images.dtype)
        hidden = mask.unflatten(1, self.grid).bool()
        hidden = hidden.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)
        masked = images.masked_fill(hidden[:, None], 0.0)
        reconstructed = torch.where(hidden[:, None], predicted, images)
        return ReconstructedImages(images, masked, reconstructed, predicted, hidden)
