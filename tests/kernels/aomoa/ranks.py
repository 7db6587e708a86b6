"""What one of two gloo processes computes for `test_distributed`: DDP, FSDP2, statistics.

Every rank makes the same layer, takes its own half of the tokens and saves its results to
``<folder>/<rank>.pt``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spectralx_kernels import AoMoALinear, RoutingStatistics
from tests.kernels.aomoa.test_aomoa import layer

RANKS = 2
TOKENS = 12
FULL = StateDictOptions(full_state_dict=True)


def model() -> nn.Sequential:
    """Two adapted layers whose weights have the same shapes."""
    return nn.Sequential(layer(width=32, out=32), nn.GELU(), layer(width=32, out=32, experts=3))


def data() -> tuple[Tensor, list[Tensor]]:
    """x [tokens, 32] and each layer's gate noise."""
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(2, TOKENS, experts, generator=generator) for experts in (4, 3)]
    return torch.randn(TOKENS, 32, generator=generator), noise


class WithNoise(nn.Module):
    """The layers one after the other, each with its noise."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, noise: list[Tensor]) -> Tensor:
        given = iter(noise)
        for module in self.layers:
            x = module(x, next(given)) if isinstance(module, AoMoALinear) else module(x)
        return x


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): whole(parameter.grad).clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def sgd_step(module: nn.Module) -> None:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()


def ddp(x: Tensor, noise: list[Tensor]) -> dict[str, Any]:
    wrapped = DistributedDataParallel(WithNoise(model()))
    loss_of(wrapped(x, noise)).backward()
    return {"grads": gradients(wrapped)}


def fsdp(x: Tensor, noise: list[Tensor]) -> dict[str, Any]:
    made = WithNoise(model())
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in made.layers:
        if isinstance(module, AoMoALinear):
            fully_shard(module, mesh=mesh)
    fully_shard(made, mesh=mesh)
    first = made.layers[0]
    assert isinstance(first, AoMoALinear)
    weight = first.linear.weight
    assert isinstance(weight, DTensor)
    found: dict[str, Any] = {"rows": weight.to_local().shape[0]}
    for _ in range(2):  # gathered again in the second round, from other memory or the same
        made.zero_grad()
        loss_of(made(x, noise)).backward()
    found["grads"] = gradients(made)
    sgd_step(made)
    found["out after a step"] = made(x, noise).detach()
    found["names"] = list(made.state_dict())
    found["state"] = get_model_state_dict(made, options=FULL)  # on rank 0 only
    # A frozen weight changed in its shards, and one loaded into them, are gathered as they are now.
    with torch.no_grad():
        weight.to_local().mul_(2)
    found["out after a change"] = made(x, noise).detach()
    set_model_state_dict(made, WithNoise(model()).state_dict(), options=FULL)
    found["out after loading"] = made(x, noise).detach()
    return found


def fsdp_in_bfloat16(x: Tensor, noise: list[Tensor]) -> dict[str, Any]:
    made = layer(width=32, out=32)
    fully_shard(made, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    register_fsdp_forward_method(made, "forward_with_routing")
    out, gates, _ = made.forward_with_routing(x.bfloat16(), noise[0])
    loss_of(out.float()).backward()
    return {"out": out.detach(), "gates": gates.detach(), "grads": gradients(made)}


def statistics(x: Tensor, noise: list[Tensor]) -> dict[str, Any]:
    made = layer(width=32, out=32)
    _, gates, load = made.forward_with_routing(x, noise[0])
    total = RoutingStatistics.of(gates, load).all_reduce()
    loss = total.balance_loss()
    loss.backward()
    grads = gradients(made)
    for grad in grads.values():  # as DDP does
        dist.all_reduce(grad)
        grad /= RANKS
    found = {"loss": loss.detach(), "tokens": total.tokens, "share": total.detach().share()}
    return {**found, "grads": grads}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        x, noise = data()
        own = slice(rank * TOKENS // RANKS, (rank + 1) * TOKENS // RANKS)
        inputs = x[own], [each[:, own] for each in noise]
        found = {part.__name__: part(*inputs) for part in (ddp, fsdp, fsdp_in_bfloat16, statistics)}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
