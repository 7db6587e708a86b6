"""Public weights of backbones by their names: whose they are, and their names here.

Names that SatMAE++, ScaleMAE, MAE, timm's ViTs and DINOv3 share are the ones used here; the
others are translated: DINOv3 as transformers and timm keep it, layer scales, SatMAE++'s groups.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectralx.checkpoints.errors import CheckpointError

# Micrometres, in the order of the channels. RGB of cameras and of fMoW; Sentinel-2 as SatMAE++
# groups it: bands 2, 3, 4, 8 / 5, 6, 7, 8A / 11, 12.
RGB = (0.640, 0.550, 0.470)
_GROUP_BANDS = ((0.490, 0.560, 0.665, 0.842), (0.705, 0.740, 0.783, 0.865), (1.610, 2.190))
_BLOCKS = re.compile(r"^(.*?)(blocks|layer)\.0\.")
_GROUP = re.compile(r"^patch_embed\.(\d+)\.proj\.(weight|bias)$")


@dataclass(frozen=True)
class Weights:
    """Public weights under the names used here.

    Attributes
    ----------
    source : whose they are.
    tensors : name -> tensor.
    wavelengths : of the patch embedding's channels, micrometres; None where nobody can tell.
    adapted : names whose tensor was put together from others, and how.
    left_out : names in the file that no model here has a place for, and why.
    """

    source: str
    tensors: dict[str, Tensor]
    wavelengths: tuple[float, ...] | None
    adapted: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def source_of(names: Collection[str]) -> str | None:
    """Whose backbone has tensors of these names (prefixes taken off); None if no one's."""
    held = set(names)

    def some_start(*starts: str) -> bool:
        return any(name.startswith(starts) for name in held)

    if "embeddings.register_tokens" in held and some_start("layer.0.attention.q_proj."):
        return "DINOv3 (transformers)"
    if not some_start("blocks.0.attn.qkv."):
        return None
    if "storage_tokens" in held:
        return "DINOv3"
    if "blocks.0.gamma_1" in held:
        return "DINOv3 (timm)"
    if some_start("fpn.", "fcn_high.", "fcn_low."):
        return "ScaleMAE"
    if "patch_embed.0.proj.weight" in held:
        return "SatMAE++ (groups of bands)" if some_start("proj_up_conv.") else "SatMAE (groups)"
    if some_start("proj_up_conv."):
        return "SatMAE++"
    return "MAE" if some_start("decoder_embed.") else "ViT"


def prefix_of(names: Collection[str]) -> str:
    """What stands before the names of the transformer's tensors."""
    found = {match[1] for name in names if (match := _BLOCKS.match(name))}
    found = {prefix for prefix in found if not prefix.endswith("decoder_")}
    return min(found, key=len) if found else ""


def translate(where: str, state: Mapping[str, Tensor]) -> Weights:
    """Public weights `state` under the names used here.

    Raises
    ------
    CheckpointError : no blocks of a transformer in it.
    """
    prefix = prefix_of(state)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    source = source_of(tensors)
    if source is None:
        raise CheckpointError(f"{where}: got no blocks of a transformer, expected its tensors")
    if source == "DINOv3 (transformers)":
        found = _from_transformers(where, tensors)
    elif source == "DINOv3 (timm)":
        found = _from_timm_dinov3(tensors)
    elif "patch_embed.0.proj.weight" in tensors:
        found = _from_groups(source, tensors)
    else:
        projection = tensors.get("patch_embed.proj.weight")
        rgb = projection is not None and projection.ndim == 4 and projection.shape[1] == 3
        found = Weights(source, tensors, RGB if rgb else None)
    return found


def _from_groups(source: str, tensors: dict[str, Tensor]) -> Weights:
    """SatMAE's groups of bands, each a token of its own: one convolution of their mean."""
    groups: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _GROUP.match(name)
        if match:
            groups[match[2]][int(match[1])] = tensor
        else:
            kept[name] = tensor
    parts = {kind: [found[index] for index in sorted(found)] for kind, found in groups.items()}
    count = len(parts["weight"])
    kept["patch_embed.proj.weight"] = torch.cat(parts["weight"], dim=1) / count
    kept["patch_embed.proj.bias"] = torch.stack(parts["bias"]).mean(0)
    sizes = tuple(part.shape[1] for part in parts["weight"])
    known = sizes == tuple(len(group) for group in _GROUP_BANDS)
    wavelengths = tuple(band for group in _GROUP_BANDS for band in group) if known else None
    how = f"mean of the tokens of {count} groups of bands"
    left_out: dict[str, str] = dict.fromkeys(
        (name for name in ("channel_embed", "decoder_channel_embed") if name in kept),
        "fixed table of groups of bands",
    )
    for name in left_out:
        del kept[name]
    adapted = dict.fromkeys(("patch_embed.proj.weight", "patch_embed.proj.bias"), how)
    return Weights(source, kept, wavelengths, adapted, left_out)


_TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layer\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"^layer\.(\d+)\.layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^layer\.(\d+)\.mlp\.up_proj\.", r"blocks.\1.mlp.fc1."),
    (r"^layer\.(\d+)\.mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
    (r"^layer\.(\d+)\.(norm[12])\.", r"blocks.\1.\2."),
)
_JOINED = re.compile(r"^layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)$")


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def _from_transformers(where: str, tensors: dict[str, Tensor]) -> Weights:
    """DINOv3 of transformers: queries, keys and values apart, keys without a bias."""
    kept: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _JOINED.match(name)
        if match:
            parts.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = tensor
        else:
            new = _renamed(name, _TRANSFORMERS)
            kept[new] = tensor[:, 0] if new == "mask_token" and tensor.ndim == 3 else tensor
    adapted = {}
    for name, part in parts.items():
        if name.endswith("bias") and "q" in part and "k" not in part:
            part["k"] = torch.zeros_like(part["q"])
        if set(part) != set("qkv"):
            raise CheckpointError(f"{where}: {name}: got parts {sorted(part)}, expected q, k and v")
        kept[name] = torch.cat([part[key] for key in "qkv"])
        adapted[name] = "queries, keys and values joined"
    return Weights("DINOv3 (transformers)", kept, RGB, adapted)


def _from_timm_dinov3(tensors: dict[str, Tensor]) -> Weights:
    """DINOv3 of timm: other names, and no bias in qkv unless it says so."""
    rules = (
        (r"^reg_token$", "storage_tokens"),
        (r"^blocks\.(\d+)\.gamma_([12])$", r"blocks.\1.ls\2.gamma"),
        (r"^rope\.periods$", "rope_embed.periods"),
    )
    kept = {_renamed(name, rules): tensor for name, tensor in tensors.items()}
    adapted = {}
    for name in [name for name in kept if name.endswith(".attn.qkv.weight")]:
        bias = name.removesuffix("weight") + "bias"
        block = name.removesuffix("qkv.weight")
        query, value = kept.pop(f"{block}q_bias", None), kept.pop(f"{block}v_bias", None)
        kept.pop(f"{block}k_bias", None)  # zero
        if bias in kept:
            continue
        if query is not None and value is not None:
            kept[bias] = torch.cat([query, torch.zeros_like(query), value])
            adapted[bias] = "biases of queries and values, zero for keys"
        else:
            kept[bias] = kept[name].new_zeros(kept[name].shape[0])
            adapted[bias] = "zero: the file has none"
    return Weights("DINOv3 (timm)", kept, RGB, adapted)
