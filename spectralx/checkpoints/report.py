"""What loading did, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spectralx.checkpoints.errors import some


@dataclass(frozen=True)
class Loaded:
    """What started from other weights; a backbone's tensors under their public names.

    Attributes
    ----------
    where : what they came from.
    source : what kind of weights these are.
    sha256 : of the file; None for tensors in memory.
    loaded : tensors of the model that were copied as they are.
    adapted : tensors of the model that were made of the file's, and how.
    left_out : tensors of the file without a place in the model, and why.
    missing : tensors of the model that kept their start, and why.
    """

    where: str
    source: str
    sha256: str | None
    loaded: list[str]
    adapted: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line: counts, and the first names of each kind."""
        text = f"{len(self.loaded)} tensors from {self.where} ({self.source})"
        for what, names in (
            ("adapted", self.adapted),
            ("left out", self.left_out),
            ("kept", self.missing),
        ):
            if names:
                listed = some(f"{name} ({why})" for name, why in names.items())
                text += f"; {len(names)} {what}: {listed}"
        return text

    def table(self) -> str:
        """Every name on a line of its own, under what became of it."""
        lines = [f"{self.where}: {self.source}, sha256 {self.sha256 or 'unknown'}"]
        lines += ["loaded:", *(f"  {name}" for name in self.loaded)]
        for what, names in (
            ("adapted:", self.adapted),
            ("left out:", self.left_out),
            ("missing (as they were):", self.missing),
        ):
            lines += [what, *(f"  {name}: {why}" for name, why in names.items())]
        return "\n".join(lines)
