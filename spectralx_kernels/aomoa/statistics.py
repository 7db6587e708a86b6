"""`RoutingStatistics`: importance and load of the experts, adding up over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from spectralx_kernels._checks import check_like, check_shape
from spectralx_kernels.aomoa import reference


class _AllReduce(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, group: object) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)  # type: ignore[arg-type]
        return total

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None  # type: ignore[attr-defined,no-any-return]


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """How much the experts of a layer were used by a number of tokens.

    ``RoutingStatistics.of(gates, load)`` makes them from what `aomoa` and
    ``AoMoALinear.forward_with_routing`` return; ``+`` (and ``sum``) adds those of micro-batches,
    steps or layers, `all_reduce` those of ranks. The balance loss of a sum is that of one batch of
    all its tokens, which the mean of the parts' losses is not.

    Attributes
    ----------
    importance : [A, E], sum of the gates over tokens; float32 (float64), differentiable.
    load : [A, E], same dtype: tokens an expert takes, in training their expected number (see
        `noisy_topk_gating`), differentiable.
    tokens : int64 scalar on the same device, tokens counted.

    Everything stays on the device; nothing here waits for it.
    """

    importance: Tensor
    load: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, gates: Tensor, load: Tensor) -> RoutingStatistics:
        """The statistics of one call: gates [A, T, E] and load [A, E].

        Raises
        ------
        TypeError, ValueError : dtypes, shapes or devices that do not belong together.
        """
        check_shape("gates", gates, ("attributes", "tokens", "experts"))
        check_shape("load", load, (gates.shape[0], gates.shape[2]))
        check_like("load", load, "gates", gates)
        tokens = torch.full((), gates.shape[1], dtype=torch.int64, device=gates.device)
        return cls(gates.sum(dim=1), load, tokens)

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """The statistics of both; of layers with the same attributes and experts."""
        if not isinstance(other, RoutingStatistics):
            return NotImplemented
        check_shape("importance", other.importance, tuple(self.importance.shape))
        return RoutingStatistics(
            self.importance + other.importance,
            self.load + other.load,
            self.tokens + other.tokens,
        )

    def __radd__(self, other: int) -> RoutingStatistics:
        """``sum(...)`` begins with 0."""
        return self if other == 0 else NotImplemented

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> RoutingStatistics:
        """The sum over the ranks of `group` (all by default); itself without torch.distributed.

        Differentiable. Where every rank adds the balance loss of this sum to its own loss and
        gradients are averaged over ranks, as DDP and FSDP do, its gradient is that of one process
        that sees all ranks' tokens. A collective: call it on every rank.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        both = _AllReduce.apply(torch.stack([self.importance, self.load]), group)
        tokens = self.tokens.clone()
        dist.all_reduce(tokens, group=group)
        return RoutingStatistics(both[0], both[1], tokens)

    def detach(self) -> RoutingStatistics:
        """Without autograd's graph, in float64: to be kept and added up over many steps."""
        return RoutingStatistics(
            self.importance.detach().double(), self.load.detach().double(), self.tokens
        )

    def balance_loss(self) -> Tensor:
        """cv²(importance) + cv²(load), summed over attributes: a scalar, differentiable.

        The same as `spectralx_kernels.balance_loss` of all the tokens.
        """
        # Importance takes the place of the gates of a single token: their sum over tokens.
        return reference.balance_loss(self.importance.unsqueeze(1), self.load)

    def share(self) -> Tensor:
        """[A, E], part of the tokens that an expert takes: `load` over `tokens`.

        k/E where use is even, 0 for an expert out of use, 1 for one that takes every token; in
        training an expectation, as `load` is. NaN where no token was counted.
        """
        return self.load / self.tokens
