"""Row 16: planted faults that the tests must catch, listed in ``mutations.toml``.

Each is put into a copy of the tree, where tests of ``make test`` then run; without it they must
pass. A fault in a .cpp file is compiled alone into a library whose kernels take the place of the
extension module's (`planted`). Caught: a test fails or the process dies. A module that cannot be
imported any more is no fault of this kind and counts as not caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from tests.harden.record import ROOT, Outcome

LIST = Path(__file__).with_name("mutations.toml")
PASSED, FAILED, NOTHING_SELECTED = 0, 1, 5
LIBRARY = "SPECTRALX_PLANTED"  # what `planted` loads
SECONDS = 300  # after which a run of tests is taken for stuck


def faults() -> list[dict[str, Any]]:
    """Name, file, old, new and tests of each."""
    found: list[dict[str, Any]] = tomllib.loads(LIST.read_text())["fault"]
    return found


def planted_in(text: str, fault: Mapping[str, Any]) -> str:
    """The file's text with the fault; a ValueError where its place is not there once."""
    if text.count(fault["old"]) != 1:
        raise ValueError(
            f"{fault['file']}: {text.count(fault['old'])} places {fault['old']!r}, expected one"
        )
    return text.replace(fault["old"], fault["new"])


def copy_tree(folder: Path, *, extension: bool = True) -> Path:
    """The tracked and new files of the tree, and its extension module, in `folder`.

    Files that are there with the same bytes are left alone.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    if extension:
        names += [str(path.relative_to(ROOT)) for path in extension_files()]
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copyfile(ROOT / name, target)
    return folder


def extension_files() -> list[Path]:
    return sorted((ROOT / "spectralx_kernels").glob("_C*.so"))


def compiled(tree: Path, file: str, *flags: str) -> Path:
    """A library of the kernels of one .cpp file, linked to the extension module of the tree."""
    extension = next((tree / "spectralx_kernels").glob("_C*.so"))
    library = tree / "planted.so"
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], tree / "csrc"]
    command = [
        os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-fopenmp", "-w",
        *flags, "-Wl,--no-as-needed", *(f"-L{path}" for path in cpp_extension.library_paths()),
        "-lc10", "-ltorch_cpu",
        *(f"-I{path}" for path in includes), str(tree / file), str(extension), "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return library


def run_tests(tree: Path, tests: Sequence[str], library: Path | None = None) -> int:
    """Exit status of pytest in `tree`; that of a killed process where it takes too long."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    plugin: list[str] = []
    if library is not None:
        environment[LIBRARY] = str(library)
        plugin = ["-p", "tests.harden.planted"]
    command = [
        sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-q", *plugin, "--no-header", *tests,
    ]  # fmt: skip
    try:
        run = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return -9
    return run.returncode


def failure_of(number: int, tree: Path) -> str | None:
    """Why a fault was not caught; None where it was."""
    fault = faults()[number]
    where = f"sample {number}: {fault['name']}"
    status = run_tests(tree, fault["tests"])
    if status != PASSED:
        return f"{where}: its tests end with {status} without it"
    path = tree / fault["file"]
    sound = path.read_text()
    path.write_text(planted_in(sound, fault))
    try:
        library = compiled(tree, fault["file"]) if path.suffix == ".cpp" else None
        status = run_tests(tree, fault["tests"], library)
    finally:
        path.write_text(sound)
    return None if status == FAILED or status < 0 else f"{where}: not caught, status {status}"


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome(figures={"caught": 0})
    with tempfile.TemporaryDirectory() as name:
        tree = copy_tree(Path(name))
        for number in numbers:
            failure = failure_of(number, tree)
            outcome.failures += [failure] if failure else []
            outcome.figures["caught"] += failure is None
            outcome.checked += 1
    return outcome
