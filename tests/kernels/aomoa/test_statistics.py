"""RoutingStatistics: sums over batches are those of one batch, and collapse is seen."""

from __future__ import annotations

import pytest
import torch

from spectralx_kernels import RoutingStatistics, balance_loss
from tests.kernels.aomoa.test_aomoa import layer
from tests.kernels.ladder import relative_error
from tests.tolerances import ROUND_OFF


def test_micro_batches_add_up_to_the_batch() -> None:
    made, x, noise = layer(), torch.randn(24, 64), torch.randn(2, 24, 4)
    losses, grads = [], []
    for parts in ([slice(0, 24)], [slice(0, 7), slice(7, 8), slice(8, 8), slice(8, 24)]):
        found = [made.forward_with_routing(x[part], noise[:, part])[1:] for part in parts]
        total = sum(RoutingStatistics.of(*routing) for routing in found)
        assert isinstance(total, RoutingStatistics)
        assert total.tokens == 24
        losses.append(total.balance_loss())
        grads.append(torch.autograd.grad(losses[-1], [made.gate, made.gate_noise]))
    assert relative_error(losses[1].detach(), losses[0].detach()) <= ROUND_OFF[torch.float32]
    for whole, added in zip(*grads, strict=True):
        assert whole.any()
        assert relative_error(added, whole) <= 10 * ROUND_OFF[torch.float32]
    one_by_one = [
        RoutingStatistics.of(*routing).balance_loss() for routing in found if routing[0].numel()
    ]
    assert relative_error(sum(one_by_one).detach() / 3, losses[0].detach()) > 0.1  # type: ignore[union-attr]


def test_balance_loss_is_that_of_the_operator() -> None:
    _, gates, load = layer().forward_with_routing(torch.randn(20, 64))
    assert torch.equal(RoutingStatistics.of(gates, load).balance_loss(), balance_loss(gates, load))
    _, gates, load = layer(experts=1, top_k=1).forward_with_routing(torch.randn(20, 64))
    assert RoutingStatistics.of(gates, load).balance_loss() == 0


def test_collapse_shows_in_the_shares() -> None:
    made, x = layer(attributes=1, rank=16).eval(), torch.randn(30, 64)
    even = RoutingStatistics.of(*made.forward_with_routing(x)[1:])
    torch.testing.assert_close(even.share().sum(-1), torch.tensor([2.0]), rtol=0.05, atol=0)
    with torch.no_grad():
        made.norm2.weight.zero_()
        made.norm2.bias.fill_(1)
        made.gate.zero_()
        made.gate[..., 2] = 1  # one expert's logit is 16, the others' 0: their gates are cut to 0
    collapsed = RoutingStatistics.of(*made.forward_with_routing(x)[1:])
    assert torch.equal(collapsed.share(), torch.tensor([[0.0, 0, 1, 0]]))
    assert collapsed.balance_loss().item() == pytest.approx(
        8.0
    )  # cv² is 4 for each of the two terms
    assert even.balance_loss() < collapsed.balance_loss()


def test_kept_statistics_hold_no_graph_and_count_exactly() -> None:
    gates = torch.ones(1, 1, 1, requires_grad=True)
    kept = RoutingStatistics.of(gates, torch.full((1, 1), 2.0**25)).detach()
    kept = kept + RoutingStatistics.of(gates, torch.ones(1, 1)).detach()
    assert not kept.importance.requires_grad
    assert kept.load.item() == 2**25 + 1  # float32 would have lost the 1
    assert kept.tokens.item() == 2


def test_goes_through_a_compiled_loss() -> None:
    torch._dynamo.reset()
    made, x, noise = layer(), torch.randn(6, 64), torch.randn(2, 6, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        out, *routing = made.forward_with_routing(x, noise)
        statistics = RoutingStatistics.of(*routing)
        return out.square().mean() + (statistics + statistics).all_reduce().balance_loss()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x).detach(), loss(x).detach()) <= 10 * ROUND_OFF[torch.float32]


def test_bad_arguments_are_named() -> None:
    gates, load = torch.zeros(2, 5, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"gates: got shape \[5, 4\]"):
        RoutingStatistics.of(gates[0], load)
    with pytest.raises(ValueError, match=r"load: got shape \[4\], expected \[2, 4\]"):
        RoutingStatistics.of(gates, load[0])
    with pytest.raises(TypeError, match=r"load: got dtype torch.float64"):
        RoutingStatistics.of(gates, load.double())
    other = RoutingStatistics.of(gates[:1], load[:1])
    with pytest.raises(ValueError, match=r"importance: got shape \[1, 4\], expected \[2, 4\]"):
        RoutingStatistics.of(gates, load) + other
