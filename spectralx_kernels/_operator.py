"""One operator of the library: schema, fake kernel, autograd and default kernels in one place.

An operator is declared once, in its room's ``ops.py``::

    _MATCH = Operator("match_argmax", "(Tensor q, Tensor k) -> Tensor", reference.match_argmax)

which defines ``torch.ops.spectralx.match_argmax`` and ``..._backward``. Both exist on every
device: their default kernels run the reference (backward recomputes it and differentiates). C++
and CUDA C++ kernels are registered for a device on the same operator and replace them there.

    _MATCH.add_triton("spectralx_kernels.refine.triton")

defines the overloads ``spectralx::match_argmax.triton`` and ``..._backward.triton`` of the same
schemas, which run the functions of those names in that module; it is imported at the first call.
Where CUDA has no C++ kernel the plain operator runs them too. Calling the `Operator` picks the
backend: ``eager`` runs the reference as plain PyTorch, ``triton`` its overload, anything else goes
through the dispatcher.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._autograd import Kept, differentiate
from spectralx_kernels._layouts import is_channels_last

_LIBRARY = torch.library.Library("spectralx", "FRAGMENT")


def define(name: str, schema: str) -> str:
    """Define ``spectralx::<name>`` with `schema` ("(Tensor x) -> Tensor"); its qualified name."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    return f"spectralx::{name}"


def register_default(name: str, kernel: Callable[..., Any]) -> None:
    """Register `kernel` for every device that has no kernel of its own."""
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


def register_kernel(name: str, kernel: Callable[..., Any], device: str) -> None:
    """Register `kernel` for `device` ("CPU", "CUDA")."""
    _LIBRARY.impl(name, kernel, device)


def has_kernel(name: str, device: str) -> bool:
    """Whether a kernel written for `device` ("CPU", "CUDA") is registered for this operator."""
    registered = torch._C._dispatch_dump(f"spectralx::{name}")
    return any(line.startswith(f"{device}:") for line in registered.splitlines())


class Saving(NamedTuple):
    """What kernels of an operator keep for their backward.

    `forward` is the reference with `hidden` more outputs, the last ones of the schema, which
    callers never see but for the first `shown` of them; those the reference gives too. None of them
    is differentiable. `kept` lists the outputs that the backward operator is given as ``saved``;
    with `only_if`, only in calls in which the input at that position is true.
    """

    forward: Callable[..., Any]
    hidden: int
    kept: tuple[int, ...]
    shown: int = 0
    only_if: int | None = None


_OPERATORS: dict[str, Operator] = {}


def triton_modules() -> dict[str, str]:
    """Modules of Triton kernels by operator, of every operator that has some."""
    modules = {name: operator.triton_module for name, operator in _OPERATORS.items()}
    return {name: module for name, module in modules.items() if module is not None}


