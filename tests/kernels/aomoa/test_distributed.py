"""`AoMoALinear` and `RoutingStatistics` on two gloo processes against one that sees all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spectralx_kernels import AoMoALinear, RoutingStatistics
from tests.kernels.aomoa import ranks
from tests.kernels.aomoa.ranks import WithNoise, data, gradients, loss_of, model, sgd_step
from tests.kernels.aomoa.running import assert_close
from tests.kernels.aomoa.test_aomoa import layer
from tests.kernels.ladder import relative_error
from tests.tolerances import ROUND_OFF

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, in order."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.work, args=(str(folder),), nprocs=ranks.RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks.RANKS)]


@pytest.fixture(scope="module")
def alone() -> tuple[WithNoise, dict[str, Tensor]]:
    """One process: the model before its step, and its gradients."""
    made = WithNoise(model())
    loss_of(made(*data())).backward()
    return made, gradients(made)


def outputs(results: list[dict[str, Any]], key: str) -> Tensor:
    return torch.cat([found["fsdp"][key] for found in results])


def test_ddp_has_the_gradients_of_one_process(
    results: list[dict[str, Any]], alone: tuple[WithNoise, dict[str, Tensor]]
) -> None:
    for found in results:
        assert_close(found["ddp"]["grads"], alone[1])
    for name, grad in results[0]["ddp"]["grads"].items():
        assert torch.equal(results[1]["ddp"]["grads"][name], grad), name


def test_fsdp_has_the_gradients_and_names_of_one_process(
    results: list[dict[str, Any]], alone: tuple[WithNoise, dict[str, Tensor]]
) -> None:
    made, grads = alone
    for found in results:
        assert_close(found["fsdp"]["grads"], grads)
        assert found["fsdp"]["names"] == list(made.state_dict())
        assert found["fsdp"]["rows"] == 16  # of the frozen weight's 32: it is sharded too


def test_fsdp_steps_loads_and_sees_changed_shards(results: list[dict[str, Any]]) -> None:
    made = WithNoise(model())
    fresh = made(*data()).detach()
    loss_of(made(*data())).backward()
    sgd_step(made)
    bound = 10 * ROUND_OFF[torch.float32]
    assert relative_error(outputs(results, "out after a step"), made(*data()).detach()) <= bound
    state = results[0]["fsdp"]["state"]
    assert_close(state, made.state_dict())
    first = made.layers[0]
    assert isinstance(first, AoMoALinear)
    assert torch.equal(state["layers.0.linear.weight"], first.linear.weight)
    with torch.no_grad():
        first.linear.weight.mul_(2)
    expected = made(*data()).detach()
    assert relative_error(expected, fresh) > 1e-2
    assert relative_error(outputs(results, "out after a change"), expected) <= bound
    assert relative_error(outputs(results, "out after loading"), fresh) <= bound


def test_fsdp_in_mixed_precision(results: list[dict[str, Any]]) -> None:
    x, noise = data()
    made = layer(width=32, out=32)
    exact, gates, _ = made.forward_with_routing(x, noise[0])
    found = [result["fsdp_in_bfloat16"] for result in results]
    out = torch.cat([each["out"] for each in found])
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact.detach()) <= 4 * ROUND_OFF[torch.bfloat16]
    assert torch.cat([each["gates"] for each in found], dim=1).shape == gates.shape
    loss_of(exact).backward()
    expected = gradients(made)
    assert found[0]["grads"].keys() == expected.keys()
    assert {grad.dtype for grad in found[0]["grads"].values()} == {torch.float32}


def test_statistics_of_all_ranks(results: list[dict[str, Any]]) -> None:
    x, noise = data()
    made = layer(width=32, out=32)
    expected = RoutingStatistics.of(*made.forward_with_routing(x, noise[0])[1:])
    loss = expected.balance_loss()
    loss.backward()
    grads = gradients(made)
    assert grads["gate_noise"].any()
    for found in (result["statistics"] for result in results):
        assert found["tokens"] == ranks.TOKENS
        assert relative_error(found["loss"], loss.detach()) <= 10 * ROUND_OFF[torch.float32]
        assert relative_error(found["share"], expected.detach().share()) <= 1e-6
        assert_close(found["grads"], grads)
