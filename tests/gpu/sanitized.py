"""A reduced run of every GPU kernel, to be watched by compute-sanitizer.

``compute-sanitizer --tool memcheck python -m tests.gpu.sanitized`` runs AoMoA and its gating,
forward and backward, on every backend of CUDA but the reference: sizes that fill no tile, that
fill several, no tokens, one token, experts without tokens. Results are only looked at for NaN.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.aomoa.ops import AOMOA, GATING
from tests.kernels.aomoa import test_aomoa
from tests.kernels.aomoa.by_name import gating_arguments
from tests.kernels.ladder import cast, run_with_gradients

DTYPES = (torch.float32, torch.bfloat16)
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


def main() -> int:
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU: nothing was run")
        return 2
    runs = 0
    for operator, sets in ((AOMOA, AOMOA_ARGUMENTS), (GATING, GATING_ARGUMENTS)):
        for backend in _backends.available(operator.name, "cuda")[:-1]:
            for args in sets:
                there = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
                for dtype in DTYPES:
                    outputs, grads = run_with_gradients(
                        lambda *values, operator=operator, backend=backend: operator(
                            *values, backend=backend
                        ),
                        cast(there, dtype, grad=True),
                    )
                    torch.cuda.synchronize()
                    for value in (*outputs, *grads.values()):
                        if not value.isfinite().all():
                            print(f"{operator.name} on {backend}, {dtype}: not finite")
                            return 1
                    runs += 1
    print(f"{runs} runs")
    return 0 if runs else 1


if __name__ == "__main__":
    sys.exit(main())
