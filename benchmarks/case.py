"""What a benchmark measures: one operator at one shape and pass, with all of its implementations.

A ``bench_<op>.py`` builds a `Case`; everything else (accuracy, memory, timing) is done to it here
and in the neighbouring files, the same way for every operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import FORWARD, STEP

Tensors = tuple[Tensor, ...]

# Rotating inputs together exceed the last-level cache, within these counts.
ROTATING_BYTES = 128 * 2**20
ROTATING_COUNT = (2, 16)


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype a case is built.

    Attributes
    ----------
    device : "cpu" or "cuda".
    dtype : dtype of the tensors.
    rounded : dtype whose rounding the drawn values carry, so that a case in float64 holds exactly
        the values of the case in `rounded`; `dtype` itself by default.
    rotate : draw several input sets, to be used in turn.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rounded: torch.dtype | None = None
    rotate: bool = True

    @property
    def accumulate(self) -> torch.dtype:
        """float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def exact(self, dtype: torch.dtype = torch.float64) -> Setting:
        """The same values in `dtype`, the first input set only."""
        rounded = self.rounded or self.dtype
        return replace(self, dtype=dtype, rounded=rounded, rotate=False)


class Draw:
    """Random tensors and weights of a setting; the same for every dtype up to rounding."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.generator = torch.Generator().manual_seed(seed)

    def normal(
        self, *shape: int, scale: float = 1.0, offset: float = 0.0, wide: bool = False
    ) -> Tensor:
        """offset + scale * N(0, 1); `wide` keeps at least float32."""
        values = torch.randn(shape, generator=self.generator) * scale + offset
        rounded = torch.float32 if wide else (self.setting.rounded or self.setting.dtype)
        dtype = self.setting.accumulate if wide else self.setting.dtype
        return values.to(rounded).to(self.setting.device, dtype)

    def uniform(self, *shape: int) -> Tensor:
        """U(0, 1), at least float32: noise that is compared, not computed with."""
        values = torch.rand(shape, generator=self.generator)
        return values.to(self.setting.device, self.setting.accumulate)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.setting.device)

    def fill(self, module: nn.Module) -> nn.Module:
        """`module` on the device and in the dtype, no parameter left at a constant start value.

        Matrices and kernels get N(0, 1 / fan-in), vectors called ``weight`` or ``scaler`` get
        1 + 0.1 N, other vectors 0.1 N.
        """
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.dim() > 1:
                    scale, offset = (parameter[0].numel()) ** -0.5, 0.0
                else:
                    leaf = name.rsplit(".", 1)[-1]
                    scale, offset = 0.1, 1.0 if leaf in ("weight", "scaler") else 0.0
                values = torch.randn(parameter.shape, generator=self.generator)
                parameter.copy_(values * scale + offset)
        rounded = self.setting.rounded or self.setting.dtype
        return module.to(rounded).to(self.setting.device, self.setting.dtype)


@dataclass
class Case:
    """One operator at one shape, pass and dtype.

    Attributes
    ----------
    functions : implementation -> function of one input set. ``compile`` is made from ``eager``
        where it is wanted and missing.
    inputs : rotating input sets; the tensors in them that require a gradient are differentiated.
    parameters : name -> further tensors that are differentiated.
    constants : tensors that live on anyway and are not counted as saved for backward.
    floor : makes name -> the bare work that no implementation can avoid; the slowest is the floor.
    linear : the frozen linear layer alone, of an adapted layer: a function of one input set, run
        and differentiated as `functions` are, but for `parameters`.
    finish : ends a step (the optimiser); not part of the accuracy check.
    by_part : compare the gradients of each part of a model (the first word of their names) as one
        vector.
    truth : dtype of the truth; float32 for whole models.
    """

    functions: dict[str, Callable[..., Any]]
    inputs: Sequence[Tensors]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Sequence[Tensor] = ()
    floor: Callable[[], Mapping[str, Callable[[], object]]] = dict
    linear: Callable[..., Any] | None = None
    finish: Callable[[], object] | None = None
    by_part: bool = False
    truth: torch.dtype = torch.float64


def rotating(setting: Setting, draw_set: Callable[[], Tensors]) -> list[Tensors]:
    """Enough input sets of `draw_set` to exceed the last-level cache, or one."""
    sets = [draw_set()]
    if not setting.rotate:
        return sets
    size = sum(tensor.nbytes for tensor in sets[0])
    low, high = ROTATING_COUNT
    count = min(max(-(-ROTATING_BYTES // max(size, 1)), low), high)
    sets += [draw_set() for _ in range(count - 1)]
    return sets


def as_tuple(outputs: Any) -> Tensors:
    """The tensors a function returned."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


class Runner:
    """Runs one pass of a case: ``runner(function, turn)`` is what is timed.

    ``fwd`` runs without autograd; ``fwd+bwd`` differentiates every output with respect to every
    input and parameter that requires a gradient, for fixed random upstream gradients; ``step``
    runs the function, which leaves gradients on the parameters, and then ``case.finish``.
    """

    def __init__(self, case: Case, mode: str, setting: Setting) -> None:
        self.case = case
        self.mode = mode
        self.rounded = setting.rounded or setting.dtype
        self.upstream: Tensors = ()

    def __call__(self, function: Callable[..., Any], turn: int) -> object:
        inputs = self.case.inputs[turn % len(self.case.inputs)]
        if self.mode == FORWARD:
            with torch.no_grad():
                return function(*inputs)
        if self.mode == STEP:
            loss = function(*inputs)
            assert self.case.finish is not None
            self.case.finish()
            return loss
        return self.backward(as_tuple(function(*inputs)), inputs)

    def leaves(self, inputs: Tensors) -> dict[str, Tensor]:
        """What is differentiated, by name."""
        named = {f"input {place}": tensor for place, tensor in enumerate(inputs)}
        named.update(self.case.parameters)
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def backward(self, outputs: Tensors, inputs: Tensors) -> Tensors:
        """Gradients of `leaves`, for the upstream gradients of this case."""
        scored = [output for output in outputs if output.requires_grad]
        if not self.upstream:
            generator = torch.Generator().manual_seed(1)
            self.upstream = tuple(
                torch.randn(output.shape, generator=generator).to(self.rounded).to(output)
                for output in scored
            )
        return torch.autograd.grad(scored, list(self.leaves(inputs).values()), self.upstream)

    def results(
        self, function: Callable[..., Any], around: AbstractContextManager[Any] | None = None
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name, on the first input set, leaving nothing behind.

        Random draws inside start from the same seed for every implementation. `around` is entered
        for the forward pass.
        """
        torch.manual_seed(0)
        inputs = self.case.inputs[0]
        with around or nullcontext(), torch.set_grad_enabled(self.mode != FORWARD):
            outputs = as_tuple(function(*inputs))
        found = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
        if self.mode == FORWARD:
            return found
        if self.mode == STEP:
            gradients = {}
            for name, tensor in self.case.parameters.items():
                if tensor.grad is not None:
                    gradients[name], tensor.grad = tensor.grad, None
        else:
            leaves = self.leaves(inputs)
            gradients = dict(zip(leaves, self.backward(outputs, inputs), strict=True))
        found.update({f"gradient of {name}": grad for name, grad in gradients.items()})
        return found
