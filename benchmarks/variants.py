"""Whole models as the other implementations run them, around the same parameters and buffers.

``eager`` runs the reference operators; in stage 2 it forms each upsampled map in the decoder before
it convolves it, in stage 1 its head is plain modules. ``compile`` compiles that; ``dispatch``
replaces the adapted layers in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import dispatch
from spectralx.backbones.scalemae import ConvHead
from spectralx.decoder import UPerHead, set_plain
from spectralx.reconstruction import MaskedReconstruction
from spectralx_kernels import AoMoALinear, unpatchify, use_backend

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class DispatchLinear(nn.Module):
    """An adapted layer run expert by expert (`benchmarks.dispatch`), on the layer's parameters.

    Gate noise is drawn as the layer draws it.
    """

    def __init__(self, layer: AoMoALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        noise = layer.draw_noise(x.numel() // x.shape[-1], x) if self.training else None
        return dispatch.aomoa(
            x,
            layer.linear.weight,
            layer.linear.bias,
            scaler=layer.scaler,
            norm1_weight=layer.norm1.weight,
            norm1_bias=layer.norm1.bias,
            down=layer.down.weight,
            norm2_weight=layer.norm2.weight,
            norm2_bias=layer.norm2.bias,
            gate=layer.gate,
            gate_noise=layer.gate_noise,
            fc1_weight=layer.fc1_weight,
            fc1_bias=layer.fc1_bias,
            fc2_weight=layer.fc2_weight,
            fc2_bias=layer.fc2_bias,
            up=layer.up.weight,
            top_k=layer.top_k,
            noise=noise,
            norm_eps=layer.norm1.eps,
        )


def share(model: ModuleType) -> ModuleType:
    """A copy of the modules of `model` around the same parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def with_plain_decoder(model: ModuleType) -> ModuleType:
    """`share` of `model` whose decoder resizes, concatenates and convolves by definition."""
    plain = share(model)
    set_plain(plain)
    return plain


class PlainReconstruction(MaskedReconstruction):
    """A masked autoencoder whose head is its modules one after another, as published."""

    def predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `MaskedReconstruction.predict`."""
        if self.family == "scalemae":
            x = tokens.transpose(1, 2).unflatten(2, self.grid)
            high, low = self.fpn.fpn1(x), self.fpn.fpn2(x)
            return _plain_head(self.fcn_high, high), _plain_head(self.fcn_low, low)
        prediction = self.decoder_pred(tokens)[:, 1:]
        image = unpatchify(prediction, self.patch_size, self.image_size)
        block = self.up_block
        x = block.up_conv(self.proj_up_norm(F.gelu(self.proj_up_conv(image))))
        x = F.leaky_relu(block.up_norm(x))
        x = x + 0.5 * block.res_block.conv2(F.relu(block.res_block.conv1(x)))
        return prediction, block.proj_out(block.res_norm(x))


def _plain_head(head: ConvHead, x: Tensor) -> Tensor:
    out: Tensor = head.pred(head.conv_blocks(head.proj(x)))
    return out


def with_plain_head(model: MaskedReconstruction) -> MaskedReconstruction:
    """`share` of `model` with the head of `PlainReconstruction`."""
    plain = share(model)
    plain.__class__ = PlainReconstruction
    return plain


def with_dispatch(model: ModuleType) -> ModuleType:
    """`share` of `model` with every adapted layer run expert by expert."""
    dispatched = share(model)
    for path, module in list(dispatched.named_modules()):
        if isinstance(module, AoMoALinear):
            dispatched.set_submodule(path, DispatchLinear(module))
    return dispatched


def use_running_statistics(head: UPerHead) -> None:
    """Take the batch norm of the map that is pooled to one value out of training.

    Of two images it has two values to average over, which makes them 1 and -1 whatever they are
    and their gradient the difference of nearly equal numbers: nothing could be compared. The map
    has one value a channel, so this saves no time.
    """
    for scale, pooled in zip(head.pool_scales, head.psp_modules, strict=True):
        if scale == 1:
            pooled.eval()


def on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every operator on its ``eager`` backend."""

    def run(*inputs: Tensor) -> Any:
        with use_backend("eager"):
            return function(*inputs)

    return run


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` of `function` on the reference operators; compiles when first called."""
    whole = torch.compile(function, fullgraph=True, dynamic=False, options=options or None)
    return on_reference(whole)
