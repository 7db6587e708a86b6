"""The CUDA operators as torch calls them, on CPU tensors: glue and kernels against the reference.

``python -m tests.cuda_on_cpu.glue`` compiles csrc/cuda/**/*_op.cpp with torch's headers (some
minutes, and so not one of the tests), registers the operators for CUDA and calls them by that
dispatch key.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from spectralx_kernels._operator import Operator
from spectralx_kernels.aomoa import ops, reference
from spectralx_kernels.hypert import attention, stem
from spectralx_kernels.reconstruction import masking
from spectralx_kernels.reconstruction import reference as reconstruction_reference
from spectralx_kernels.refine import ops as refine
from spectralx_kernels.upsample import convolution, norm, prediction
from spectralx_kernels.upsample import reference as upsample_reference
from tests.cuda_on_cpu.build import BUILD, ROOT, compile_cuda, compiler
from tests.cuda_on_cpu.test_aomoa import CASES, draw, upstream
from tests.kernels.hypert.test_stem import CASES as CASES_OF_STEM
from tests.kernels.hypert.test_stem import stem_args
from tests.kernels.ladder import relative_error
from tests.kernels.reconstruction.test_losses import CASES as LOSSES
from tests.kernels.reconstruction.test_masking import MOVES

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def build() -> None:
    """Compile and load the kernels and the glue."""
    folder = ROOT / "csrc" / "cuda"
    sources = sorted(folder.rglob("*.cu"))
    kernels = compile_cuda(sources, "-O1", "-shared", "-Wl,-soname,spectralx_cuda_on_cpu.so")
    ctypes.CDLL(str(kernels), ctypes.RTLD_GLOBAL)
    target = BUILD / f"glue-{kernels.name.split('-')[-1]}.so"
    stub = ROOT / "tests" / "cuda_on_cpu" / "stub"
    command = [str(compiler()), "-std=c++20", "-O0", "-shared", "-fPIC", "-Wall", "-I", str(stub)]
    command += [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += map(str, sorted(folder.rglob("*_op.cpp")))
    for path in library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    command += ["-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(target)], check=True)
    torch.ops.load_library(target)


def call(name: str, *arguments: Any) -> Any:
    """The kernel registered for CUDA."""
    return getattr(torch.ops.spectralx, name).default.redispatch(CUDA, *arguments)


def compare(name: str, found: list[Tensor], expected: list[Tensor], bound: float) -> bool:
    """Whether all agree in shape, type and value; says where not."""
    passed = len(found) == len(expected)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = relative_error(ours, theirs) if same else float("inf")
        if error > bound:
            print(f"FAILED {name}, tensor {i}: {error}, {ours.shape} {ours.dtype}")
            passed = False
    return passed


def same_strides(name: str, found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all that have values lie in memory alike; says where not."""
    strides = [[t.stride() for t in each if t.numel()] for each in (found, expected)]
    if strides[0] != strides[1]:
        print(f"FAILED {name}: strides {strides[0]}, expected {strides[1]}")
    return strides[0] == strides[1]


def check_layer(case: str, tokens: int | None, needed: list[bool]) -> bool:
    """The whole layer in float64, its first `tokens` tokens; gradients of the arguments needed."""
    w = draw(case, torch.float64)
    out_grad, gates_grad, load_grad = upstream(w)
    if tokens is not None:
        w = w._replace(x=w.x[:tokens], noise=None if w.noise is None else w.noise[:, :tokens])
        out_grad, gates_grad = out_grad[:tokens], gates_grad[:, :tokens]
    outputs = call("aomoa", *w)
    passed = compare(case, list(outputs), list(reference.aomoa_saving(*w)), 1e-12)
    mask = [isinstance(a, Tensor) and n for a, n in zip(w, needed, strict=True)]
    grads = [out_grad, gates_grad, load_grad]
    saved = ops.AOMOA._kept.saved(w, outputs)
    found = call("aomoa_backward", grads, *w, saved, mask)
    expected = ops.AOMOA._backward_kernel(grads, *w, [], mask)
    return compare(f"{case} backward", found, list(expected), 1e-11) and passed


