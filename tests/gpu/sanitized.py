"""A reduced run of every GPU kernel, to be watched by compute-sanitizer.

``compute-sanitizer --tool memcheck python -m tests.gpu.sanitized`` runs AoMoA, its gating, and
convolution and loss of upsampled maps, forward and backward, on every backend of CUDA but the
reference: sizes that fill no tile, that fill several, none, one token, experts without tokens.
Results are only looked at for NaN.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.aomoa.ops import AOMOA, GATING
from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D
from spectralx_kernels.upsample.prediction import UPSAMPLE_CROSS_ENTROPY_ARGMAX
from tests.gpu import test_upsample
from tests.kernels.aomoa import test_aomoa
from tests.kernels.aomoa.by_name import gating_arguments
from tests.kernels.ladder import cast, run_with_gradients
from tests.kernels.upsample import test_cross_entropy_argmax

DTYPES = (torch.float32, torch.bfloat16)
WEIGHT = 2  # class weights, which only the reference differentiates on a GPU
AOMOA_ARGUMENTS = [
    test_aomoa.arguments(),
    test_aomoa.arguments(tokens=70, width=66, out=50, rank=19, hidden=5, experts=7, top_k=3),
    test_aomoa.arguments(tokens=65, width=64, out=64, rank=32, hidden=16, noisy=False, bias=False),
    test_aomoa.arguments(tokens=0),
    test_aomoa.arguments(tokens=1, experts=1, top_k=1),
]
GATING_ARGUMENTS = [
    gating_arguments(tokens=300),
    gating_arguments(tokens=300, experts=9, top_k=9, noisy=False),
    gating_arguments(tokens=0),
]
CONVOLUTION_ARGUMENTS = [
    test_upsample.convolution(size, by_taps=True, relu=last, last=last)
    for size in ("odd", "3 x 5, down", "no images")
    for last in (False, True)
]
LOSS_ARGUMENTS = [
    test_cross_entropy_argmax.arguments(size, batch=1)
    for size in ("narrow", "up and down", "one row", "many classes")
]
SETS = (
    (AOMOA, AOMOA_ARGUMENTS, ()),
    (GATING, GATING_ARGUMENTS, ()),
    (UPSAMPLE_CONV2D, CONVOLUTION_ARGUMENTS, ()),
    (UPSAMPLE_CROSS_ENTROPY_ARGMAX, LOSS_ARGUMENTS, (WEIGHT,)),
)


def main() -> int:
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU: nothing was run")
        return 2
    runs = 0
    for operator, sets, constants in SETS:
        for backend in _backends.available(operator.name, "cuda")[:-1]:
            for args in sets:
                there = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
                for dtype in DTYPES:
                    outputs, grads = run_with_gradients(
                        lambda *values, operator=operator, backend=backend: operator(
                            *values, backend=backend
                        ),
                        cast(there, dtype, grad=True, constants=constants),
                    )
                    torch.cuda.synchronize()
                    for value in (*outputs, *grads.values()):
                        if value.is_floating_point() and not value.isfinite().all():
                            print(f"{operator.name} on {backend}, {dtype}: not finite")
                            return 1
                    runs += 1
    print(f"{runs} runs")
    return 0 if runs else 1


if __name__ == "__main__":
    sys.exit(main())
