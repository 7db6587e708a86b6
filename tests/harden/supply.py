"""Row 17: what is installed is pinned and hashed, and nothing is loaded in a way that runs code.

`requirements/cpu.txt` locks every package of a CPU environment by version and SHA-256 (the command
at its top writes it). Advisories are held against `requirements/advisories.txt`, which lists what
was known on its date: without a network no list is newer than its own.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.harden.record import ROOT, Outcome

LOCK = ROOT / "requirements" / "cpu.txt"
ADVISORIES = ROOT / "requirements" / "advisories.txt"
SOURCES = ("spectralx", "spectralx_kernels", "benchmarks", "examples", "setup.py")

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+) *\\?$")
_HASH = re.compile(r"^ +--hash=sha256:[0-9a-f]{64} *\\?$")

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

# Files that may use what is forbidden elsewhere, and why.
ALLOWED: dict[tuple[str, str], str] = {
    ("spectralx/checkpoints/pickles.py", "pickle"): "its Unpickler calls nothing that a file names",
}


def pins(path: Path = LOCK) -> dict[str, tuple[str, int]]:
    """Name -> (version, number of hashes). Raises ValueError for a line of another form."""
    found: dict[str, tuple[str, int]] = {}
    name = ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith(("#", "--extra-index-url ")):
            continue
        if pin := _PIN.match(line):
            name = pin[1].lower().replace("_", "-")
            found[name] = (pin[2], 0)
        elif _HASH.match(line) and name:
            version, hashes = found[name]
            found[name] = (version, hashes + 1)
        else:
            raise ValueError(f"{path}:{number}: got {line!r}, expected a pin or a hash")
    return found


def without_hash(path: Path) -> list[str]:
    """Pins of a lock without a hash."""
    return [f"{name}: no hash" for name, (_, hashes) in pins(path).items() if not hashes]


def lock_failures() -> list[str]:
    """Pins without a hash, and dependencies of the package without a pin that fits."""
    found, failures = pins(), without_hash(LOCK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(each for extra in ("train", "test", "dev") for each in extras[extra]),
    ]
    for requirement in wanted:
        matched = re.match(r"([A-Za-z0-9._-]+)(?:\[.*?\])?([^;]*)", requirement)
        assert matched is not None
        name, specifier = matched[1].lower().replace("_", "-"), SpecifierSet(matched[2])
        if name not in found:
            failures.append(f"{name}: in pyproject.toml, not in {LOCK.name}")
        elif not specifier.contains(found[name][0]):
            failures.append(f"{name}: {found[name][0]} locked, {specifier} in pyproject.toml")
    return failures


def advisories() -> Iterator[tuple[str, SpecifierSet, str]]:
    """Package, versions and name of each advisory listed."""
    for line in ADVISORIES.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            package, versions, name = line.split(maxsplit=2)
            yield package, SpecifierSet(versions), name


def advisory_failures() -> list[str]:
    found = pins()
    return [
        f"{package} {found[package][0]}: {name}"
        for package, versions, name in advisories()
        if package in found and versions.contains(Version(found[package][0]), prereleases=True)
    ]


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or an attribute; "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _keyword(call: ast.Call, name: str) -> object:
    values = [each.value for each in call.keywords if each.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def unsafe_uses(text: str) -> list[tuple[int, str]]:
    """(line, what) of every way to load that may run code."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [each.name for each in node.names]
            module = getattr(node, "module", None)
            roots = {(module or name).split(".")[0] for name in names}
            bad = roots & {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
                "shelve",
            }
            found += [(node.lineno, name) for name in sorted(bad)]
            if module in ("torch", "yaml", "builtins") and set(names) & {"load", "eval", "exec"}:
                found.append((node.lineno, f"{module}.load by a name of its own"))
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        last = name.rsplit(".", 1)[-1]
        if name in ("eval", "exec", "compile", "__import__"):
            found.append((node.lineno, name))
        elif name == "torch.load" and _keyword(node, "weights_only") is not True:
            found.append((node.lineno, "torch.load without weights_only=True"))
        elif name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            found.append((node.lineno, name))
        elif last == "load" and _keyword(node, "allow_pickle") is True:
            found.append((node.lineno, "allow_pickle=True"))
        elif name in ("os.system", "os.popen") or _keyword(node, "shell") is True:
            found.append((node.lineno, f"{name} through a shell"))
    return found


def source_failures(sources: Sequence[str] = SOURCES) -> list[str]:
    """Unsafe uses in the package's own files, but for those allowed by name."""
    failures = []
    for source in sources:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            relative = file.relative_to(ROOT).as_posix()
            failures += [
                f"{relative}:{line}: {what}"
                for line, what in unsafe_uses(file.read_text())
                if (relative, what) not in ALLOWED
            ]
    return failures


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome(
        figures={"packages locked": len(pins()), "advisories held against": len([*advisories()])},
        exceptions=[f"{file}: {what}: {why}" for (file, what), why in ALLOWED.items()],
    )
    for _ in numbers:
        outcome.failures += [*lock_failures(), *advisory_failures(), *source_failures()]
        outcome.checked += 1
    return outcome