def check_gating() -> bool:
    """noisy_topk_gating in float64."""
    clean, raw_std, noise = torch.randn(3, 2, 11, 5, dtype=torch.float64)
    found = call("noisy_topk_gating", clean, raw_std, noise, 2)
    expected = reference.noisy_topk_gating(clean, raw_std, noise, 2)
    passed = compare("gating", list(found), list(expected), 1e-12)
    grads = [torch.randn_like(found[0]), torch.randn_like(found[1])]
    arguments: tuple[Any, ...] = (grads, clean, raw_std, noise, 2, [], [True, False, True, False])
    results = call("noisy_topk_gating_backward", *arguments)
    expected_grads = ops.GATING._backward_kernel(*arguments)
    return compare("gating backward", results, list(expected_grads), 1e-12) and passed


def check_prediction(reduction: str, with_gradient: bool, batch: int) -> bool:
    """Loss, prediction and counts of upsampled logits in float64, and their gradients."""
    logits = torch.randn(batch, 5, 4, 3, dtype=torch.float64)
    target, weight = torch.randint(0, 5, (batch, 9, 13)).short(), torch.rand(5).double() + 0.1
    confusion = torch.ones(5, 5, dtype=torch.int64)
    code = upsample_reference.REDUCTIONS.index(reduction)
    options = ([9, 13], 0, 0.1, code, False, with_gradient)
    passed = True
    for name, operator, given in (
        ("upsample_cross_entropy", prediction.UPSAMPLE_CROSS_ENTROPY, (weight,)),
        (
            "upsample_cross_entropy_argmax",
            prediction.UPSAMPLE_CROSS_ENTROPY_ARGMAX,
            (weight, confusion),
        ),
    ):
        arguments = (logits, target, *given, *options)
        found, expected = call(name, *arguments), operator._forward_kernel(*arguments)
        passed &= compare(name, list(found), list(expected), 1e-12)
        mask = [i == 0 for i in range(len(arguments))]
        grads = [torch.randn_like(found[0]), None, None][: len(found) - 1]
        found_grads = call(f"{name}_backward", grads, *arguments, [found[-1]], mask)
        expected_grads = operator._backward_kernel(grads, *arguments, [], mask)
        passed &= compare(f"{name} backward", found_grads, list(expected_grads), 1e-11)
    size = ([9, 13], True)
    found = call("upsample_argmax_probability", logits, *size)
    expected = upsample_reference.upsample_argmax_probability(logits, *size)
    passed &= compare("upsample_argmax_probability", list(found), list(expected), 1e-12)
    passed &= torch.equal(call("upsample_argmax", logits, *size), expected[1])
    grads = [torch.randn_like(found[0]), None]
    backward: tuple[Any, ...] = (grads, logits, *size, [], [True, False, False])
    found_grads = call("upsample_argmax_probability_backward", *backward)
    expected_grads = prediction.UPSAMPLE_ARGMAX_PROBABILITY._backward_kernel(*backward)
    passed &= compare("upsample_argmax_probability", found_grads, list(expected_grads), 1e-11)
    counts = (confusion, expected[1], target, 0)
    found = call("confusion_matrix_update", *counts)
    return passed & torch.equal(found, upsample_reference.confusion_matrix_update(*counts))


