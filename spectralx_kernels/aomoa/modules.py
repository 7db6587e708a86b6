"""`AoMoALinear`: a mixture of adapters around any ``nn.Linear``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectralx_kernels._checks import check_range
from spectralx_kernels._official_names import OfficialNames
from spectralx_kernels.aomoa.ops import aomoa
from spectralx_kernels.aomoa.reference import accumulation_dtype


class AoMoALinear(OfficialNames):
    """A frozen linear layer with an attribute-oriented mixture of adapters beside it.

    ``AoMoALinear(linear)`` takes the place of ``linear``: [..., in] -> [..., out].

    Parameters
    ----------
    linear : the layer to adapt; it is kept as ``.linear`` and its parameters are frozen. Its weight
        and bias are read, it is not called; a buffer ``bias_mask`` of it (DINOv3's fused
        query-key-value projection) multiplies the bias.
    attributes : equal parts of the input's channels that are routed on their own (2: spatial and
        spectral). It divides in_features and out_features. 1 is a plain mixture of adapters.
    experts : number of experts E. 1 is a single adapter.
    top_k : experts a token takes.
    rank : width r between `down` and `up`; in_features / attributes // 4 by default.
    hidden : width h inside an expert; in_features / attributes // 32 by default.
    parts : layers that stand side by side in `linear`, 3 in a fused query-key-value projection. The
        output channels of each part are divided into attributes on their own, and all parts share
        norms, `down`, gates and experts.

    In training each call draws gate noise with `draw_noise`, unless `noise` is given. Activation
    checkpointing draws the same again as long as it preserves the random state, as it does by
    default.

    There is no method that merges the adapter into the frozen weight, and none can be: gates depend
    on the token, and experts pass a ReLU and a logarithm of a sum of exponentials, so the adapter
    is not linear in x and no [out, in] weight stands for it.

    A call through `forward_with_routing` passes by the hooks of FSDP; after ``fully_shard(layer)``
    register it: ``register_fsdp_forward_method(layer, "forward_with_routing")``.

    Raises
    ------
    ValueError : attributes (times parts) do not divide the widths; top_k, rank or hidden out of
        range.

    Source: SpectralX (arXiv 2508.01731), attribute-oriented mixture of adapters; the published one
    sits on layers of one part.
    """

    official_names: ClassVar[dict[str, str]] = {
        "down.weight": "blocks_MoA.dimReduction.weight",
        "up.weight": "blocks_MoA.dimIncrease.weight",
        "norm1.weight": "blocks_MoA.norm1.weight",
        "norm1.bias": "blocks_MoA.norm1.bias",
        "norm2.weight": "blocks_MoA.norm2.weight",
        "norm2.bias": "blocks_MoA.norm2.bias",
        "gate": "blocks_MoA.MoA.w_gate",
        "gate_noise": "blocks_MoA.MoA.w_noise",
        "fc1_weight": "blocks_MoA.MoA.experts.{}.fc1.weight",
        "fc1_bias": "blocks_MoA.MoA.experts.{}.fc1.bias",
        "fc2_weight": "blocks_MoA.MoA.experts.{}.fc2.weight",
        "fc2_bias": "blocks_MoA.MoA.experts.{}.fc2.bias",
    }

    def __init__(
        self,
        linear: nn.Linear,
        *,
        attributes: int = 2,
        experts: int = 4,
        top_k: int = 2,
        rank: int | None = None,
        hidden: int | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        if attributes < 1 or linear.in_features % attributes or linear.out_features % attributes:
            raise ValueError(
                f"attributes: got {attributes}, expected a divisor of in_features "
                f"{linear.in_features} and out_features {linear.out_features}"
            )
        if parts < 1 or linear.out_features % (attributes * parts):
            raise ValueError(
                f"parts: got {parts}, expected a divisor of out_features {linear.out_features} / "
                f"attributes {attributes}"
            )
        d = linear.in_features // attributes
        rank = max(d // 4, 1) if rank is None else rank
        hidden = max(d // 32, 1) if hidden is None else hidden
        check_range("experts", experts, 1, 2**16)
        check_range("top_k", top_k, 1, experts)
        check_range("rank", rank, 1, 2**16)
        check_range("hidden", hidden, 1, 2**16)
        self.attributes = attributes
        self.experts = experts
        self.top_k = top_k
        self.parts = parts
        self.linear = linear.requires_grad_(False)

        factory: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.scaler = nn.Parameter(torch.empty(linear.out_features, **factory))
        self.norm1 = nn.LayerNorm(d, **factory)
        self.down = nn.Linear(d, rank, bias=False, **factory)
        self.norm2 = nn.LayerNorm(rank, **factory)
        self.gate = nn.Parameter(torch.empty(attributes, rank, experts, **factory))
        self.gate_noise = nn.Parameter(torch.empty(attributes, rank, experts, **factory))
        self.fc1_weight = nn.Parameter(torch.empty(experts, hidden, rank, **factory))
        self.fc1_bias = nn.Parameter(torch.empty(experts, hidden, **factory))
        self.fc2_weight = nn.Parameter(torch.empty(experts, rank, hidden, **factory))
        self.fc2_bias = nn.Parameter(torch.empty(experts, rank, **factory))
        self.up = nn.Linear(rank, linear.out_features // attributes, bias=False, **factory)
        self.reset_parameters()

    # Models that look at the layer they call (its dtype, its width) find the frozen one.
    @property
    def weight(self) -> Tensor:
        """[out, in], of the frozen layer."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """[out] or None, of the frozen layer."""
        return self.linear.bias

    @property
    def acting_bias(self) -> Tensor | None:
        """[out] or None: what the frozen layer adds, its bias times its ``bias_mask`` if any."""
        bias, mask = self.linear.bias, getattr(self.linear, "bias_mask", None)
        return bias if bias is None or mask is None else bias * mask.to(bias.dtype)

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def reset_parameters(self) -> None:
        """Start values of the adapter; the frozen layer is left alone."""
        nn.init.ones_(self.scaler)
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.up.weight)
        nn.init.zeros_(self.gate)
        nn.init.zeros_(self.gate_noise)
        # As nn.Linear starts: uniform within 1 / sqrt(fan-in), weight and bias.
        for tensors in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = tensors[0].shape[-1] ** -0.5
            for tensor in tensors:
                nn.init.uniform_(tensor, -bound, bound)

    def draw_noise(self, tokens: int, like: Tensor) -> Tensor:
        """Standard normal gate noise [attributes, tokens, experts] on the device of `like`."""
        return torch.randn(
            self.attributes,
            tokens,
            self.experts,
            device=like.device,
            dtype=accumulation_dtype(like.dtype),
        )

    def forward_with_routing(
        self, x: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [..., out], gates [A, T, E] and load [A, E]; see `spectralx_kernels.aomoa`.

        `RoutingStatistics.of` makes importance, shares and the balance loss of the latter two.
        """
        if self.training and noise is None:
            noise = self.draw_noise(x.numel() // x.shape[-1], x)
        weight: Tensor = self.linear.weight
        scaler: Tensor = self.scaler
        bias: Tensor | None = self.acting_bias
        if self.parts > 1:
            weight, scaler = self._by_attribute(weight), self._by_attribute(scaler)
            bias = None if bias is None else self._by_attribute(bias)
        out, gates, load = aomoa(
            x,
            weight,
            bias,
            scaler=scaler,
            norm1_weight=self.norm1.weight,
            norm1_bias=self.norm1.bias,
            down=self.down.weight,
            norm2_weight=self.norm2.weight,
            norm2_bias=self.norm2.bias,
            gate=self.gate,
            gate_noise=self.gate_noise,
            fc1_weight=self.fc1_weight,
            fc1_bias=self.fc1_bias,
            fc2_weight=self.fc2_weight,
            fc2_bias=self.fc2_bias,
            up=self.up.weight,
            top_k=self.top_k,
            noise=noise,
            norm_eps=self.norm1.eps,
        )
        if self.parts > 1:  # [..., A, parts, c] -> [..., parts, A, c]
            out = out.unflatten(-1, (self.attributes, self.parts, -1)).transpose(-3, -2).flatten(-3)
        return out, gates, load

    def _by_attribute(self, rows: Tensor) -> Tensor:
        """Rows [parts · A · c, ...] in the operator's order, attribute by attribute."""
        parts: Tensor = rows.unflatten(0, (self.parts, self.attributes, -1))
        return parts.transpose(0, 1).flatten(0, 2)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]. `noise` [A, T, E] replaces the draw (T = leading dimensions)."""
        return self.forward_with_routing(x, noise)[0]

    def extra_repr(self) -> str:
        parts = f", parts={self.parts}" if self.parts > 1 else ""
        return (
            f"attributes={self.attributes}, experts={self.experts}, top_k={self.top_k}, "
            f"rank={self.down.out_features}, hidden={self.fc1_weight.shape[1]}{parts}"
        )
