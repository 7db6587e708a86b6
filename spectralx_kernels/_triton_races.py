"""Whether a compiled Triton kernel copies into shared memory that a product in flight still reads.

On Hopper a product (wgmma) runs while the loop goes on, and so do the copies of later iterations
into a ring of buffers. Triton (3.6 and 3.9) makes the ring one buffer too short for an operand that
is read into registers as well, so that the copy behind the product may overwrite what it reads. The
remedy is in the kernel: an operand of a product in a loop is loaded for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_VALUE = r"%[\w-]+"
_ALLOCATED = re.compile(rf"({_VALUE}) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_INDEXED = re.compile(rf"({_VALUE}) = ttg\.memdesc_index ({_VALUE})\[")
_VIEWED = re.compile(rf"({_VALUE}) = ttg\.memdesc_\w+ ({_VALUE})[ {{:]")
_COPIED = re.compile(rf"ttg\.async_copy_global_to_local {_VALUE}, ({_VALUE})")
_PRODUCT = re.compile(rf"ttng\.warp_group_dot ({_VALUE}), ({_VALUE}), .*isAsync = true")
_WAITED = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")


class _Step(NamedTuple):
    """Of a loop's body: a copy into a ring, a product that reads rings, or a wait."""

    kind: str
    rings: tuple[str, ...] = ()
    pending: int = 0


def _steps(lines: list[str], ring_of: dict[str, str]) -> Iterator[_Step]:
    for line in lines:
        if found := _COPIED.search(line):
            yield _Step("copy", (ring_of.get(found[1], ""),))
        elif found := _PRODUCT.search(line):
            yield _Step("product", tuple(ring_of[v] for v in found.groups() if v in ring_of))
        elif found := _WAITED.search(line):
            yield _Step("wait", pending=int(found[1]))


def _loops(lines: list[str]) -> Iterator[tuple[int, int]]:
    """First and last line of each innermost loop."""
    opened: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        indent = line[: len(line) - len(line.lstrip())]
        if "scf.for" in line or "scf.while" in line:
            opened.append((number, indent))
        elif opened and line.startswith(f"{opened[-1][1]}}}"):
            first, _ = opened.pop()
            if not any("scf.for" in inner for inner in lines[first + 1 : number]):
                yield first, number


def race(ttgir: str) -> str:
    """One line about the first such buffer in Triton's GPU dialect; nothing where there is none.

    The ring's slots are those that Triton gives: iteration i of a loop reads slot i of an operand
    and copies slot i + d, d being the copies before the loop, both modulo the ring's length.
    """
    lines = ttgir.splitlines()
    length: dict[str, int] = {}
    ring_of: dict[str, str] = {}
    for line in lines:
        if found := _ALLOCATED.search(line):
            length[found[1]] = int(found[2])
        elif (found := _INDEXED.search(line)) and found[2] in length:
            ring_of[found[1]] = found[2]
        elif (found := _VIEWED.search(line)) and found[2] in ring_of:
            ring_of[found[1]] = ring_of[found[2]]
    for first, last in _loops(lines):
        steps = list(_steps(lines[first:last], ring_of))
        if not any(step.kind == "product" for step in steps):
            continue
        start = max([number for number in range(first) if "scf.for" in lines[number]], default=0)
        before = _steps(lines[start:first], ring_of)
        ahead = [step.rings[0] for step in before if step.kind == "copy"]
        for ring in _overwritten(steps, ahead, length):
            return f"copies into {ring}, a ring of {length[ring]}, while a product reads it"
    return ""


def _overwritten(steps: list[_Step], ahead: list[str], length: dict[str, int]) -> Iterator[str]:
    """Rings a slot of which is copied into while a product in flight reads it."""
    in_flight: list[set[tuple[str, int]]] = []
    for iteration in range(2 * max(length.values(), default=0)):
        for step in steps:
            if step.kind == "product":
                in_flight.append({(ring, iteration % length[ring]) for ring in step.rings})
            elif step.kind == "wait":
                in_flight = in_flight[-step.pending :] if step.pending else []
            elif step.rings[0]:
                ring = step.rings[0]
                slot = ring, (iteration + ahead.count(ring)) % length[ring]
                if any(slot in read for read in in_flight):
                    yield ring