def check_convolution(
    by_taps: bool, relu: bool, last: bool, kernel: int, batch: int, needed: list[bool]
) -> bool:
    """The convolution of an upsampled map in float64, with bias and addend; its gradients."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, 3, 4, 5, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(6, 3, kernel, kernel, dtype=torch.float64).to(memory_format=layout)
    bias = torch.randn(6, dtype=torch.float64)
    addend = torch.randn(batch, 6, 9, 15, dtype=torch.float64)
    pad = [kernel // 2, kernel // 2 + 1]
    arguments = (x, weight, bias, addend, [9, 13], pad, not last, by_taps, relu)
    name = f"upsample_conv2d taps {by_taps} relu {relu} last {last} kernel {kernel} batch {batch}"
    operator = convolution.UPSAMPLE_CONV2D
    found, expected = call("upsample_conv2d", *arguments), operator._forward_kernel(*arguments)
    passed = compare(name, [found], [expected], 1e-12) and same_strides(name, [found], [expected])
    mask = [*needed, *[False] * 5]
    for grads in ([torch.randn_like(found)], [None]):
        backward = (grads, *arguments, [found] if relu else [], mask)
        found_grads = call("upsample_conv2d_backward", *backward)
        expected_grads = list(operator._backward_kernel(*backward))
        passed &= compare(f"{name} backward", found_grads, expected_grads, 1e-11)
        passed &= same_strides(f"{name} backward", found_grads, expected_grads)
    return passed


def check_attention(images: int, window: tuple[int, int], needed: list[bool]) -> bool:
    """window_attention and attribute_match in float64, and their gradients."""
    kind = torch.float64
    qkv, padding = torch.randn(images, 5, 4, 24, dtype=kind), torch.randn(24, dtype=kind)
    given: dict[str, tuple[Operator, tuple[Any, ...]]] = {
        "window_attention": (attention.WINDOW_ATTENTION, (qkv, padding, 2, [*window])),
        "attribute_match": (
            attention.ATTRIBUTE_MATCH,
            (
                torch.randn(images, 7, 6, dtype=kind), torch.randn(5, 3, dtype=kind),
                torch.randn(6, dtype=kind), torch.randn(6, dtype=kind),
                torch.randn(6, 6, dtype=kind), 1e-5,
            ),
        ),
    }  # fmt: skip
    passed = True
    for name, (operator, arguments) in given.items():
        found, expected = call(name, *arguments), operator._forward_kernel(*arguments)
        passed &= compare(name, [found], [expected], 1e-12)
        mask = [isinstance(a, Tensor) and n for a, n in zip(arguments, needed, strict=False)] + [
            False
        ] * (len(arguments) - len(needed))
        for grads in ([torch.randn_like(found)], [None]):
            backward = (grads, *arguments, [], mask)
            passed &= compare(
                f"{name} backward", call(f"{name}_backward", *backward),
                list(operator._backward_kernel(*backward)), 1e-11,
            )  # fmt: skip
    return passed


def check_operator(operator: Operator, arguments: tuple[Any, ...], needed: list[bool]) -> bool:
    """An operator of one output in float64 and its gradients, with an incoming one and without."""
    name = operator.name
    found, expected = call(name, *arguments), operator._forward_kernel(*arguments)
    passed = compare(name, [found], [expected], 1e-12)
    leaves = [isinstance(a, Tensor) and a.is_floating_point() for a in arguments]
    mask = [leaf and need for leaf, need in zip(leaves, needed, strict=True)]
    for grads in ([torch.randn_like(found)], [None]):
        backward = (grads, *arguments, [], mask)
        found_grads = call(f"{name}_backward", *backward)
        expected_grads = list(operator._backward_kernel(*backward))
        passed &= compare(f"{name} backward", found_grads, expected_grads, 1e-11)
        if grads[0] is not None:
            passed &= same_strides(f"{name} backward", found_grads, expected_grads)
    return passed


def check_gradients(operator: Operator, arguments: tuple[Any, ...]) -> list[bool]:
    """`check_operator` with all gradients needed, then that of each argument alone."""
    count = len(arguments)
    needed = [[True] * count, *([i == only for i in range(count)] for only in range(count))]
    return [check_operator(operator, arguments, each) for each in needed]


def check_refine() -> list[bool]:
    """The Are-adapter's operators."""
    results = []
    for batch in (2, 0):
        queries = torch.randn(batch, 37, 19, dtype=torch.float64)
        keys = torch.randn(batch, 70, 19, dtype=torch.float64)
        found = call("match_argmax", queries, keys, 0.3)
        results.append(torch.equal(found, refine.MATCH._forward_kernel(queries, keys, 0.3)))
        tokens = torch.randn(batch, 5, 24, dtype=torch.float64)[..., 12:]
        match = torch.randint(5, (batch, 33)).int()
        norm = torch.rand(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
        mixing = torch.randn(7, 33, dtype=torch.float64)
        weights = torch.randn(2, batch, 5, dtype=torch.float64).unbind(0)
        scale = torch.randn((), dtype=torch.float64)
        for operator, arguments in (
            (refine.GATHER_NORM, (tokens, match, *norm, 1e-5)),
            (refine.GATHER_NORM_MIX, (tokens, match, *norm, mixing, 1e-5)),
            (refine.ADD_WEIGHTED, (tokens, *weights, scale)),
        ):
            results += check_gradients(operator, arguments)
    return results


def check_reconstruction() -> list[bool]:
    """Masking, moves of tokens and the losses; masks of every type."""
    results = []
    for keep, shape in ((3, (2, 37)), (0, (2, 5)), (2, (0, 4))):
        noise = torch.rand(shape, dtype=torch.float64)
        found = call(masking.RANDOM_MASKING.name, noise, keep)
        expected = reconstruction_reference.random_masking(noise, keep)
        results.append(all(map(torch.equal, found, expected)))
    for operator, arguments in (*MOVES.values(), *LOSSES.values()):
        results += check_gradients(operator, arguments)
    for operator, arguments in LOSSES.values():
        none = tuple(a[:0] if isinstance(a, Tensor) else a for a in arguments)
        results.append(check_operator(operator, none, [True] * len(none)))
    prediction, images, mask, patch, normalize = LOSSES["patch"][1]
    for kind in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float32, torch.bfloat16):
        given = (prediction, images, mask.to(kind), patch, normalize)
        results.append(check_operator(LOSSES["patch"][0], given, [True, True, *[False] * 3]))
    return results


