"""A masked autoencoder up to the tokens of its decoder, as SatMAE++ and ScaleMAE share it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spectralx.backbones.encoder import PatchEmbed
from spectralx.backbones.positions import sincos_positions
from spectralx.backbones.vit import NORM_EPS, Block, init_linear
from spectralx_kernels import Linear, OfficialNames, gather_tokens, random_masking, restore_tokens


class MaskedAutoencoder(OfficialNames):
    """Encoder of the visible patches, and decoder of all of them, without a prediction head.

    Parameters
    ----------
    patch_embed : makes one token of each patch, rows * columns of `grid`.
    grid : rows and columns of patches.
    embed_dim, depth, num_heads : of the encoder.
    decoder_embed_dim, decoder_depth, decoder_num_heads : of the decoder.
    mlp_ratio : hidden width of an MLP over its tokens' width.
    resolution : metres that a patch counts in the position tables; 1 counts patches.
    decoder_class_token : whether the class token passes through the decoder's blocks.
    mask_ratio : share of patches hidden from the encoder, in [0, 1).

    Raises
    ------
    ValueError : a size or the mask ratio out of range.

    Source: masked autoencoders (He et al. 2022, arXiv 2111.06377); SpectralX, stage 1.
    """

    positions: Tensor
    decoder_positions: Tensor

    def __init__(
        self,
        patch_embed: PatchEmbed,
        grid: tuple[int, int],
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        mlp_ratio: float,
        resolution: float,
        decoder_class_token: bool,
        mask_ratio: float,
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio: got {mask_ratio}, expected 0 <= mask_ratio < 1")
        self.grid = grid
        self.embed_dim = embed_dim
        self.decoder_embed_dim = decoder_embed_dim
        self.decoder_class_token = decoder_class_token
        self.mask_ratio = mask_ratio
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.decoder_embed = Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio=mlp_ratio)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=NORM_EPS)
        # Fixed tables: recomputed rather than stored, so a checkpoint fits any grid.
        for name, dim in (
            ("positions", embed_dim),
            ("decoder_positions", decoder_embed_dim),
        ):
            table = sincos_positions(dim, grid, resolution=resolution, class_token=True)
            self.register_buffer(name, table, persistent=False)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for layers in (self.blocks, self.decoder_blocks, [self.decoder_embed]):
            for layer in layers:
                layer.apply(init_linear)

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        """Published copies of the fixed position tables."""
        return {
            "pos_embed": (1, *self.positions.shape),
            "decoder_pos_embed": (1, *self.decoder_positions.shape),
        }

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def visible(self) -> int:
        """Number of patches that the encoder sees; at least one."""
        return max(1, int(self.patches * (1 - self.mask_ratio) + 1e-6))

    def encode(self, images: Tensor, mask_noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the patches with the smallest noise.

        Parameters
        ----------
        images : [B, C, H, W].
        mask_noise : [B, patches], uniform draws.

        Returns
        -------
        latent : [B, 1 + visible, embed_dim], class token first, the rest in order of noise.
        mask : [B, patches], 1 where a patch is hidden.
        ids_restore : [B, patches], a patch's place in the order of noise.
        """
        tokens = self.patch_embed(images).tokens + self.positions[1:]
        ids_keep, mask, ids_restore = random_masking(mask_noise, self.visible)
        tokens = gather_tokens(tokens, ids_keep)
        first = (self.cls_token + self.positions[:1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens), mask, ids_restore

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent [B, 1 + visible, embed_dim] to normed tokens [B, N, decoder_embed_dim].

        N is the number of patches, and 1 more for the class token where it passes the decoder.
        """
        tokens = self.decoder_embed(latent)
        first, visible = tokens[:, :1], tokens[:, 1:]
        tokens = restore_tokens(visible, ids_restore, self.mask_token)
        tokens = tokens + self.decoder_positions[1:]
        if self.decoder_class_token:
            tokens = torch.cat([first + self.decoder_positions[:1], tokens], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        normed: Tensor = self.decoder_norm(tokens)
        return normed
