"""Row 11: the C++ of the CPU under AddressSanitizer and UndefinedBehaviorSanitizer.

A copy of the tree in ``build/sanitized`` is built without optimisation and with both; what is built
stays, so that a run that was cut short goes on. There samples of rows 1, 4 and 5 run with ASan's
run time loaded first. Before that a kernel that writes past its output and one that overflows an
integer must each be caught.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.harden.mutations import compiled, copy_tree, extension_files, planted_in
from tests.harden.record import ROOT, Outcome

FOLDER = ROOT / "build" / "sanitized"
FLAGS = (
    "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)  # fmt: skip
ROWS = ("contract", "routing", "refusals")
# What is put into a sound kernel, the call that reaches it, and what the sanitizer says.
PLANTED = (
    {
        "file": "csrc/cpu/reconstruction/masking.cpp",
        "old": "std::memcpy(to + i * row, source + (i / kept * length + id[i]) * row, row);",
        "new": "std::memcpy(to + (i + 1) * row, source + (i / kept * length + id[i]) * row, row);",
        "says": "heap-buffer-overflow",
    },
    {
        "file": "csrc/cpu/reconstruction/masking.cpp",
        "old": "const size_t row = static_cast<size_t>(width) * from.element_size();\n"
        "  const char* source = static_cast<const char*>(from.const_data_ptr());\n"
        "  char* to = static_cast<char*>(out.mutable_data_ptr());\n"
        "  const int64_t* id = index.const_data_ptr<int64_t>();\n  const int64_t kept",
        "new": "const size_t row = static_cast<size_t>(width) * from.element_size();\n"
        "  const char* source = static_cast<const char*>(from.const_data_ptr());\n"
        "  char* to = static_cast<char*>(out.mutable_data_ptr());\n"
        "  const int64_t* id = index.const_data_ptr<int64_t>();\n"
        "  volatile int planted = 2147483647; planted = planted + 1;\n  const int64_t kept",
        "says": "signed integer overflow",
    },
)
CALL = (
    "import torch, spectralx_kernels as k; torch.ops.load_library({library!r}); "
    "k.gather_tokens(torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))"
)
SAMPLES = (
    "import importlib, json, sys, warnings; warnings.simplefilter('ignore'); "
    "module = importlib.import_module('tests.harden.' + sys.argv[1]); "
    "found = module.run(range(int(sys.argv[2]), int(sys.argv[3]))); "
    "print(json.dumps([found.checked, found.failures]))"
)


def runtime() -> str:
    """The compiler's ASan run time, and libstdc++, whose `throw` it looks up when it starts."""
    compiler = os.environ.get("CXX", "c++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return " ".join(found)


def python(tree: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process on `tree` with ASan's run time in it."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=tree, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def report(run: subprocess.CompletedProcess[str]) -> str:
    """What a sanitizer said, or the last line."""
    lines = run.stderr.splitlines()
    said = [line for line in lines if "AddressSanitizer:" in line or "runtime error:" in line]
    return " ".join(said[:1] or lines[-1:])[:300]


def planted_failures() -> list[str]:
    """Planted faults that a sanitizer does not catch, in the ordinary build."""
    tree = copy_tree(ROOT / "build" / "planted")
    failures = []
    for fault in PLANTED:
        path = tree / fault["file"]
        sound = path.read_text()
        path.write_text(planted_in(sound, fault))
        try:
            library = compiled(tree, fault["file"], *FLAGS)
        finally:
            path.write_text(sound)
        run = python(tree, CALL.format(library=str(library)))
        if run.returncode == 0 or fault["says"] not in run.stderr:
            failures.append(f"planted: {fault['says']} is not caught: {report(run)}")
    return failures


def build() -> Path:
    """The tree with a sanitized extension module; only what changed is compiled anew."""
    tree = copy_tree(FOLDER, extension=False)
    environment = {
        **os.environ,
        "DEBUG": "1",
        "USE_CUDA": "0",
        "CFLAGS": " ".join((*FLAGS, "-w")),
        "LDFLAGS": " ".join(FLAGS),
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return tree


def run(numbers: Iterable[int]) -> Outcome:
    """Samples of these numbers of each row."""
    chosen = list(numbers)
    outcome = Outcome(figures={"planted faults caught": 0, "by row": {}})
    missed = planted_failures()
    outcome.failures += missed
    outcome.figures["planted faults caught"] = len(PLANTED) - len(missed)
    tree = build()
    assert extension_files()
    for row in ROWS:
        found = python(tree, SAMPLES, row, str(chosen[0]), str(chosen[-1] + 1))
        if found.returncode:
            outcome.failures.append(f"{row}: status {found.returncode}: {report(found)}")
            continue
        checked, failures = json.loads(found.stdout.splitlines()[-1])
        outcome.figures["by row"][row] = checked
        outcome.failures += [f"{row}: {failure}" for failure in failures]
    outcome.checked = len(chosen)
    return outcome
