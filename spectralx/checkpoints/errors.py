"""The error of every reader and writer of checkpoints, and the words they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file, what was found and what is expected."""


def some(names: Iterable[str], count: int = 3) -> str:
    """The first names, and dots for the rest."""
    listed = list(names)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")


def check_names(
    where: str,
    found: Mapping[str, tuple[int, ...] | None],
    expected: Mapping[str, tuple[int, ...] | None],
) -> None:
    """Raise one line for all differences between the names (and shapes) found and expected."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    wrong = [
        f"{name} (got {found[name]}, expected {shape})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} tensors {what}: {some(names)}"
        for what, names in (
            ("of another shape", wrong),
            ("missing", missing),
            ("not expected", surplus),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems))
