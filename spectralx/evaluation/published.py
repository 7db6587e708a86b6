"""Figures that others have published for the tasks, to stand beside one's own.

All are mIoU in percent from Zhang et al., "SpectralX: Parameter-efficient Domain Generalization for
Spectral Remote Sensing Foundation Models" (arXiv 2508.01731; ISPRS Journal 239, 2026), for a
ScaleMAE ViT-L, scored by the rules of ``--protocol official``. What is not listed is not known
here; nothing is inferred. Numbers of tables and pages are not given because the figures were
transcribed from a summary of the paper, not from its pages.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Zhang et al., arXiv 2508.01731, ScaleMAE ViT-L"


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes
    ----------
    method : as the paper names it.
    miou : percent, on all target domains together, or on the test split of a task without a gap.
    """

    method: str
    miou: float


FIGURES: dict[str, tuple[Published, ...]] = {
    "WS-WD": (Published("SpectralX", 15.6),),
    "WD-WS": (Published("SpectralX", 14.9),),
    "spring": (Published("SpectralX", 13.9),),
    "summer": (Published("SpectralX", 14.6),),
    "autumn": (Published("SpectralX", 32.3),),
    "winter": (Published("SpectralX", 28.6),),
    "north-south": (Published("ScaleMAE", 25.7),),
    "south-north": (Published("ScaleMAE", 23.0),),
    "whu-ohs": (
        Published("SpectralX", 59.7),
        Published("LoRA", 52.1),
        Published("full fine-tuning", 53.4),
    ),
    "dfc2020": (
        Published("SpectralX", 66.7),
        Published("LoRA", 64.2),
        Published("full fine-tuning", 61.9),
    ),
    "mts12": (Published("ScaleMAE", 35.9),),
}


def published(task: str) -> str:
    """``SpectralX 15.6`` for the figures of `task`, ``-`` where none is known."""
    found = FIGURES.get(task, ())
    return ", ".join(f"{figure.method} {figure.miou:.1f}" for figure in found) or "-"