# What kernels that accumulate in float32 take; float64 is left to the reference.
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def prefer_triton(args: Sequence[Any], dtype: torch.dtype | None) -> str | None:
    """`Operator`'s `prefer` of kernels that on a GPU are proven in Triton alone."""
    return "triton" if args[0].is_cuda else None


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
    prefer : from the operator's arguments and the dtype they will have, the backend that is faster
        for them than the device's default, or None.
    keep_format : outputs that the reference makes channels_last stay so, and gradients have the
        strides of ``torch.empty_like`` of their inputs. Contiguous otherwise.
    constant : positions of floating-point outputs that have no gradient.
    read_for : of inputs that backward reads for some gradients only, by position, the positions of
        the inputs whose gradients those are. Where none of them is wanted the input is not held:
        backward gets one of its shape.
    uncast : positions of tensors that C++ kernels on the CPU round as they read them: autocast
        leaves those alone there, and holds no copy for backward.
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
        prefer: Callable[[Sequence[Any], torch.dtype | None], str | None] | None = None,
        constant: tuple[int, ...] = (),
        read_for: Mapping[int, tuple[int, ...]] | None = None,
        uncast: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self._prefer = prefer
        self.reference = reference
        self._saving = saving or Saving(reference, 0, ())
        self._autocast_to = autocast_to
        self._schema = schema
        self._fake = fake or self._forward_kernel
        self._differentiable = differentiable
        self.triton_module: str | None = None  # where `add_triton` finds its functions
        self._keep_format = keep_format
        self._uncast = uncast
        saving = self._saving
        self._kept = Kept(saving.hidden, constant, saving.kept, saving.only_if, read_for or {})
        qualified = define(name, schema)
        self.op = getattr(torch.ops.spectralx, name).default
        register_default(name, self._forward_kernel)
        torch.library.register_fake(qualified, self._fake, lib=_LIBRARY)
        _backends.add_operator(name)
        for backend in ("cpp", "cuda"):
            if has_kernel(name, _backends.DEVICE_OF[backend].upper()):
                _backends.add_kernel(name, backend)
        if differentiable:
            backward = define(f"{name}_backward", self._backward_schema())
            self.backward_op = getattr(torch.ops.spectralx, f"{name}_backward").default
            register_default(f"{name}_backward", self._backward_kernel)
            torch.library.register_fake(backward, self._backward_fake, lib=_LIBRARY)
            differentiate(_LIBRARY, name, "", self._kept)
        _OPERATORS[name] = self

    def add_triton(
        self, module: str, *, dtypes: tuple[torch.dtype, ...] = NARROW, backward: bool = True
    ) -> None:
        """Give the operator Triton kernels: `module`'s functions ``<name>``, ``<name>_backward``.

        They have the operators' arguments and return new contiguous tensors. Nothing happens where
        triton is not installed.

        Parameters
        ----------
        module : qualified name; imported when a kernel is first called.
        dtypes : of floating-point tensors that the kernels take.
        backward : False where only forward is written; backward then runs the reference.
        """
        self.triton_module = module
        if not _backends.TRITON_INSTALLED:
            return
        name, backward_name = self.name, f"{self.name}_backward"
        _backends.add_kernel(name, "triton", dtypes)
        qualified = define(f"{name}.triton", self._schema)
        self.triton_op = getattr(torch.ops.spectralx, name).triton
        self._register_triton(name, module, dtypes, self._forward_kernel)
        torch.library.register_fake(qualified, self._fake, lib=_LIBRARY)
        if not self._differentiable:
            return
        qualified_backward = define(f"{backward_name}.triton", self._backward_schema())
        torch.library.register_fake(qualified_backward, self._backward_fake, lib=_LIBRARY)
        if backward:
            self._register_triton(backward_name, module, dtypes, self._backward_kernel)
        else:
            register_default(f"{backward_name}.triton", self._backward_kernel)
        differentiate(_LIBRARY, name, "triton", self._kept)

    def _register_triton(
        self, name: str, module: str, dtypes: tuple[torch.dtype, ...], default: Callable[..., Any]
    ) -> None:
        def run(*args: Any) -> Any:
            kernel = getattr(importlib.import_module(module), name)
            # Triton launches on the current device, whatever that of the tensors is.
            with torch.cuda.device_of(_backends.first_tensor(args)):
                return kernel(*args)

        def run_or_default(*args: Any) -> Any:
            return (run if _backends.takes(dtypes, args) else default)(*args)

        for device in _backends.devices_of("triton"):
            register_kernel(f"{name}.triton", run, device.upper())
        if not has_kernel(name, "CUDA"):
            register_kernel(name, run_or_default, "CUDA")

    def _backward_schema(self) -> str:
        arguments = self._schema[1 : self._schema.rindex("->")].rstrip()[:-1]
        return (
            f"(Tensor?[] output_grads, {arguments}, Tensor[] saved, bool[] output_mask) -> Tensor[]"
        )

    def backend_of(
        self,
        args: Sequence[Any],
        device: str,
        dtype: torch.dtype | None,
        backend: str | None = None,
    ) -> str:
        """The backend that a call with `args`, cast to `dtype`, runs on."""
        prefer = self._prefer(args, dtype) if self._prefer else None
        return _backends.choose(self.name, device, backend, dtype, prefer)

    def as_autocast(
        self, args: Sequence[Any], device: str, uncast: tuple[int, ...] = ()
    ) -> list[Any]:
        """`args` as autocast of `device` has them: floating point in its dtype, but for float64."""
        dtype = self._autocast_to or torch.get_autocast_dtype(device)
        return [
            arg.to(dtype)
            if isinstance(arg, Tensor)
            and arg.is_floating_point()
            and arg.dtype != torch.float64
            and place not in uncast
            else arg
            for place, arg in enumerate(args)
        ]

    def decider(self) -> Callable[..., Any]:
        """The function that says which backend is the default on a device."""
        return self._prefer or _backends.available

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Run the operator. Under autocast, floating-point tensors are cast here, once.

        float64 tensors are left alone: they are only ever passed for their precision.
        """
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        # "meta" has no autocast, and asking for it raises.
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = _backends.dtype_of(args)
        if autocast and dtype is not None and dtype != torch.float64:
            dtype = self._autocast_to or torch.get_autocast_dtype(device)
        chosen = self.backend_of(args, device, dtype, backend)
        run = self.reference if chosen == "eager" else self._dispatch
        if chosen == "triton":
            run = self._dispatch_triton
        if not autocast:
            return run(*args)
        cast = self.as_autocast(args, device, self._uncast if chosen == "cpp" else ())
        with torch.autocast(device, enabled=False):
            return run(*cast)

    def _dispatch(self, *args: Any) -> Any:
        return self._seen(self.op(*args))

    def _dispatch_triton(self, *args: Any) -> Any:
        return self._seen(self.triton_op(*args))

    def _seen(self, outputs: Any) -> Any:
        """The outputs without those that are only kept for backward."""
        if not self._saving.hidden:
            return outputs
        seen = outputs[: len(outputs) - self._saving.hidden + self._saving.shown]
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
        outputs = outputs[: len(outputs) - self._saving.shown]
        wanted = [leaf for leaf, needs in zip(leaves, mask, strict=True) if needs]
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, output_grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        if not pairs:
            return [self._empty_grad(leaf).zero_() for leaf in wanted]
        grads = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
        )
        return [
            self._empty_grad(leaf).zero_() if grad is None else self._grad_laid_out(leaf, grad)
            for leaf, grad in zip(wanted, grads, strict=True)
        ]

    def _backward_fake(self, output_grads: Sequence[Tensor | None], *args: Any) -> Sequence[Tensor]:
        *inputs, _saved, mask = args
        return [self._empty_grad(value) for value, needs in zip(inputs, mask, strict=True) if needs]
