"""The domains of the synthetic data sets: where, when and by which instrument they are seen."""

from __future__ import annotations

from dataclasses import replace

from spectralx.data import dfc2020, mts12, whu_ohs

from .domains import Acquisition, Domain, Region, Season, Sensor
from .spectra import Leaves, Roofs, Soil, Water

# --- WHU-OHS: three regions of China, one hyperspectral push-broom instrument -------------------

_OHS = Sensor(whu_ohs.WAVELENGTHS, stripes=0.006)

_NORTH_PLAIN = Region(
    seasons={
        "tree": Season(105, 300),
        "crop": Season(75, 250, least=0.10),
        "paddy": Season(175, 275),
        "grass": Season(100, 280, least=0.15),
        "marsh": Season(115, 285),
    },
    zones={"paddies": 1.2, "farmland": 1.6, "orchards": 1.0, "woods": 1.0, "meadows": 1.0,
           "scrub": 1.0, "barrens": 0.8, "sands": 0.3, "town": 1.5},
    soil=Soil(brightness=0.36, iron=0.25, clay=0.3, moisture=0.1),
    river=Water(sediment=0.9, algae=0.1),
    lake=Water(sediment=0.5, algae=0.4),
    roofs=Roofs(concrete=0.28, asphalt=0.11, redness=0.25),
    rivers=0.7, lakes=0.7, relief=0.6, epsg=32650,
)  # fmt: skip
_SOUTH_HILLS = Region(
    seasons={
        "tree": Season(60, 345, least=0.55),
        "crop": Season(95, 265, least=0.08),
        "paddy": Season(120, 265),
        "grass": Season(80, 330, least=0.25),
        "marsh": Season(90, 310, least=0.3),
    },
    zones={"paddies": 1.8, "farmland": 0.9, "orchards": 1.2, "woods": 1.6, "meadows": 0.8,
           "scrub": 1.2, "barrens": 0.8, "salt": 0.1, "town": 1.2},
    soil=Soil(brightness=0.24, iron=1.3, clay=0.9, moisture=0.45),
    tree=Leaves(chlorophyll=1.5, plateau=0.38, water=1.3),
    crop=Leaves(chlorophyll=0.8, plateau=0.44, water=0.9),
    grass=Leaves(chlorophyll=0.9, plateau=0.34, water=0.9),
    river=Water(sediment=0.3, algae=0.3),
    lake=Water(sediment=0.15, algae=0.9),
    roofs=Roofs(concrete=0.23, asphalt=0.08, redness=0.8),
    rivers=0.7, lakes=0.7, relief=1.0, epsg=32649,
)  # fmt: skip
_STEPPE = Region(
    seasons={
        "tree": Season(125, 275),
        "crop": Season(120, 255),
        "paddy": Season(165, 260),
        "grass": Season(125, 235, least=0.08),
        "marsh": Season(130, 270),
    },
    zones={"farmland": 1.2, "woods": 0.4, "meadows": 1.2, "scrub": 1.0, "barrens": 1.4,
           "sands": 0.8, "salt": 0.6, "marsh": 0.4, "town": 0.6, "works": 0.5},
    soil=Soil(brightness=0.42, iron=0.45, clay=0.2, moisture=0.05),
    roofs=Roofs(concrete=0.32, asphalt=0.12, redness=0.4),
    rivers=0.3, lakes=0.4, relief=0.8, epsg=32644,
)  # fmt: skip

WHU_OHS = {
    "S": Domain(_NORTH_PLAIN, _OHS, (Acquisition(155, 65, 140, haze=0.10, noise=0.005),)),
    "T": Domain(
        _SOUTH_HILLS,
        _OHS,
        (Acquisition(300, 46, 160, haze=0.25, gain=-0.06, tilt=0.25, noise=0.005),),
    ),
    "O": Domain(_STEPPE, _OHS, (Acquisition(215, 58, 135, haze=0.15, gain=0.03, noise=0.005),)),
}


# --- DFC2020: Sentinel-2 level 1C, four seasons, cities of three continents ---------------------

_S2_1C = Sensor(dfc2020.WAVELENGTHS, top_of_atmosphere=True)

