"""The DINOv3 vision transformer: storage tokens, layer scale, axial rotary positions.

Parameter names are those of the published checkpoints, which therefore load as they are.

Source: "DINOv3" (Siméoni et al., arXiv 2508.10104); SpectralX uses it in stage 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx.backbones.vit import NORM_EPS, Attention, Block, init_linear
from spectralx_kernels import Linear, OfficialNames, linear

Rotation = tuple[Tensor, Tensor]


class AxialRope(nn.Module):
    """Sines and cosines that rotate the queries and keys of a grid of patches.

    Half of a head's channels turn with the row and half with the column, in pairs half a head
    apart. The coordinate of row i of n is (i + 0.5) / n scaled to [-1, 1]; a pair with period p
    turns by 2·pi·coordinate / p, and the periods are base^(2j / (head_dim / 2)).

    Parameters
    ----------
    head_dim : width of an attention head, a multiple of 4.
    base : the limit of the periods; the shortest is 1.
    dtype : of the rotation and of everything that leads to it.
    """

    periods: Tensor

    def __init__(
        self, head_dim: int, *, base: float = 100.0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim: got {head_dim}, expected a multiple of 4")
        exponents = 2 * torch.arange(head_dim // 4, dtype=dtype) / (head_dim // 2)
        self.register_buffer("periods", base**exponents)
        self.dtype = dtype

    def forward(self, rows: int, columns: int) -> Rotation:
        """Sines and cosines, each [rows · columns, head_dim] in `dtype`."""
        device, dtype = self.periods.device, self.dtype
        down = torch.arange(0.5, rows, device=device, dtype=dtype) / rows
        right = torch.arange(0.5, columns, device=device, dtype=dtype) / columns
        # Autocast to float16 takes no bfloat16 where it looks for the wider of two dtypes.
        with torch.autocast(device.type, enabled=False):
            grid = torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1).flatten(0, 1)
        coordinates = 2.0 * grid - 1.0  # [N, 2]
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods.to(dtype)
        angles = angles.flatten(1).tile(2)  # [N, 2, head_dim/4] -> [N, head_dim]
        return angles.sin(), angles.cos()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the patch tokens of queries or keys [B, heads, N, head_dim]; the ones before stay.

    The rotation runs in its own dtype, to which the tokens before the patches are rounded too.
    """
    sin, cos = rotation
    prefix, patches = x.to(sin.dtype).split([x.shape[-2] - sin.shape[0], sin.shape[0]], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    with torch.autocast(x.device.type, enabled=False):  # as in `AxialRope`
        turned = patches * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([prefix, turned], dim=-2).to(x.dtype)


class KeyMaskedLinear(Linear):
    """A joint projection of queries, keys and values whose bias is masked on the keys.

    ``bias_mask`` [out] is 1, and 0 in the key third; it is part of the state dict.
    """

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        mask = torch.ones(out_features)
        mask[out_features // 3 : 2 * out_features // 3] = 0
        self.register_buffer("bias_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return linear(x, self.weight, self.bias * self.bias_mask)


class RotaryAttention(Attention):
    """Self-attention whose queries and keys are rotated by their position.

    Parameters
    ----------
    dim : width of a token.
    num_heads : number of heads; must divide `dim`.
    mask_key_bias : the bias of the keys does not act.
    """

    def __init__(self, dim: int, num_heads: int, *, mask_key_bias: bool = True) -> None:
        super().__init__(dim, num_heads)
        if mask_key_bias:
            self.qkv = KeyMaskedLinear(dim, 3 * dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N, D]."""
        query, key, value = self.heads(x)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class LayerScale(nn.Module):
    """Multiplication by a learned weight a channel, ``gamma`` [dim]."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim]."""
        return x * self.gamma


class DINOv3Block(Block):
    """A pre-norm block with rotary attention, and layer scale on both branches.

    Parameters
    ----------
    dim, num_heads, mlp_ratio : as in `Block`.
    layer_scale : start value of the layer scale.
    mask_key_bias : as in `RotaryAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        mask_key_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio)
        self.attn = RotaryAttention(dim, num_heads, mask_key_bias=mask_key_bias)
        self.ls1 = LayerScale(dim, layer_scale)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Tokens [B, N, D] to tokens [B, N, D]."""
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class DINOv3(OfficialNames):
    """Encoder of stage 2 in the DINOv3 family.

    Parameters
    ----------
    patch_embed : makes patch tokens of images; kept under this name, not called here.
    embed_dim : width D of a token.
    depth, num_heads, mlp_ratio : of the blocks. ViT-L is 1024, 24, 16, 4.
    storage_tokens : number of tokens after the class token that stand for no patch.
    layer_scale, mask_key_bias : as in `DINOv3Block`.
    rope_base, rope_dtype : as in `AxialRope`.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        storage_tokens: int = 4,
        layer_scale: float = 1e-5,
        mask_key_bias: bool = True,
        rope_base: float = 100.0,
        rope_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, storage_tokens, embed_dim))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.storage_tokens, std=0.02)
        self.blocks = nn.ModuleList(
            DINOv3Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                mask_key_bias=mask_key_bias,
            )
            for _ in range(depth)
        )
        self.blocks.apply(init_linear)
        self.rope_embed = AxialRope(embed_dim // num_heads, base=rope_base, dtype=rope_dtype)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

    @property
    def official_inert(self) -> Mapping[str, tuple[int, ...]]:
        """Pre-training's mask token and the norm of its local crops."""
        width = self.norm.normalized_shape[0]
        return {
            "mask_token": (1, width),
            "local_cls_norm.weight": (width,),
            "local_cls_norm.bias": (width,),
        }

    def features(
        self,
        patches: Tensor,
        grid: tuple[int, int],
        feature_blocks: Sequence[int],
        refine: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Normed patch tokens after each of `feature_blocks`.

        Parameters
        ----------
        patches : patch tokens [B, rows · columns, D], row by row.
        grid : rows and columns of patches.
        feature_blocks : indices of blocks, ascending; blocks past the last one do not run.
        refine : applied to the patch tokens [B, N, D] after each feature block; what it returns
            goes on to the next block.

        Returns
        -------
        One [B, rows · columns, D] for each feature block.
        """
        batch = patches.shape[0]
        prefix = torch.cat([self.cls_token, self.storage_tokens], dim=1)
        x = torch.cat([prefix.expand(batch, -1, -1), patches], dim=1)
        rotation = self.rope_embed(*grid)
        found = []
        for index, block in enumerate(self.blocks[: feature_blocks[-1] + 1]):
            x = block(x, rotation)
            if index in feature_blocks:
                if refine is not None:
                    before, patches = x.split([prefix.shape[1], patches.shape[1]], dim=1)
                    x = torch.cat([before, refine(patches)], dim=1)
                found.append(self.norm(x[:, prefix.shape[1] :]))
        return found
