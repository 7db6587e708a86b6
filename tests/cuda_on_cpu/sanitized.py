"""The tests of the CUDA kernels under AddressSanitizer, with vector loads' alignment checked.

``python -m tests.cuda_on_cpu.sanitized [pytest arguments]``. Buffers have no guards of their own
then: the sanitizer's stand around them. Takes some minutes, and so is not one of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cuda_on_cpu.build import compiler


def main(arguments: list[str]) -> int:
    """The status of pytest, run with the sanitizer's library before all others."""
    cxx = compiler()
    if cxx is None:
        print("SKIPPED: no C++ compiler; the CUDA kernels were not run")
        return 0
    shown = [cxx, "-print-file-name=libasan.so"]
    library = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()
    environment = {
        **os.environ,
        "SPECTRALX_SANITIZE": "1",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    folder = Path(__file__).parent
    tests = [str(path) for path in sorted(folder.glob("test_*.py")) if path.stem != "test_shim"]
    command = [sys.executable, "-m", "pytest", "-q", *(arguments or tests)]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