def check_moments(by_taps: bool, last: bool, batch: int) -> bool:
    """The convolution with the moments of its output in float64, and its gradients."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, 3, 4, 5, dtype=torch.float64).to(memory_format=layout)
    weight, bias = torch.randn(6, 3, 3, 3, dtype=torch.float64), torch.randn(6).double()
    addend = torch.randn(batch, 6, 9, 13, dtype=torch.float64)
    arguments = (x, weight, bias, addend, [9, 13], [1, 1], False, by_taps)
    name, operator = f"moments taps {by_taps} last {last}", convolution.UPSAMPLE_CONV2D_MOMENTS
    found, expected = call(operator.name, *arguments), operator._forward_kernel(*arguments)
    passed = compare(name, list(found), list(expected), 1e-12)
    passed &= same_strides(name, list(found), list(expected))
    backward: tuple[Any, ...] = (
        [torch.randn_like(found[0]), None],
        *arguments,
        [],
        [True] * 4 + [False] * 4,
    )
    found_grads = call(f"{operator.name}_backward", *backward)
    return passed & compare(name, found_grads, list(operator._backward_kernel(*backward)), 1e-11)


def check_norm(last: bool, affine: bool, relu: bool, own: bool, needed: list[bool]) -> bool:
    """Batch norm and ReLU in float64, and the gradients needed."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 6, 9, 13, dtype=torch.float64).to(memory_format=layout)
    moments = call("channel_moments", x)
    passed = compare("channel_moments", [moments], [norm.reference.channel_moments(x)], 1e-12)
    moments = moments if own else torch.rand(2, 6).double() + 0.5
    weight, bias = torch.randn(2, 6, dtype=torch.float64) if affine else (None, None)
    arguments = (x, moments, weight, bias, 1e-5, relu, own)
    name, operator = f"norm last {last} affine {affine} relu {relu}", norm.BATCH_NORM_RELU
    found, expected = call(operator.name, *arguments), operator._forward_kernel(*arguments)
    passed &= compare(name, [found], [expected], 1e-12) and same_strides(name, [found], [expected])
    mask = [n and isinstance(a, Tensor) for n, a in zip(needed, arguments, strict=False)]
    mask += [False] * 3
    for grads in ([torch.randn_like(found)], [None]):
        backward: tuple[Any, ...] = (grads, *arguments, [], mask)
        found_grads = call(f"{operator.name}_backward", *backward)
        expected_grads = list(operator._backward_kernel(*backward))
        passed &= compare(f"{name} backward", found_grads, expected_grads, 1e-11)
        passed &= same_strides(f"{name} backward", found_grads, expected_grads)
    return passed


