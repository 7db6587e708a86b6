"""Synthetic scenes in the layouts of the real data sets.

``python -m spectralx.data.scenes --layout whu-ohs --out DIR`` writes GeoTIFF files that the readers
of :mod:`spectralx.data` take for WHU-OHS (or DFC2020, or MTS12): same folders, names, bands, units
and raw label values. From the ground up:

- `spectra`: reflectance of materials over wavelength (leaves, soils, waters, roofs, ...);
- `landscape`: maps of land covers, where shape and neighbourhood tell what a spectrum cannot
  (rivers and lakes, towns and villages, orchards and woods share their materials);
- `domains`: what differs between regions and dates (phenology, soils, class balance, sun, haze,
  sensor);
- `render`: mixtures of materials, relief, blur, atmosphere and sensor to digital numbers;
- `layouts`: which domains make up each data set, and how its files are named.
"""

from .layouts import LAYOUTS
from .write import write_scenes

__all__ = ["LAYOUTS", "write_scenes"]
