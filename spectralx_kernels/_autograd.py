"""Differentiation of an operator by its backward operator: in C++ where the extension is there.

In Python it takes longer than many a kernel; without the extension it is written out here, as
``torch.library.register_autograd`` costs twice the host time of the rest of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._layouts import stand_in


class Kept(NamedTuple):
    """What the backward of an operator is given; positions are those of inputs or outputs.

    Attributes
    ----------
    hidden : how many of the last outputs have no gradient and none that goes to backward.
    constant : other outputs without a gradient.
    outputs : outputs that backward gets as ``saved``.
    only_if : an input; they are kept only in calls in which it is true.
    read_for : of inputs that backward reads for some gradients only, the inputs whose gradients
        those are. Where none of them is wanted backward gets a `stand_in`.
    """

    hidden: int
    constant: tuple[int, ...]
    outputs: tuple[int, ...]
    only_if: int | None
    read_for: Mapping[int, tuple[int, ...]]

    def saved(self, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of a call that its backward is given."""
        is_kept = self.only_if is None or inputs[self.only_if]
        return [outputs[place] for place in self.outputs] if is_kept else []


def differentiate(library: torch.library.Library, name: str, overload: str, kept: Kept) -> None:
    """Differentiate ``spectralx::<name>.<overload>`` by ``<name>_backward.<overload>``."""
    extension = _backends.extension()
    if extension is None:
        _differentiate_in_python(library, name, overload, kept)
    else:
        extension.differentiate(name, overload, **kept._asdict())


def _differentiate_in_python(
    library: torch.library.Library, name: str, overload: str, kept: Kept
) -> None:
    forward_op = getattr(getattr(torch.ops.spectralx, name), overload or "default")
    backward_op = getattr(getattr(torch.ops.spectralx, f"{name}_backward"), overload or "default")
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = forward_op.redispatch(keyset & below, *args)
        _keep(kept, ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Read once: checkpointing hands each saved tensor out a single time.
        everything = ctx.saved_tensors
        saved, tensors = everything[: ctx.kept], iter(everything[ctx.kept :])
        inputs = [
            next(tensors) if is_tensor else other
            for is_tensor, other in zip(ctx.tensors, ctx.others, strict=True)
        ]
        mask = [bool(needs) for needs in ctx.needs_input_grad[1:]]  # the first is the key set
        output_grads = list(grads[: len(grads) - kept.hidden])
        device = next(value.device.type for value in inputs if isinstance(value, Tensor))
        # The caller may run backward inside its autocast block; the casts are in the graph.
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            computed = iter(backward_op(output_grads, *inputs, list(saved), mask))
        return (None, *(next(computed) if needs else None for needs in mask))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{name}_function", (torch.autograd.Function,), methods)

    def differentiable(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(keyset, *args)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op.redispatch(keyset & below, *args)

    qualified = f"{name}.{overload}" if overload else name
    library.impl(qualified, differentiable, "Autograd", with_keyset=True)


def _keep(kept: Kept, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep on `ctx` what backward is given of a call."""
    outputs = (output,) if isinstance(output, Tensor) else output
    constant = [outputs[place] for place in kept.constant]
    ctx.mark_non_differentiable(*constant, *outputs[len(outputs) - kept.hidden :])
    saved = kept.saved(inputs, outputs)
    wanted = ctx.needs_input_grad[1:]  # the first is the key set
    unread = [
        place
        for place, others in kept.read_for.items()
        if not any(wanted[other] for other in others)
    ]
    ctx.save_for_backward(
        *saved,
        *[
            stand_in(value) if place in unread else value
            for place, value in enumerate(inputs)
            if isinstance(value, Tensor)
        ],
    )
    ctx.kept = len(saved)
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.tensors = [isinstance(value, Tensor) for value in inputs]
    ctx.set_materialize_grads(False)