def check_stem(args: list[Any], needed: list[bool]) -> bool:
    """residual_halving in float64 with what it keeps, and the gradients needed."""
    operator = stem.RESIDUAL_HALVING
    found, expected = call(operator.name, *args), operator._forward_kernel(*args)
    passed = compare(operator.name, list(found), list(expected), 1e-12)
    passed &= same_strides(operator.name, [found[0]], [expected[0]])
    mask = [isinstance(a, Tensor) and n for a, n in zip(args, needed, strict=True)]
    for grads in ([torch.randn_like(found[0])], [None]):
        found_grads = call(f"{operator.name}_backward", grads, *args, list(found[1:]), mask)
        backward: tuple[Any, ...] = (grads, *args, [], mask)
        # A bias before batch statistics: round-off in the reference.
        expected_grads = [
            torch.zeros_like(grad) if grad.numel() and grad.abs().max() < 1e-11 else grad
            for grad in operator._backward_kernel(*backward)
        ]
        passed &= compare(f"{operator.name} backward", found_grads, expected_grads, 1e-11)
        passed &= same_strides(f"{operator.name} backward", found_grads, expected_grads)
    return passed


def main() -> int:
    """0 if everything agrees."""
    if compiler() is None:
        print("SKIPPED: no C++ compiler; the CUDA operators were not run")
        return 0
    torch.manual_seed(0)
    build()
    count = len(ops.AOMOA.op._schema.arguments)
    everything = [True] * count
    results = [check_gating()]
    results += [check_layer(case, None, everything) for case in CASES]
    results += [check_layer("odd", tokens, everything) for tokens in (0, 1)]
    for only in range(count - 2):
        results.append(check_layer("odd", None, [i == only for i in range(count)]))
    results += [
        check_prediction(reduction, with_gradient, batch)
        for reduction in upsample_reference.REDUCTIONS
        for with_gradient in (False, True)
        for batch in (2, 0)
    ]
    results += [
        check_convolution(by_taps, relu, last, kernel, batch, everything[:4])
        for by_taps in (False, True)
        for relu in (False, True)
        for last in (False, True)
        for kernel, batch in ((1, 2), (3, 2), (5, 1), (3, 0))
    ]
    for only in range(4):
        needed = [i == only for i in range(4)]
        results += [check_convolution(taps, True, False, 3, 2, needed) for taps in (False, True)]
    results += [
        check_attention(images, window, [True] * 5)
        for images, window in ((2, (3, 3)), (1, (5, 2)), (0, (3, 3)))
    ]
    results += [check_attention(2, (3, 3), [i == only for i in range(5)]) for only in range(5)]
    for args in CASES_OF_STEM.values():
        results.append(check_stem(args, [True] * 13))
        results += [check_stem(args, [i == only for i in range(13)]) for only in range(11)]
    results.append(check_stem(stem_args(batch=0), [True] * 13))
    results += check_refine() + check_reconstruction()
    results += [
        check_moments(by_taps, last, batch)
        for by_taps in (False, True)
        for last in (False, True)
        for batch in (2, 0)
    ]
    results += [
        check_norm(last, affine, relu, own, [True, False, True, True])
        for last in (False, True)
        for affine in (False, True)
        for relu in (False, True)
        for own in (False, True)
    ]
    for only in (0, 2, 3):
        results.append(check_norm(True, True, True, True, [i == only for i in range(4)]))
    print(f"{sum(results)} of {len(results)} checks of the CUDA operators passed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
