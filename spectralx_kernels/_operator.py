"""One operator of the library: schema, fake kernel, autograd and default kernels in one place.

An operator is declared once, in its room's ``ops.py``::

    _MATCH = Operator("match_argmax", "(Tensor q, Tensor k) -> Tensor", reference.match_argmax)

which defines ``torch.ops.spectralx.match_argmax`` and ``..._backward``. Both exist on every
device: their default kernels run the reference (backward recomputes it and differentiates). C++,
CUDA C++ and Triton kernels are registered for a device on the same operator and replace them
there. Calling the `Operator` picks the backend: ``eager`` runs the reference as plain PyTorch,
anything else goes through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralx_kernels import _backends

_LIBRARY = torch.library.Library("spectralx", "FRAGMENT")


def define(name: str, schema: str) -> str:
    """Define ``spectralx::<name>`` with `schema` ("(Tensor x) -> Tensor"); its qualified name."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    return f"spectralx::{name}"


def register_default(name: str, kernel: Callable[..., Any]) -> None:
    """Register `kernel` for every device that has no kernel of its own."""
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is a map [B, C, H, W] with its channels side by side, and not contiguous too."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def has_kernel(name: str, device: str) -> bool:
    """Whether a kernel written for `device` ("CPU", "CUDA") is registered for this operator."""
    registered = torch._C._dispatch_dump(f"spectralx::{name}")
    return any(line.startswith(f"{device}:") for line in registered.splitlines())


