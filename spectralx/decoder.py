"""UPerNet: a multi-level neck and the pyramid-pooling head, with mmsegmentation's parameter names.

Source: SpectralX, stage 2; the head is "Unified Perceptual Parsing for Scene Understanding"
(Xiao et al., ECCV 2018) as mmsegmentation 1.2 lays it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels import concat_conv2d, fold_batch_norm, upsample_conv2d
from spectralx_kernels.kept import Kept

NECK_SCALES = (4.0, 2.0, 1.0, 0.5)
POOL_SCALES = (1, 2, 3, 6)
BATCH_NORM_EPS = 1e-6


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _scaled(rows: int, columns: int, scale: float) -> tuple[int, int]:
    return max(int(rows * scale), 1), max(int(columns * scale), 1)


class Unformed(NamedTuple):
    """A map of the neck before its 3x3 convolution: [B, C, h, w] that is to get the size `size`."""

    x: Tensor
    conv: ConvUnit
    size: tuple[int, int]

    def formed(self) -> Tensor:
        """[B, out, *size]"""
        made: Tensor = self.conv(self.x, size=self.size)
        return made


class ConvUnit(nn.Module):
    """``conv``, and with `norm` also ``bn`` and a ReLU; "same" padding, bias only without norm.

    Parameters
    ----------
    in_channels, out_channels, kernel_size : of the convolution; `kernel_size` is odd.
    norm : batch norm and ReLU after the convolution.

    Attributes
    ----------
    plain : resize, concatenate, convolve; see `set_plain`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, norm: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS) if norm else None
        self.plain = False
        self._kept = Kept()
        if norm:
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(self.conv.weight)
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)

    def forward(self, *maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The unit of `maps`, resized to `size` and concatenated along the channels.

        Parameters
        ----------
        maps : each [B, C_i, H_i, W_i]; the C_i add up to `in_channels`.
        size : rows and columns of the output; those of the first map by default.

        Returns
        -------
        [B, out_channels, *size]
        """
        size = size or (maps[0].shape[-2], maps[0].shape[-1])
        if self.plain:
            x = self.conv(torch.cat([_resize(each, size) for each in maps], dim=1))
            return x if self.bn is None else F.relu(self.bn(x))
        weight, bias = self.conv.weight, self.conv.bias
        if self.bn is None:
            return concat_conv2d(maps, weight, bias, size=size)
        if type(self.bn) is not nn.BatchNorm2d:  # one that averages over processes, say
            return F.relu(self.bn(concat_conv2d(maps, weight, bias, size=size)), inplace=True)
        return concat_conv2d(maps, weight, bias, size=size, norm=self.bn, relu=True)

    def of_unformed(self, level: Unformed) -> Tensor:
        """The unit, a 1x1 convolution, of a map that need not be formed.

        Two convolutions with nothing between them are one, whose weight is the product of theirs.
        It is taken where it saves more than it costs; in evaluation without gradients it is kept,
        with the batch norm in it, until a weight changes.
        """
        if type(self.bn) is not nn.BatchNorm2d or level.conv.bn is not None:
            return self(level.formed())  # type: ignore[no-any-return]
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            weight, bias = self._kept_product(level.conv, self.bn)
            kept: Tensor = upsample_conv2d(level.x, weight, bias, size=level.size, relu=True)
            return kept
        # An exported program serves any batch, and whether the product pays depends on it.
        if torch.compiler.is_exporting() or not _product_pays(level, self.conv.weight):
            return self(level.formed())  # type: ignore[no-any-return]
        weight, bias = _product(self.conv.weight, level.conv)
        return upsample_conv2d(level.x, weight, bias, size=level.size, norm=self.bn, relu=True)

    def _kept_product(self, inner: ConvUnit, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Weight and bias of this unit's convolution and batch norm after `inner`'s convolution."""
        mean, variance, inner_bias = bn.running_mean, bn.running_var, inner.conv.bias
        assert mean is not None
        assert variance is not None
        assert inner_bias is not None
        outer = self.conv.weight

        def make() -> tuple[Tensor, Tensor]:
            # Scaled before the product: one rounding of the large weight. In the weights' own type,
            # as a call outside autocast may use what one inside it made.
            with torch.autocast(outer.device.type, enabled=False):
                scaled, shift = fold_batch_norm(outer, None, bn)
                weight, bias = _product(scaled, inner)
                return weight, bias + shift

        used = (outer, inner.conv.weight, inner_bias, bn.weight, bn.bias, mean, variance)
        weight, bias = self._kept.of(used, make)
        return weight, bias

    def train(self, mode: bool = True) -> ConvUnit:
        """As of ``nn.Module``; forgets the kept product."""
        self._kept.forget()
        return super().train(mode)


def _product(outer: Tensor, inner: ConvUnit) -> tuple[Tensor, Tensor]:
    """Weight and bias of the 1x1 convolution with weight `outer` after that of `inner`."""
    matrix = outer.flatten(1)  # [O, N]
    weight = inner.conv.weight  # [N, C, ky, kx]
    assert inner.conv.bias is not None
    product = torch.mm(matrix, weight.flatten(1)).reshape(-1, *weight.shape[1:])
    return product, torch.mv(matrix, inner.conv.bias.to(matrix.dtype))


def _product_pays(level: Unformed, outer: Tensor) -> bool:
    """Whether the product of the weights takes fewer multiplications than it saves."""
    out, middle = outer.shape[:2]
    width = level.conv.conv.weight[0].numel()  # C * ky * kx
    small, large = level.x.shape[-2] * level.x.shape[-1], level.size[0] * level.size[1]
    small = min(small, large)  # a smaller map is formed before it is convolved
    batch = level.x.shape[0]
    apart = batch * (small * width * middle + large * middle * out)
    return out * middle * width + batch * small * width * out <= apart


class MultiLevelNeck(nn.Module):
    """Feature maps of one size made into a pyramid: 1x1, bilinear resize, 3x3.

    Parameters
    ----------
    in_channels : width of each input map.
    out_channels : width of every output map.
    scales : size of each output map over that of the input map.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, scales: Sequence[float] = NECK_SCALES
    ) -> None:
        super().__init__()
        descending = all(a >= b for a, b in pairwise(scales))
        if len(scales) != len(in_channels) or min(scales) <= 0 or not descending:
            raise ValueError(
                f"scales: got {tuple(scales)}, expected {len(in_channels)} positive numbers, "
                "one for each feature map, the largest first"
            )
        self.scales = tuple(scales)
        self.plain = False
        self.lateral_convs = nn.ModuleList(
            ConvUnit(width, out_channels, 1, norm=False) for width in in_channels
        )
        self.convs = nn.ModuleList(
            ConvUnit(out_channels, out_channels, 3, norm=False) for _ in in_channels
        )

    def finest_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the pyramid's finest map, of feature maps of `rows` x `columns`."""
        return _scaled(rows, columns, self.scales[0])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C_i, H, W] to maps [B, out_channels, H·scale_i, W·scale_i], at least 1x1."""
        return [level.formed() for level in self.unformed(features)]

    def unformed(self, features: Sequence[Tensor]) -> list[Unformed]:
        """The maps of `forward` before their last convolution, for a head that takes these."""
        levels = []
        for x, scale, lateral, conv in zip(
            features, self.scales, self.lateral_convs, self.convs, strict=True
        ):
            size = _scaled(x.shape[-2], x.shape[-1], scale)
            if not self.plain:  # channels last from here on: what every kernel behind wants
                x = x.contiguous(memory_format=torch.channels_last)
            assert isinstance(conv, ConvUnit)
            levels.append(Unformed(lateral(x), conv, size))
        return levels


def decode(neck: MultiLevelNeck, head: UPerHead, features: Sequence[Tensor]) -> Tensor:
    """Logits of the feature maps: `head` of `neck`, whose maps are not formed without need."""
    pyramid: Sequence[Tensor | Unformed] = neck(features) if neck.plain else neck.unformed(features)
    logits: Tensor = head(pyramid)
    return logits


def set_plain(model: nn.Module, plain: bool = True) -> None:
    """Make every decoder in `model` form each map by its definition, or stop that.

    Same parameters, same numbers up to round-off, several times the work: for comparison.
    """
    for module in model.modules():
        if isinstance(module, ConvUnit | MultiLevelNeck):
            module.plain = plain


def _lateral(unit: nn.Module, x: Tensor | Unformed) -> Tensor:
    if isinstance(x, Unformed):
        assert isinstance(unit, ConvUnit)
        return unit.of_unformed(x)
    made: Tensor = unit(x)
    return made


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path, one fused map, classes.

    Parameters
    ----------
    in_channels : width of each map of the pyramid, finest first.
    channels : width inside the head.
    num_classes : number of classes, the unlabelled one included.
    pool_scales : sides of the pooled maps.
    dropout : probability of dropping a whole channel before the classes.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        *,
        pool_scales: Sequence[int] = POOL_SCALES,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pool_scales = tuple(pool_scales)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvUnit(coarsest, channels, 1))
            for scale in self.pool_scales
        )
        self.bottleneck = ConvUnit(coarsest + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvUnit(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvUnit(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvUnit(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, pyramid: Sequence[Tensor | Unformed]) -> Tensor:
        """Maps [B, C_i, H_i, W_i], finest first, to logits [B, classes, H_0, W_0].

        The neck's maps may come unformed (`MultiLevelNeck.unformed`).

        Raises
        ------
        ValueError : a batch of one image in training, which has no batch statistics where the
            coarsest map is pooled to one value.
        """
        *finer, last = pyramid
        coarsest = last.formed() if isinstance(last, Unformed) else last
        if self.training and coarsest.shape[0] == 1 and 1 in self.pool_scales:
            raise ValueError(
                "images: got a batch of 1 in training, expected at least 2: "
                "batch norm has nothing to average over in the head's 1x1 pooled map"
            )
        pooled = [module(coarsest) for module in self.psp_modules]
        top = self.bottleneck(coarsest, *pooled)
        laterals = [
            _lateral(conv, x) for conv, x in zip(self.lateral_convs, finer, strict=True)
        ] + [top]
        for level in range(len(finer), 0, -1):
            below = laterals[level - 1]
            size = (below.shape[-2], below.shape[-1])
            laterals[level - 1] = below + _resize(laterals[level], size)
        fused = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        x = self.fpn_bottleneck(*fused, laterals[-1])
        logits: Tensor = self.conv_seg(self.dropout(x))
        return logits


class UPerNet(nn.Module):
    """Logits from the feature maps of a plain (single-scale) backbone: ``neck``, then ``head``.

    Parameters
    ----------
    in_channels : width of each feature map, shallowest block first.
    num_classes : number of classes, the unlabelled one included.
    neck_channels : width of the pyramid; that of the last feature map by default.
    head_channels : width inside the head.
    scales : size of each map of the pyramid over that of the feature maps; the largest, first.
    pool_scales : sides of the maps that the head pools the coarsest map to.
    dropout : probability of dropping a whole channel before the classes.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        neck_channels: int | None = None,
        head_channels: int = 512,
        scales: Sequence[float] = NECK_SCALES,
        pool_scales: Sequence[int] = POOL_SCALES,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        neck_channels = neck_channels or in_channels[-1]
        self.neck = MultiLevelNeck(in_channels, neck_channels, scales)
        self.head = UPerHead(
            [neck_channels] * len(in_channels),
            head_channels,
            num_classes,
            pool_scales=pool_scales,
            dropout=dropout,
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps [B, C_i, H, W] to logits [B, classes, H·scales[0], W·scales[0]]."""
        return decode(self.neck, self.head, features)
