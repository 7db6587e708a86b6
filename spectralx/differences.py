"""Where two sets of settings differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """The first key in which two nested dictionaries differ, and its value in each."""

    key: str
    one: Any
    other: Any


def first_difference(one: Any, other: Any, *, ignoring: Sequence[str] = ()) -> Difference | None:
    """The first difference of two nested dictionaries; None where they agree.

    Parameters
    ----------
    one, other : as YAML and JSON hold them.
    ignoring : dotted keys that may differ, with everything below them.
    """
    return _search(one, other, "", frozenset(ignoring))


def _search(one: Any, other: Any, path: str, ignored: frozenset[str]) -> Difference | None:
    if path in ignored:
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            name = f"{path}.{key}" if path else key
            found = _search(one.get(key), other.get(key), name, ignored)
            if found is not None:
                return found
        return None
    return None if one == other else Difference(path, one, other)