class Saving(NamedTuple):
    """What kernels of an operator keep for their backward.

    `forward` is the reference with `hidden` more outputs, the last ones of the schema, which
    callers never see; `kept` lists the outputs that the backward operator is given as ``saved``, or
    is a function of the operator's inputs that does.
    """

    forward: Callable[..., Any]
    hidden: int
    kept: tuple[int, ...] | Callable[[Sequence[Any]], tuple[int, ...]]

    def positions(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """The outputs kept in a call with these inputs."""
        return self.kept(inputs) if callable(self.kept) else self.kept


class Operator:
    """A differentiable operator with a reference and kernels by device.

    Parameters
    ----------
    name : the operator is ``torch.ops.spectralx.<name>``.
    schema : its torch.library schema without the name. Outputs are tensors.
    reference : the same signature in plain PyTorch, static in its shapes, differentiable.
    differentiable : False for an operator with no floating-point output.
    autocast_to : dtype that floating-point tensors are cast to under autocast; autocast's own
        where None. float32 for losses and for what is compared, as autocast treats those.
    saving : what kernels keep for their backward; nothing but the inputs by default.
    fake : shapes and dtypes of the outputs; the reference traced without data by default, which
        is slow for long references.
    keep_format : outputs that the reference makes channels_last stay so, and gradients have the
        strides of ``torch.empty_like`` of their inputs. Contiguous otherwise.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        *,
        differentiable: bool = True,
        autocast_to: torch.dtype | None = None,
        saving: Saving | None = None,
        fake: Callable[..., Any] | None = None,
        keep_format: bool = False,
    ) -> None:
        self.name = name
        self.reference = reference
        self._saving = saving or Saving(reference, 0, ())
        self._autocast_to = autocast_to
        self._keep_format = keep_format
        qualified = define(name, schema)
        self.op = getattr(torch.ops.spectralx, name)
        register_default(name, self._forward_kernel)
        torch.library.register_fake(qualified, fake or self._forward_kernel, lib=_LIBRARY)
        _backends.add_operator(name)
        for backend in ("cpp", "cuda"):
            if has_kernel(name, _backends.DEVICE_OF[backend].upper()):
                _backends.add_kernel(name, backend)
        if differentiable:
            arguments = schema[1 : schema.rindex("->")].rstrip()[:-1]
            backward = define(
                f"{name}_backward",
                f"(Tensor?[] output_grads, {arguments}, Tensor[] saved, bool[] output_mask) "
                "-> Tensor[]",
            )
            self.backward_op = getattr(torch.ops.spectralx, f"{name}_backward")
            register_default(f"{name}_backward", self._backward_kernel)
            torch.library.register_fake(backward, self._backward_fake, lib=_LIBRARY)
            torch.library.register_autograd(
                qualified, self._backward, setup_context=self._setup_context, lib=_LIBRARY
            )

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run the operator. Under autocast, floating-point tensors are cast here, once.

        float64 tensors are left alone: they are only ever passed for their precision.
        """
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        chosen = _backends.choose(self.name, device, backend)
        run = self.reference if chosen == "eager" else self._dispatch
        if not torch.is_autocast_enabled(device):
            return run(*args)
        dtype = self._autocast_to or torch.get_autocast_dtype(device)
        cast = [
            arg.to(dtype)
            if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
            else arg
            for arg in args
        ]
        with torch.autocast(device, enabled=False):
            return run(*cast)

    def _dispatch(self, *args: Any) -> Any:
        outputs = self.op(*args)
        if not self._saving.hidden:
            return outputs
        seen = outputs[: -self._saving.hidden]
        return seen if len(seen) > 1 else seen[0]

    def _forward_kernel(self, *args: Any) -> Any:
        with torch.no_grad():
            outputs = self._saving.forward(*args)
        # A kernel's outputs must not alias its inputs or each other.
        if isinstance(outputs, Tensor):
            return self._laid_out(outputs)
        return tuple(self._laid_out(output) for output in outputs)

    def _laid_out(self, output: Tensor) -> Tensor:
        if self._keep_format and is_channels_last(output):
            return output.contiguous(memory_format=torch.channels_last)
        return output.contiguous()

    def _empty_grad(self, value: Tensor) -> Tensor:
        return torch.empty_like(
            value,
            memory_format=torch.preserve_format if self._keep_format else torch.contiguous_format,
        )

    def _grad_laid_out(self, leaf: Tensor, grad: Tensor) -> Tensor:
        return self._empty_grad(leaf).copy_(grad) if self._keep_format else grad.contiguous()

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        if self._saving.hidden:
            ctx.mark_non_differentiable(*output[-self._saving.hidden :])
        outputs = (output,) if isinstance(output, Tensor) else output
        saved = [outputs[position] for position in self._saving.positions(inputs)]
        ctx.kept = len(saved)
        ctx.save_for_backward(*saved, *[value for value in inputs if isinstance(value, Tensor)])
        ctx.tensors = [isinstance(value, Tensor) for value in inputs]
        ctx.set_materialize_grads(False)

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors[: ctx.kept]
        tensors = iter(ctx.saved_tensors[ctx.kept :])
        inputs = [
            next(tensors) if is_tensor else other
            for is_tensor, other in zip(ctx.tensors, ctx.others, strict=True)
        ]
        mask = [bool(needs) for needs in ctx.needs_input_grad]
        output_grads = list(grads[: len(grads) - self._saving.hidden])
        computed = iter(self.backward_op(output_grads, *inputs, list(saved), mask))
        return tuple(next(computed) if needs else None for needs in mask)

    def _backward_kernel(
        self, output_grads: Sequence[Tensor | None], *args: Any
    ) -> Sequence[Tensor]:
        *inputs, _saved, mask = args
        with torch.enable_grad():
            leaves = [
                value.detach().requires_grad_(needs) if isinstance(value, Tensor) else value
                for value, needs in zip(inputs, mask, strict=True)
            ]
            outputs = self.reference(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        wanted = [leaf for leaf, needs in zip(leaves, mask, strict=True) if needs]
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, output_grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in wanted]
        grads = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
        )
        return [
            torch.zeros_like(leaf) if grad is None else self._grad_laid_out(leaf, grad)
            for leaf, grad in zip(wanted, grads, strict=True)
        ]

    def _backward_fake(self, output_grads: Sequence[Tensor | None], *args: Any) -> Sequence[Tensor]:
        *inputs, _saved, mask = args
        return [self._empty_grad(value) for value, needs in zip(inputs, mask, strict=True) if needs]
