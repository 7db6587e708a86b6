"""The gate and `inspect` see what they are there to see. In processes without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", ["spectralx_kernels.inspect", "tests.compile_gates.triton_gate"])
def test_refuses_to_run_interpreted(module: str) -> None:
    done = run("-m", module, interpret=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "TRITON_INTERPRET: set, expected unset: the interpreter compiles nothing"
    )


def test_names_an_operator_without_kernels() -> None:
    done = run("-m", "spectralx_kernels.inspect", "--op", "balance")
    assert done.returncode == 2
    assert "op: got 'balance', expected one of" in done.stderr.splitlines()[-1]


def test_a_spill_and_too_much_shared_memory_are_seen() -> None:
    code = (
        "from spectralx_kernels import inspect\n"
        "given = next(c for c in inspect.compilations(['aomoa'])\n"
        "             if c.kernel.__name__ == 'down_norm' and c.shape == 'fc1')\n"
        "print(inspect.line(given, 80)[1])\n"
        "print(inspect.line(given._replace(options={'num_warps': 1, 'num_stages': 1}), 80)[1])\n"
        "print(inspect.line(given._replace(options={'num_warps': 8, 'num_stages': 9}), 80)[1])\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    right, spilled, large = done.stdout.split("\n")[:3]
    assert right == ""
    assert spilled.startswith("spills ")
    assert large.startswith("takes ")


def test_a_copy_over_what_a_product_reads_is_seen() -> None:
    code = (
        "import torch\n"
        "from spectralx_kernels import inspect\n"
        "from spectralx_kernels._triton import Compilation\n"
        "from tests.compile_gates.racing import product_and_sums\n"
        "half = torch.empty(1, dtype=torch.bfloat16, device='meta')\n"
        "given = {'x': half, 'weight': half, 'out': half.float(), 'sums': half.float()}\n"
        "for apart in (False, True):\n"
        "    arguments = {**given, 'width': 256, 'APART': apart}\n"
        "    options = {'num_warps': 4, 'num_stages': 3}\n"
        "    print(inspect.line(Compilation(product_and_sums, arguments, options), 90)[1])\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    together, apart = done.stdout.split("\n")[:2]
    assert "while a product reads it" in together
    assert apart == ""
