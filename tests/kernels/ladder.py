"""The proof ladder every operator climbs: contract, gradients, compilation, accuracy, repeats.

Each rung takes the `Operator` and its arguments; float64 arguments are made by the caller, so the
same draw serves every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._operator import Operator
from tests.tolerances import (
    BACKWARD_FACTOR,
    DEVICE_FACTOR,
    FORWARD_FACTOR,
    ROUND_OFF,
    ZERO_GRADIENT,
)


def cast(
    args: Sequence[Any], dtype: torch.dtype, *, grad: bool = False, constants: Sequence[int] = ()
) -> list[Any]:
    """Copies of `args` with floating-point tensors in `dtype`, as leaves if `grad`, but for those
    at the places `constants`."""
    return [
        arg.detach().to(dtype).clone().requires_grad_(grad and place not in constants)
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for place, arg in enumerate(args)
    ]


def widest(operator: Operator, backend: str) -> torch.dtype:
    """float64 where `backend` takes it on a CPU, else float32."""
    takes = backend in _backends.available(operator.name, "cpu", torch.float64)
    return torch.float64 if takes else torch.float32


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def check_contract(operator: Operator, args: Sequence[Any]) -> None:
    """torch.library.opcheck on the operator as it is: schema, fake kernel, autograd, tracing."""
    torch.library.opcheck(operator.op, tuple(cast(args, torch.float32, grad=True)))
    if "triton" in _backends.available(operator.name, "cpu"):
        torch.library.opcheck(operator.triton_op, tuple(cast(args, torch.float32, grad=True)))


def check_gradients(operator: Operator, args: Sequence[Any]) -> None:
    """gradcheck in float64: all entries of the dispatched operator, projected for the reference."""
    leaves = cast(args, torch.float64, grad=True)
    assert torch.autograd.gradcheck(operator.op, tuple(leaves))
    assert torch.autograd.gradcheck(operator.reference, tuple(leaves), fast_mode=True)


def check_compiles(
    function: Callable[..., Any], args: Sequence[Any], *, compiler: str = "inductor"
) -> None:
    """torch.compile(fullgraph=True), forward and backward, agrees with the function itself.

    ``compiler="aot_eager"`` traces all the same but builds no C++, which takes a tenth of the time.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = []
    for run in (function, compiled):
        leaves = cast(args, torch.float32, grad=True)
        outputs = outputs_of(run(*leaves))
        scored = [output for output in outputs if output.requires_grad]
        if scored:
            torch.stack([output.float().square().mean() for output in scored]).sum().backward()
        grads = [leaf.grad for leaf in leaves if isinstance(leaf, Tensor)]
        results.append((outputs, grads))
    (outputs, grads), (compiled_outputs, compiled_grads) = results
    for plain, other in zip(outputs, compiled_outputs, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
    for grad, compiled_grad in zip(grads, compiled_grads, strict=True):
        assert (grad is None) == (compiled_grad is None)
        if grad is not None and compiled_grad is not None:
            torch.testing.assert_close(compiled_grad, grad, rtol=1e-4, atol=1e-5)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the largest exact value; NaN in one only is infinite."""
    found, exact = found.double(), exact.double()
    if exact.numel() == 0:
        return 0.0
    if not torch.equal(found.isnan(), exact.isnan()):
        return float("inf")
    scale = exact.nan_to_num().abs().max().clamp_min(1e-30)
    return float(((found - exact).nan_to_num().abs().max() / scale).item())


def error_beside(found: Tensor, exact: Tensor, largest: float) -> float:
    """`relative_error`; but of what is zero in exact arithmetic relative to `largest`, the largest
    absolute value of the gradients beside it."""
    if largest and exact.numel() and float(exact.abs().max()) <= ZERO_GRADIENT * largest:
        return float((found.double() - exact.double()).abs().max()) / largest
    return relative_error(found, exact)


def run_with_gradients(
    function: Callable[..., Any], args: Sequence[Any], seed: int = 0
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients by argument position, for a random upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    outputs = outputs_of(function(*args))
    scored = [output for output in outputs if output.requires_grad]
    if scored:
        upstream = [
            torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            for output in scored
        ]
        torch.autograd.backward(scored, upstream)
    grads = {
        f"argument {position}": arg.grad
        for position, arg in enumerate(args)
        if isinstance(arg, Tensor) and arg.grad is not None
    }
    return [output.detach() for output in outputs], grads


def moved(args: Sequence[Any], device: str) -> list[Any]:
    """`args` with their tensors on `device`, strides kept."""
    return [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]


Results = tuple[list[Tensor], dict[str, Tensor]]


def errors(found: Results, exact: Results, plain: Results) -> dict[str, float]:
    """Of every floating-point output and every gradient of `exact`, by name.

    Where both the truth and the reference have nothing but zeros, nothing else is right.
    """
    named = {
        f"output {place}": relative_error(found[0][place], truth)
        for place, truth in enumerate(exact[0])
        if truth.is_floating_point()
    }
    largest = max((float(g.abs().max()) for g in exact[1].values() if g.numel()), default=0.0)
    largest = largest if math.isfinite(largest) else 0.0
    for name, truth in exact[1].items():
        beside = largest if truth.any() or plain[1][name].any() else 0.0
        named[f"gradient of {name}"] = error_beside(found[1][name], truth, beside)
    return named


def bounds_of(own: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """What a backend may err where the reference errs by `own`."""
    return {
        name: (FORWARD_FACTOR if name.startswith("output") else BACKWARD_FACTOR) * error
        + ROUND_OFF[dtype]
        for name, error in own.items()
    }


def check_accuracy(
    operator: Operator,
    args: Sequence[Any],
    dtype: torch.dtype,
    device: str = "cpu",
    constants: Sequence[int] = (),
) -> None:
    """Every backend of `device` on this machine against float64, relative to the reference's own
    error: on the CPU, where the truth is evaluated too, or on `device`, which must be near that.
    Arguments at the places `constants` are not differentiated."""

    def leaves(values: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        return cast(values, dtype, grad=True, constants=constants)

    # What any implementation in this dtype is given: the rounded inputs, exactly evaluated.
    exact = run_with_gradients(operator.reference, leaves(cast(args, dtype), torch.float64))
    plain = run_with_gradients(operator.reference, leaves(args, dtype))
    bounds = bounds_of(errors(plain, exact, plain), dtype)
    # Triton's interpreter is left out by `available` where it does not compute as a GPU would.
    backends = [*_backends.available(operator.name, device, dtype), "dispatcher"]
    if device != "cpu":
        backends.sort(key=lambda backend: backend != "eager")  # its errors count for the others
    for backend in backends:

        def run(*values: Any, backend: str = backend) -> Any:
            if backend == "dispatcher":
                return operator.op(*values)
            return operator(*values, backend=backend)

        outputs, grads = run_with_gradients(run, leaves(moved(args, device), dtype))
        found = moved(outputs, "cpu"), {name: grad.cpu() for name, grad in grads.items()}
        for position, output in enumerate(plain[0]):
            if not output.is_floating_point():
                assert torch.equal(found[0][position], output), (backend, position)
        assert found[1].keys() >= exact[1].keys(), (backend, exact[1].keys() - found[1].keys())
        for name in found[1].keys() - exact[1].keys():  # the reference does not use the argument
            assert not found[1][name].any(), (backend, f"gradient of {name}")
        reference_there = backend == "eager" and device != "cpu"
        factor = DEVICE_FACTOR if reference_there else 1.0
        own = errors(found, exact, plain)
        for name, error in own.items():
            bound = factor * bounds[name]
            assert error <= bound, (backend, name, error, bound)
        if reference_there:
            there = bounds_of(own, dtype)
            bounds = {name: max(bound, there[name]) for name, bound in bounds.items()}


def check_repeats(
    operator: Operator, args: Sequence[Any], device: str = "cpu", constants: Sequence[int] = ()
) -> None:
    """Same inputs, same bits, forward and backward, for every backend of `device` here; but for
    the reference on a GPU, where torch's upsampling adds with atomics."""
    for backend in _backends.available(operator.name, device, torch.float32):
        if backend == "eager" and device == "cuda":
            continue
        first, second = (
            run_with_gradients(
                lambda *values, backend=backend: operator(*values, backend=backend),
                cast(moved(args, device), torch.float32, grad=True, constants=constants),
            )
            for _ in range(2)
        )
        for one, two in zip(first[0], second[0], strict=True):
            assert torch.equal(one, two), backend
        for name, one in first[1].items():
            assert torch.equal(one, second[1][name]), (backend, name)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates starts as NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
