"""Methods compared on one task with the same budget: what ``python -m spectralx.compare`` runs."""
