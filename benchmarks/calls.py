"""The calls of the library's operators that a training step makes, and a `Case` of each.

A step runs on a model of the step's widths that is a few blocks deep: every operator is called with
the sizes, dtypes and values it has in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from benchmarks.case import Case, Draw, Setting, as_tuple
from benchmarks.harness import Build
from benchmarks.shapes import FORWARD, TRAINING, StepShape
from benchmarks.stages import STAGES, is_narrow
from spectralx_kernels._operator import Operator

DEPTH = 4  # blocks of the model whose step is recorded: stage 2 takes four maps


def _copy(tensor: Tensor, wanted: bool) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(wanted and copy.is_floating_point())


@dataclass(frozen=True, eq=False)
class Call:
    """A call of an operator, with its arguments as the operator's kernels get them."""

    operator: Operator
    values: tuple[Any, ...]
    spec: TreeSpec

    @staticmethod
    def of(operator: Operator, args: Sequence[Any]) -> Call:
        """A copy of the arguments; leaves where they require a gradient."""
        differentiable = hasattr(operator, "backward_op")
        values, spec = tree_flatten(list(args))
        kept = [
            _copy(value, value.requires_grad and differentiable)
            if isinstance(value, Tensor)
            else value
            for value in values
        ]
        return Call(operator, tuple(kept), spec)

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self.values if isinstance(value, Tensor)]

    @property
    def key(self) -> tuple[Any, ...]:
        """What calls that take the same time share: operator, sizes, layouts, options."""
        described = tuple(
            (tuple(value.shape), value.stride(), value.dtype, value.requires_grad)
            if isinstance(value, Tensor)
            else repr(value)
            for value in self.values
        )
        return (self.operator.name, described)

    @property
    def name(self) -> str:
        """The operator and the sizes of its first tensors with numbers, largest first two."""
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        sized = sorted(shapes, key=lambda shape: -torch.Size(shape).numel())[:2]
        return " ".join([self.operator.name, *("x".join(map(str, shape)) for shape in sized)])

    @property
    def modes(self) -> tuple[str, ...]:
        """Passes that the step makes of it."""
        trains = any(tensor.requires_grad for tensor in self.tensors)
        return (FORWARD, TRAINING) if trains else (FORWARD,)

    def default(self) -> str:
        """The backend that runs where none is asked for."""
        args = tree_unflatten(list(self.values), self.spec)
        first = self.tensors[0]
        dtype = next((each.dtype for each in self.tensors if each.is_floating_point()), None)
        return self.operator.backend_of(args, first.device.type, dtype)

    def function(self, backend: str) -> Callable[..., Any]:
        """A function of the call's tensors; the reference itself for "eager"."""
        operator, values, spec = self.operator, self.values, self.spec

        def run(*tensors: Tensor) -> Any:
            given = iter(tensors)
            filled = [next(given) if isinstance(value, Tensor) else value for value in values]
            args = tree_unflatten(filled, spec)
            if backend == "eager":
                return operator.reference(*args)
            return operator(*args, backend=backend)

        return run

    def case(self, backends: Sequence[str]) -> Build:
        """A builder of `Case`s with these backends as implementations."""

        def build(_shape: Any, mode: str, setting: Setting) -> Case:
            tensors = []
            for tensor in self.tensors:
                wanted = tensor.requires_grad and mode != FORWARD
                given = tensor.detach()
                if setting.dtype == torch.float64 and given.is_floating_point():
                    given = given.double()
                tensors.append(_copy(given, wanted))
            if mode != FORWARD:
                _only_used(self.function("eager"), tensors)
            return Case(
                functions={name: self.function(name) for name in {"eager", *backends}},
                inputs=[tuple(tensors)],
            )

        return build

    def nbytes(self, mode: str) -> int:
        """Bytes of arguments and outputs, each read or written once; backward, the arguments, the
        outputs' gradients and the gradients wanted."""
        with torch.no_grad():
            outputs = as_tuple(self.function("eager")(*self.tensors))
        given = sum(tensor.nbytes for tensor in self.tensors)
        made = sum(output.nbytes for output in outputs)
        if mode == FORWARD:
            return given + made
        wanted = sum(tensor.nbytes for tensor in self.tensors if tensor.requires_grad)
        return 2 * (given + made) + wanted


def _only_used(function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """Of `tensors`, ask no gradient of those that the reference does not use."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    outputs = [output for output in as_tuple(function(*tensors)) if output.requires_grad]
    if not outputs:
        return
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs],
                                allow_unused=True)  # fmt: skip
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.requires_grad_(grad is not None)


@contextmanager
def recorded() -> Iterator[dict[tuple[Any, ...], Call]]:
    """Calls of operators inside the block, by what distinguishes them."""
    calls: dict[tuple[Any, ...], Call] = {}
    plain = Operator.__call__

    def noted(self: Operator, *args: Any, backend: str | None = None) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        autocast = torch.is_autocast_enabled(device)
        call = Call.of(self, self.as_autocast(args, device) if autocast else args)
        calls.setdefault(call.key, call)
        return plain(self, *args, backend=backend)

    Operator.__call__ = noted  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Operator.__call__ = plain  # type: ignore[method-assign]


def of_step(shape: StepShape, setting: Setting) -> list[Call]:
    """The calls of one training step in the setting's dtype, under autocast below float32, those on
    the largest tensors first."""
    shape = replace(shape, depth=DEPTH, blocks=tuple(range(DEPTH)))
    draw = Draw(Setting(setting.device), seed=0)
    stage = STAGES[shape.stage]
    loss, inputs = stage.loss(stage.model_of(shape, draw)), stage.input_set(shape, draw)
    with (
        recorded() as calls,
        torch.autocast(setting.device, setting.dtype, enabled=is_narrow(setting.dtype)),
    ):
        loss(*inputs)
    return sorted(calls.values(), key=lambda call: -sum(tensor.nbytes for tensor in call.tensors))
