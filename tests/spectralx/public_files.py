"""Public checkpoints of backbones, made up: the true names (ViT-L/16: 24 blocks), narrow widths."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralx.backbones.positions import sincos_positions

WIDTH, DEPTH, DECODER = 16, 24, 8


class Drawn(dict[str, Tensor]):
    """Tensors drawn by name."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def add(self, name: str, *shape: int) -> None:
        self[name] = torch.randn(shape, generator=self.generator)

    def layer(self, name: str, *shape: int, bias: int | None = None) -> None:
        self.add(f"{name}.weight", *shape)
        self.add(f"{name}.bias", shape[0] if bias is None else bias)

    def blocks(self, name: str, depth: int, width: int) -> None:
        for index in range(depth):
            block = f"{name}.{index}"
            self.layer(f"{block}.norm1", width)
            self.layer(f"{block}.attn.qkv", 3 * width, width)
            self.layer(f"{block}.attn.proj", width, width)
            self.layer(f"{block}.norm2", width)
            self.layer(f"{block}.mlp.fc1", 4 * width, width)
            self.layer(f"{block}.mlp.fc2", width, 4 * width)


def vit(patch: int = 16, bands: int = 3, side: int = 14) -> Drawn:
    """timm's names, learned positions."""
    state = Drawn()
    state.add("cls_token", 1, 1, WIDTH)
    state.add("pos_embed", 1, side**2 + 1, WIDTH)
    state.layer("patch_embed.proj", WIDTH, bands, patch, patch)
    state.blocks("blocks", DEPTH, WIDTH)
    state.layer("norm", WIDTH)
    return state


def mae(decoder_depth: int = 8, *, positions: bool = True) -> Drawn:
    state = vit()
    state["pos_embed"] = sincos_positions(WIDTH, (14, 14), class_token=True)[None]
    state.add("mask_token", 1, 1, DECODER)
    table = sincos_positions(DECODER, (14, 14), class_token=True)[None]
    state["decoder_pos_embed"] = table if positions else torch.zeros_like(table)
    state.layer("decoder_embed", DECODER, WIDTH)
    state.blocks("decoder_blocks", decoder_depth, DECODER)
    state.layer("decoder_norm", DECODER)
    return state


def upsampling(state: Drawn, name: str, bands: int) -> None:
    wide = 4 * bands
    state.layer(f"{name}.up_conv", wide, wide, 4, 4)
    for layer in ("up_norm", "res_norm"):
        state.layer(f"{name}.{layer}", wide)
    for layer in ("conv1", "conv2"):
        state.layer(f"{name}.res_block.{layer}", wide, wide, 3, 3)
    state.layer(f"{name}.proj_out", bands, wide, 3, 3)


def satmaepp() -> Drawn:
    state = mae()
    state.layer("decoder_pred", 16 * 16 * 3, DECODER)
    state.layer("proj_up_conv", 12, 3, 1, 1)
    state.layer("proj_up_norm", 12)
    upsampling(state, "up_block", 3)
    return state


def satmaepp_groups() -> Drawn:
    """Sentinel-2: patches of 8, three groups of bands, narrower positions beside a table."""
    state = mae()
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        del state[name]
    for index, count in enumerate((4, 4, 2)):
        state.layer(f"patch_embed.{index}.proj", WIDTH, count, 8, 8)
        state.layer(f"decoder_pred.{index}", count * 64, DECODER)
    state["pos_embed"] = sincos_positions(12, (12, 12), class_token=True)[None]
    state["decoder_pos_embed"] = torch.zeros(1, 145, 6)
    state.add("channel_embed", 1, 3, 4)
    state.add("decoder_channel_embed", 1, 4, 2)
    state.layer("proj_up_conv", 40, 10, 1, 1)
    state.layer("proj_up_norm", 40)
    for name in ("up_block1", "up_block2"):
        upsampling(state, name, 10)
    return state


def scalemae() -> Drawn:
    state = mae(3, positions=False)
    state.layer("fpn.fpn1.0", DECODER, DECODER, 2, 2)
    state.layer("fpn.fpn1.1.ln", DECODER)
    state.layer("fpn.fpn1.3", DECODER, DECODER, 2, 2)
    state.layer("fpn.fpn2.0", DECODER, DECODER, 2, 2)
    for head in ("fcn_high", "fcn_low"):
        state.layer(f"{head}.proj", 8, DECODER, 1, 1)
        for block in range(2):
            name = f"{head}.conv_blocks.{block}"
            state.layer(f"{name}.convs.1", 4, 2, 3, 3)
            state.layer(f"{name}.convs.3", 8, 4, 1, 1)
            state.layer(f"{name}.residual", 8, 8, 1, 1)
        state.layer(f"{head}.pred.0.ln", 8)
        state.layer(f"{head}.pred.1", 8, 4, 4, 4, bias=4)
        state.layer(f"{head}.pred.3", 2, 2, 3, 3)
        state.layer(f"{head}.pred.5", 4, 2, 1, 1)
        state.layer(f"{head}.pred.7", 4, 3, 2, 2, bias=3)
    return state


def dinov3(*, satellite: bool = True) -> Drawn:
    state = Drawn()
    state.add("cls_token", 1, 1, WIDTH)
    state.add("storage_tokens", 1, 4, WIDTH)
    state.add("mask_token", 1, WIDTH)
    state.layer("patch_embed.proj", WIDTH, 3, 16, 16)
    state["rope_embed.periods"] = (100 ** (torch.arange(2) / 2)).bfloat16()
    state.blocks("blocks", DEPTH, WIDTH)
    for index in range(DEPTH):
        mask = torch.ones(3 * WIDTH)
        mask[WIDTH : 2 * WIDTH] = 0
        state[f"blocks.{index}.attn.qkv.bias_mask"] = mask
        for scale in ("ls1", "ls2"):
            state.add(f"blocks.{index}.{scale}.gamma", WIDTH)
    state.layer("norm", WIDTH)
    if satellite:
        state.layer("local_cls_norm", WIDTH)
    return state


def transformers_dinov3(state: Drawn) -> dict[str, Tensor]:
    """`dinov3` in the names of transformers."""
    names = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    out: dict[str, Tensor] = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"][None],
        "embeddings.register_tokens": state["storage_tokens"],
        "embeddings.patch_embeddings.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": state["patch_embed.proj.bias"],
    }
    for name, tensor in state.items():
        if name.startswith("norm."):
            out[name] = tensor
        if not name.startswith("blocks.") or name.endswith("bias_mask"):
            continue
        _, index, rest = name.split(".", 2)
        kind = rest.rpartition(".")[2]
        if rest.startswith("attn.qkv"):
            for key, part in zip("qkv", tensor.chunk(3), strict=True):
                if (key, kind) != ("k", "bias"):
                    out[f"layer.{index}.attention.{key}_proj.{kind}"] = part
        elif rest.endswith("gamma"):
            out[f"layer.{index}.layer_scale{rest[2]}.lambda1"] = tensor
        else:
            for old, new in names.items():
                rest = rest.replace(old, new)
            out[f"layer.{index}.{rest}"] = tensor
    return out


def timm_dinov3(state: Drawn) -> dict[str, Tensor]:
    """`dinov3` in the names of timm, which leaves the bias of qkv out."""
    out = {}
    for name, tensor in state.items():
        if name.startswith(("mask_token", "rope", "local")) or ".qkv.bias" in name:
            continue
        name = name.replace("storage_tokens", "reg_token")
        out[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = tensor
    return out
