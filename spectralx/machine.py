"""The machine a stage trains on: devices and processes, precision, compilation, recomputation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from spectralx.cli import InputError, one_line
from spectralx.run_settings import TrainerSettings

T = TypeVar("T")
# Lists of transformer blocks, as the backbones name them.
_BLOCK_LISTS = ("blocks", "decoder_blocks")


@dataclass(frozen=True)
class Processes:
    """The processes that train together; torchrun starts them and says which this one is.

    Attributes
    ----------
    rank : of this process, 0 for the one that writes.
    count : of all.
    here : on this machine.
    """

    rank: int = 0
    count: int = 1
    here: int = 1


def on_gpu(settings: TrainerSettings) -> bool:
    """Whether the settings mean a GPU on this machine."""
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise InputError("trainer.accelerator: found gpu, but no CUDA GPU; expected cpu or auto")
    return settings.accelerator != "cpu" and torch.cuda.is_available()


def join_processes(settings: TrainerSettings) -> Processes:
    """Meet the other processes that torchrun started; on its own without torchrun.

    Raises
    ------
    InputError : another number of devices is asked for than there are processes.
    """
    started = distributed.is_torchelastic_launched()
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if started else 1
    if settings.devices not in ("auto", here):
        raise InputError(
            f"trainer.devices: found {settings.devices}, but {here} process"
            f"{'' if here == 1 else 'es'} here; expected auto, or "
            f"torchrun --nproc-per-node {settings.devices} -m spectralx.train"
        )
    if not started:
        return Processes()
    if not distributed.is_initialized():
        gpu = on_gpu(settings)
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # One process tests while the others wait.
        distributed.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    return Processes(distributed.get_rank(), distributed.get_world_size(), here)


def check_machine(settings: TrainerSettings) -> None:
    """Refuse settings that this machine, or the others among them, do not allow.

    Raises
    ------
    InputError : names the setting.
    """
    gpu = on_gpu(settings)
    if settings.cuda_graphs and not gpu:
        raise InputError("trainer.cuda_graphs: found true on a CPU; expected false, or a CUDA GPU")
    if settings.cuda_graphs and settings.compile != "inductor":
        raise InputError(
            f"trainer.compile: found {settings.compile}; expected inductor with trainer.cuda_graphs"
        )
    if settings.compile is not None:
        known = torch.compiler.list_backends(exclude_tags=())
        if settings.compile not in known:
            raise InputError(
                f"trainer.compile: found {settings.compile}; expected null or one of "
                + ", ".join(known)
            )
    if settings.strategy == "fsdp2" and settings.precision == "16-mixed":
        raise InputError("trainer.precision: found 16-mixed; expected bf16-mixed with fsdp2")


def trainer_options(
    settings: TrainerSettings, group: Processes, *, unused: bool = False
) -> dict[str, Any]:
    """What the machine decides of a Lightning trainer.

    Parameters
    ----------
    settings, group : the machine.
    unused : some parameters that train get no gradient.
    """
    gpu = on_gpu(settings)
    options: dict[str, Any] = {
        "accelerator": "gpu" if gpu else "cpu",
        "devices": group.here,
        "num_nodes": group.count // group.here,
    }
    if settings.precision == "16-mixed":
        # Said outright: Lightning would take bfloat16 instead on a CPU.
        options["plugins"] = [MixedPrecision("16-mixed", "cuda" if gpu else "cpu")]
    else:
        options["precision"] = settings.precision
    if group.count > 1:
        options["strategy"] = _strategy(settings, group, unused)
    elif settings.strategy == "fsdp2":
        raise InputError("trainer.strategy: found fsdp2 with one process; expected ddp, or more")
    return options


def _strategy(settings: TrainerSettings, group: Processes, unused: bool) -> Strategy:
    if settings.strategy == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=group.count, tensor_parallel_size=1)
    # Running statistics are those of the first process; a validation hands them to the others.
    return DDPStrategy(
        gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=unused
    )


def checkpoint_blocks(model: nn.Module) -> int:
    """Have each transformer block computed again in the backward pass; returns their number.

    The random numbers a block draws are the same both times.
    """
    count = 0
    for name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and name.rpartition(".")[2] in _BLOCK_LISTS:
            for block in blocks:
                block.forward = _recomputed(block.forward)
                count += 1
    return count


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False)

    return wrapped


def prepare_model(model: nn.Module, settings: TrainerSettings) -> None:
    """Recomputation and compilation, in place; names of parameters stay."""
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)
    if settings.compile is not None:
        mode = "reduce-overhead" if settings.cuda_graphs else None
        model.compile(backend=settings.compile, mode=mode)


def shard(model: nn.Module, mesh: Any) -> None:
    """Spread the parameters of `model` over the processes of `mesh`, in place (FSDP2).

    Each transformer block is gathered when it runs, all else when the model does.

    Raises
    ------
    InputError : the model has a parameter that is a single number; FSDP2 takes none.
    """
    from torch.distributed.fsdp import fully_shard

    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise InputError(
                f"trainer.strategy: found fsdp2, which does not take {name}, a single number; "
                "expected ddp"
            )
    for name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and name.rpartition(".")[2] in _BLOCK_LISTS:
            for block in blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def meet(group: Processes) -> None:
    """Wait for the other processes."""
    if group.count > 1:
        distributed.barrier()


def share(group: Processes, make: Callable[[], T]) -> T:
    """What `make` returns in the first process, which alone calls it, in all; plain values alone.

    Raises
    ------
    ValueError, OSError : of `make`; an InputError of one line in the other processes.
    """
    if group.count == 1:
        return make()
    shared: list[Any] = [None, None]
    failed: Exception | None = None
    if group.rank == 0:
        try:
            shared[0] = make()
        except (ValueError, OSError) as error:
            failed, shared[1] = error, one_line(error)
    distributed.broadcast_object_list(shared, src=0)
    value, said = shared
    if failed is not None:
        raise failed
    if said is not None:
        raise InputError(said)
    found: T = value
    return found


def leave_processes() -> None:
    """Part in good order from the processes that `join_processes` met.

    One that leaves while another is still in their last collective would break it; and the first,
    which may hold the store they meet at, leaves last.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    rank, count = distributed.get_rank(), distributed.get_world_size()
    store = distributed.PrefixStore("leave", distributed.distributed_c10d._get_default_store())
    store.set(f"ready-{rank}", "")
    store.wait([f"ready-{other}" for other in range(count)])
    if rank == 0:
        store.wait([f"gone-{other}" for other in range(1, count)])
    else:
        store.set(f"gone-{rank}", "")
    distributed.destroy_process_group()
