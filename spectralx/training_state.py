"""Everything that decides how a run goes on, out of Lightning's hands and back into them.

Tensors are ``<part>/<name>``; what JSON holds goes beside them. All processes take part in
collecting and restoring, one of them writes (`spectralx.resume`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import get_rank, get_world_size, is_available, is_initialized
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from spectralx.cli import InputError


def processes() -> int:
    """Number of processes that train together."""
    return get_world_size() if is_available() and is_initialized() else 1


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself; where it is spread over processes, all of it (they must all ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(target: Tensor, source: Tensor) -> None:
    """Overwrite `target`, spread over processes or not, with the whole of `source`."""
    if isinstance(target, DTensor):
        source = source.to(target.device, target.dtype)
        source = distribute_tensor(source, target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(source)


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of `module`, whole on every process."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def _split(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Entries of the state dict that training changes, and frozen parameters."""
    frozen_names = {name for name, p in model.named_parameters() if not p.requires_grad}
    changing: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        (frozen if name in frozen_names else changing)[name] = tensor
    return changing, frozen


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"model/{name}": whole(tensor).detach().to("cpu", copy=True)
        for name, tensor in tensors.items()
    }


def collect_frozen(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training leaves as it is in `model`."""
    return _copies(_split(model)[1])


def collect_model(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that training changes in `model`."""
    return _copies(_split(model)[0])


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put back what was collected; raises InputError unless it is all of such a model."""
    own = model.state_dict()
    found = {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
    different = sorted(own.keys() ^ found) + sorted(
        name for name in own.keys() & found if own[name].shape != tensors[f"model/{name}"].shape
    )
    if different:
        raise InputError(
            f"{where}: found another model, by {len(different)} tensors ({different[0]}, ...); "
            "expected the one that is trained"
        )
    for name, tensor in own.items():
        copy_into(tensor, tensors[f"model/{name}"])


def collect_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State of each parameter by its number, and the groups without their parameters."""
    tensors = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{number}/{key}"] = whole(value).detach().to("cpu", copy=True)
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return tensors, groups


def restore_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Put back what `collect_optimizer` collected."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if not name.startswith("optimizer/"):
            continue
        _, number, key = name.split("/")
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape and tensor.dim() > 0:
            value = torch.zeros_like(parameter, requires_grad=False)
            copy_into(value, tensor)
        else:
            # Counters of steps stay where AdamW made them: on the CPU unless it runs captured.
            value = tensor.clone()
        optimizer.state[parameter][key] = value
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})


def _own_randomness() -> dict[str, Tensor]:
    python = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    _, keys, position, has_gauss, gauss = numpy
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python[1], dtype=torch.int64),
        # NaN: no normal draw is left over from a pair.
        "python_gauss": torch.tensor(
            float("nan") if python[2] is None else python[2], dtype=torch.float64
        ),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_place": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def collect_randomness(device: torch.device) -> dict[str, Tensor]:
    """States of the random generators of every process, gathered over `device`."""
    own, count = _own_randomness(), processes()
    if count == 1:
        return {f"random/0/{name}": state for name, state in own.items()}
    tensors: dict[str, Tensor] = {}
    for name, state in own.items():
        here = state.to(device)
        found = [torch.empty_like(here) for _ in range(count)]
        torch.distributed.all_gather(found, here)
        tensors |= {f"random/{rank}/{name}": each.cpu() for rank, each in enumerate(found)}
    return tensors


def restore_randomness(tensors: Mapping[str, Tensor]) -> None:
    """Put back the states of this process."""
    rank = get_rank() if processes() > 1 else 0
    own = {
        name.removeprefix(f"random/{rank}/"): state
        for name, state in tensors.items()
        if name.startswith(f"random/{rank}/")
    }
    torch.set_rng_state(own["torch"])
    gauss = float(own["python_gauss"])
    random.setstate((3, tuple(own["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss = own["numpy_place"].tolist()
    keys = own["numpy"].numpy().astype(np.uint32)
    left = float(own["numpy_gauss"])
    np.random.set_state(("MT19937", keys, position, has_gauss, left))  # noqa: NPY002
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])


def collect_schedule(trainer: pl.Trainer) -> dict[str, Any]:
    """Learning-rate schedule and loss scaler, as JSON holds them."""
    return {
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
    }


def restore_schedule(trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
    """Put back what `collect_schedule` collected."""
    for config, state in zip(trainer.lr_scheduler_configs, values["schedules"], strict=True):
        config.scheduler.load_state_dict(state)
    trainer.precision_plugin.load_state_dict(values["precision"])


def place_trainer(trainer: pl.Trainer, step: int) -> None:
    """Tell Lightning's counters, before `fit`, that `step` optimiser steps are done.

    What it then runs is a shorter training: the loader begins where the run left off.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.automatic_optimization.optim_progress.optimizer.step.total.ready = step
    loop._batches_that_stepped = step
    batches = step * trainer.accumulate_grad_batches
    total: Any = loop.batch_progress.total
    total.ready = total.started = total.processed = total.completed = batches
