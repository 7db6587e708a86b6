"""Argument structures of csrc/cuda/*/kernels.h, read from their declarations."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def structure(header: Path, name: str) -> type[ctypes.Structure]:
    """The C struct `name` as `header` declares it: int64_t, double and pointers."""
    body = header.read_text().split(f"struct {name} {{")[1].split("};")[0]
    fields: list[tuple[str, type]] = []
    for declaration in re.sub(r"//.*", "", body).split(";")[:-1]:
        pointer = "*" in declaration
        kind = ctypes.c_double if "double" in declaration else ctypes.c_int64
        names = re.sub(r"\b(const|void|int64_t|double)\b|\*", "", declaration).split(",")
        fields += [(each.strip(), ctypes.c_void_p if pointer else kind) for each in names]
    return type(name, (ctypes.Structure,), {"_fields_": fields})