_TEMPERATE = Region(
    seasons={
        "tree": Season(118, 295),
        "crop": Season(95, 205, least=0.08),
        "paddy": Season(150, 260),
        "grass": Season(85, 310, least=0.35),
        "marsh": Season(115, 285),
    },
    zones={"farmland": 1.6, "woods": 1.0, "conifers": 1.0, "meadows": 1.3, "scrub": 0.7,
           "marsh": 0.8, "barrens": 0.6, "town": 1.2, "works": 0.4},
    soil=Soil(brightness=0.26, iron=0.5, clay=0.6, moisture=0.5),
    roofs=Roofs(concrete=0.24, asphalt=0.09, redness=0.8),
    rivers=0.5, lakes=0.5, relief=1.2, epsg=32632,
)  # fmt: skip
_CONTINENTAL = replace(
    _TEMPERATE,
    seasons={
        "tree": Season(135, 270),
        "crop": Season(140, 250),
        "paddy": Season(165, 262),
        "grass": Season(125, 270, least=0.15),
        "marsh": Season(130, 265),
    },
    soil=Soil(brightness=0.20, iron=0.2, clay=0.4, moisture=0.4),
    epsg=32653,
)
_DRY_SOUTH = Region(
    seasons={
        "tree": Season(20, 364, least=0.6, most=0.8),
        "crop": Season(320, 120, least=0.05),
        "paddy": Season(170, 290),
        "grass": Season(310, 110, least=0.05),
        "marsh": Season(30, 300, least=0.3),
    },
    zones={"farmland": 1.0, "woods": 0.5, "conifers": 0.3, "meadows": 0.7, "scrub": 1.5,
           "marsh": 0.6, "barrens": 1.4, "sands": 0.8, "town": 1.6, "works": 0.5},
    soil=Soil(brightness=0.40, iron=1.0, clay=0.5, moisture=0.05),
    tree=Leaves(chlorophyll=1.2, plateau=0.33, water=0.6),
    roofs=Roofs(concrete=0.33, asphalt=0.13, redness=0.3),
    rivers=0.3, lakes=0.5, relief=1.0, epsg=32734,
)  # fmt: skip
_MONSOON = Region(
    seasons={
        "tree": Season(160, 350, least=0.45),
        "crop": Season(185, 330, least=0.10),
        "paddy": Season(190, 310),
        "grass": Season(165, 320, least=0.12),
        "marsh": Season(165, 340, least=0.3),
    },
    zones={"paddies": 1.4, "farmland": 0.7, "woods": 1.2, "meadows": 0.7, "scrub": 1.0,
           "marsh": 1.2, "barrens": 0.7, "town": 1.6, "works": 0.4},
    soil=Soil(brightness=0.26, iron=1.3, clay=0.9, moisture=0.3),
    tree=Leaves(chlorophyll=1.4, plateau=0.40, water=1.3),
    lake=Water(sediment=0.8, algae=0.8),
    roofs=Roofs(concrete=0.22, asphalt=0.10, redness=0.6),
    rivers=0.5, lakes=0.6, relief=0.8, epsg=32643,
)  # fmt: skip

DFC2020 = {
    "spring": {
        "BlackForest": Domain(_TEMPERATE, _S2_1C, (Acquisition(108, 48, 155, haze=0.10),)),
        "BandarAnzali": Domain(
            replace(_TEMPERATE, soil=Soil(0.30, iron=0.6, clay=0.6, moisture=0.4), epsg=32639),
            _S2_1C,
            (Acquisition(100, 50, 150, haze=0.15),),
        ),
    },
    "summer": {
        "Mumbai": Domain(_MONSOON, _S2_1C, (Acquisition(240, 63, 110, haze=0.40),)),
        "KippaRing": Domain(
            replace(_MONSOON, soil=Soil(0.28, iron=1.0, clay=0.8, moisture=0.25), epsg=32756),
            _S2_1C,
            (Acquisition(230, 58, 70, haze=0.25),),
        ),
    },
    "autumn": {
        "CapeTown": Domain(_DRY_SOUTH, _S2_1C, (Acquisition(280, 45, 45, haze=0.08),)),
        "MexicoCity": Domain(
            replace(_DRY_SOUTH, soil=Soil(0.36, iron=0.8, clay=0.5, moisture=0.1), epsg=32614),
            _S2_1C,
            (Acquisition(270, 52, 140, haze=0.18),),
        ),
    },
    "winter": {
        "Chabarowsk": Domain(
            _CONTINENTAL, _S2_1C, (Acquisition(25, 24, 165, haze=0.12, snow=0.40),)
        ),
    },
}


# --- MTS12: Sentinel-2, four months of one year, Slovenia ---------------------------------------

_S2_SIX = Sensor(mts12.SEASON_WAVELENGTHS, top_of_atmosphere=True)

_ALPINE = Region(
    seasons={
        "tree": Season(130, 285),
        "crop": Season(135, 240),
        "paddy": Season(165, 262),
        "grass": Season(110, 300, least=0.20),
        "marsh": Season(125, 285),
    },
    zones={"farmland": 1.2, "woods": 1.0, "conifers": 1.5, "meadows": 1.5, "scrub": 0.8,
           "marsh": 0.6, "barrens": 0.8, "town": 1.0},
    soil=Soil(brightness=0.24, iron=0.35, clay=0.5, moisture=0.5),
    roofs=Roofs(concrete=0.24, asphalt=0.09, redness=0.5),
    rivers=0.5, lakes=0.5, relief=2.0, epsg=32633,
)  # fmt: skip
_KARST = Region(
    seasons={
        "tree": Season(100, 320, least=0.25),
        "crop": Season(330, 165, least=0.10),
        "paddy": Season(165, 262),
        "grass": Season(60, 175, least=0.12),
        "marsh": Season(75, 330, least=0.25),
    },
    zones={"farmland": 1.0, "orchards": 0.5, "woods": 1.5, "conifers": 0.4, "meadows": 1.0,
           "scrub": 1.4, "marsh": 0.5, "barrens": 1.0, "town": 0.9},
    soil=Soil(brightness=0.34, iron=1.4, clay=0.8, moisture=0.1),
    tree=Leaves(chlorophyll=1.0, plateau=0.38, water=0.7),
    roofs=Roofs(concrete=0.30, asphalt=0.11, redness=0.95),
    rivers=0.4, lakes=0.4, relief=1.2, epsg=32633,
)  # fmt: skip

MTS12_NORTH = Domain(
    _ALPINE,
    _S2_SIX,
    (
        Acquisition(80, 43, 155, haze=0.08, snow=0.35),
        Acquisition(170, 65, 145, haze=0.12),
        Acquisition(262, 44, 160, haze=0.10),
        Acquisition(345, 20, 165, haze=0.06, snow=0.45),
    ),
)
MTS12_SOUTH = Domain(
    _KARST,
    _S2_SIX,
    (
        Acquisition(78, 44, 155, haze=0.20),
        Acquisition(172, 66, 140, haze=0.25),
        Acquisition(258, 47, 155, haze=0.22),
        Acquisition(348, 21, 165, haze=0.15),
    ),
)
