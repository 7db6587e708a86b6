"""What the encoders of stage 2 share, and the encoder of the masked-autoencoder families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectralx.backbones.vit import Block, init_linear
from spectralx_kernels import HyperT, OfficialNames

_PRETRAINING_CLASSES = 1000


class Embedded(NamedTuple):
    """Patch tokens [B, N, D], and HyperT's spatial and spectral features where it made them."""

    tokens: Tensor
    spatial: Tensor | None
    spectral: Tensor | None


class PatchEmbed(nn.Module):
    """Patch tokens of images by ``proj``: a `HyperT`, or a (possibly adapted) patch convolution.

    Parameters
    ----------
    proj : maps images [B, C, H, W] to tokens and features, as `HyperT`, or to a map
        [B, D, rows, columns].
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, images: Tensor) -> Embedded:
        """Images [B, C, H, W] to tokens [B, N, D], row by row, and features."""
        if isinstance(self.proj, HyperT):
            return Embedded(*self.proj(images))
        return Embedded(self.proj(images).flatten(2).transpose(1, 2), None, None)


class PositionedEncoder(OfficialNames):
    """Encoder of stage 2 in the SatMAE++ and ScaleMAE families: a ViT with added positions.

    Parameters
    ----------
    patch_embed : makes patch tokens of images; kept under this name, not called here.
    positions : [N + 1, D], added to the class token and the patches; kept as the buffer
        ``pos_embed`` [1, N + 1, D].
    depth, num_heads, mlp_ratio : of the blocks. ViT-L is 24, 16, 4.
    """

    pos_embed: Tensor

    def __init__(
        self,
        patch_embed: nn.Module,
        positions: Tensor,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        embed_dim = positions.shape[1]
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.normal_(self.cls_token, std=0.02)
        self.register_buffer("pos_embed", positions[None])
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.blocks.apply(init_linear)

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        """The final norm and the classifier, which features of inner blocks do not meet."""
        width = self.pos_embed.shape[-1]
        return {
            "norm.weight": (width,),
            "norm.bias": (width,),
            "head.weight": (_PRETRAINING_CLASSES, width),
            "head.bias": (_PRETRAINING_CLASSES,),
        }

    def features(
        self,
        patches: Tensor,
        grid: tuple[int, int],
        feature_blocks: Sequence[int],
        refine: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Patch tokens after each of `feature_blocks`.

        Parameters
        ----------
        patches : patch tokens [B, N, D], row by row.
        grid : rows and columns of patches; N is their product.
        feature_blocks : indices of blocks, ascending; blocks past the last one do not run.
        refine : applied to the patch tokens [B, N, D] after each feature block; what it returns
            goes on to the next block.

        Returns
        -------
        One [B, N, D] for each feature block.
        """
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        x = torch.cat([cls_token, patches], dim=1) + self.pos_embed
        found = []
        for index, block in enumerate(self.blocks[: feature_blocks[-1] + 1]):
            x = block(x)
            if index in feature_blocks:
                patches = x[:, 1:]
                if refine is not None:
                    patches = refine(patches)
                    x = torch.cat([x[:, :1], patches], dim=1)
                found.append(patches)
        return found
