"""From a landscape and a domain to digital numbers: mixtures, relief, blur, atmosphere, sensor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from . import spectra
from .domains import Acquisition, Domain, Region
from .landscape import COVER, COVERS, PARK, POND, ROAD, ROOF, TRACK, Landscape, noise

Mixture = dict[str, float]
MATERIALS = (
    "tree", "needle", "crop", "grass", "dry", "soil", "mud", "river", "lake", "concrete",
    "asphalt", "tiles", "metal", "sand", "salt", "rock", "snow", "shade",
)  # fmt: skip
_FIELDS = ("paddy", "dry farm", "orchard")
_OPEN_GROUND = ("dry farm", "paddy", "grassland", "steppe", "marsh", "bare land", "orchard")
# Relative spread of mixtures between the units of a cover, and between the pixels of a unit.
_UNIT_SPREAD = {"town": 0.55, "village": 0.50, "works": 0.90}
_PIXEL_SPREAD = {"town": 0.75, "village": 0.70, "river": 0.05, "lake": 0.05}
_OTHER_SPREAD = 0.35
# Days by which units are ahead of or behind the region's calendar (one standard deviation), and
# the share of dry fields under a crop of another season, with its lead.
_FIELD_DAYS, _OTHER_DAYS = 18.0, 8.0
_SECOND_CROP, _SECOND_CROP_DAYS = 0.25, 150.0
_DAY_STEP = 12.0
_PSF_PIXELS = 0.65
# Gas absorption that top-of-atmosphere products keep: centre and half width in µm, depth.
_GASES = ((0.94, 0.03, 0.9), (1.38, 0.05, 3.5), (0.76, 0.006, 0.5), (1.13, 0.03, 0.8))


def render(scene: Landscape, domain: Domain, rng: np.random.Generator) -> npt.NDArray[np.uint16]:
    """Digital numbers [dates * bands, size, size] of `scene` in `domain`."""
    calendar = _calendar(scene, rng)
    dates = [_render_date(scene, domain, date, calendar, rng) for date in domain.dates]
    return np.concatenate(dates)


def mixtures(region: Region, day: float, elevation: float, snow: float) -> dict[str, Mixture]:
    """Mean share of each material in each cover of `region` on a day; shares add up to 1."""
    green = {kind: season.greenness(day) for kind, season in region.seasons.items()}
    # Canopies show more shadow the lower the sun.
    shade = 0.10 + 0.22 * float(np.cos(np.deg2rad(elevation)))
    since_flooding = day - (region.seasons["paddy"].rise - 15.0)
    flooded = float(np.exp(-((since_flooding / 22.0) ** 2))) * 0.75
    rice = green["paddy"] * (1.0 - flooded)
    result: dict[str, Mixture] = {
        "paddy": {
            "lake": flooded,
            "crop": rice,
            "mud": 0.35 * (1 - rice),
            "dry": 0.65 * (1 - rice),
        },
        "dry farm": {
            "crop": green["crop"],
            "soil": 0.75 * (1 - green["crop"]),
            "dry": 0.25 * (1 - green["crop"]),
        },
        "woodland": _canopy("tree", green["tree"], 0.92, shade),
        "orchard": _canopy("tree", green["tree"], 0.66, 0.7 * shade),
        "shrubs": _canopy("tree", 0.85 * green["tree"] + 0.1, 0.45, 0.4 * shade),
        "conifers": _canopy("needle", 0.97, 0.93, 1.2 * shade),
        "grassland": {"grass": green["grass"], "dry": 1 - green["grass"], "soil": 0.08},
        "steppe": {
            "grass": 0.45 * green["grass"],
            "dry": 0.25 + 0.3 * (1 - green["grass"]),
            "soil": 0.35,
        },
        "marsh": {
            "grass": 0.6 * green["marsh"],
            "dry": 0.5 * (1 - green["marsh"]),
            "mud": 0.25,
            "lake": 0.22,
        },
        "river": {"river": 1.0},
        "lake": {"lake": 1.0},
        "town": {"concrete": 0.34, "asphalt": 0.26, "tiles": 0.2, "tree": 0.1 * green["tree"],
                 "shade": 0.12},
        "village": {"concrete": 0.26, "asphalt": 0.14, "tiles": 0.3, "soil": 0.12,
                    "tree": 0.16 * green["tree"], "shade": 0.08},
        "works": {"metal": 0.42, "concrete": 0.34, "asphalt": 0.22},
        "sand": {"sand": 0.95, "dry": 0.05},
        "salt flat": {"salt": 0.7, "soil": 0.3},
        "bare land": {"soil": 0.72, "rock": 0.22, "dry": 0.06},
    }  # fmt: skip
    for cover in _OPEN_GROUND if snow else ():
        result[cover] = {name: share * (1 - snow) for name, share in result[cover].items()}
        result[cover]["snow"] = snow
    return {cover: _shares(mixture) for cover, mixture in result.items()}


def endmembers(
    region: Region, date: Acquisition, wavelengths: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Reflectance [materials, bands] of `MATERIALS` in a region on a date."""
    ground = region.soil
    mud = spectra.Soil(ground.brightness * 0.6, ground.iron, ground.clay, 1.0)
    made = {
        "tree": spectra.leaves(wavelengths, region.tree),
        "needle": spectra.leaves(wavelengths, region.needle),
        "crop": spectra.leaves(wavelengths, region.crop),
        "grass": spectra.leaves(wavelengths, region.grass),
        "soil": spectra.soil(wavelengths, ground),
        "mud": spectra.soil(wavelengths, mud),
        "river": spectra.water(wavelengths, region.river),
        "lake": spectra.water(wavelengths, region.lake),
        "concrete": spectra.concrete(wavelengths, region.roofs),
        "asphalt": spectra.asphalt(wavelengths, region.roofs),
        "tiles": spectra.tiles(wavelengths, region.roofs),
    }
    made |= {name: formula(wavelengths) for name, formula in spectra.FIXED.items()}
    return np.stack([made[name] for name in MATERIALS])


def _calendar(scene: Landscape, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Lead [size, size] of each unit's growth on its region's, in steps of `_DAY_STEP` days."""
    units = int(scene.unit.max()) + 1
    draw = rng.standard_normal(units)[scene.unit]
    field = np.isin(scene.cover, [COVER[name] for name in _FIELDS])
    days = draw * np.where(field, _FIELD_DAYS, _OTHER_DAYS)
    second = rng.random(units)[scene.unit] < _SECOND_CROP
    days[second & (scene.cover == COVER["dry farm"])] += _SECOND_CROP_DAYS
    return np.rint(days / _DAY_STEP).astype(np.int64)


def _render_date(
    scene: Landscape,
    domain: Domain,
    date: Acquisition,
    calendar: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> npt.NDArray[np.uint16]:
    sensor = domain.sensor
    wavelengths = np.asarray(sensor.wavelengths, dtype=np.float64)
    # Neighbouring tiles are seen days apart.
    day = date.day + rng.normal(0.0, 5.0)
    leads, variant = np.unique(calendar, return_inverse=True)
    means = [
        mixtures(domain.region, (day + lead * _DAY_STEP) % 365.0, date.elevation, date.snow)
        for lead in leads.tolist()
    ]
    shares = _abundances(scene, means, variant.reshape(calendar.shape), rng)
    reflectance = shares @ endmembers(domain.region, date, wavelengths).astype(np.float32)
    reflectance *= _illumination(scene, domain.region, date, rng)[..., None]
    # The sensor's footprint is wider than a pixel: borders mix.
    reflectance = gaussian_filter(reflectance, (_PSF_PIXELS, _PSF_PIXELS, 0.0), mode="nearest")
    seen = _atmosphere(reflectance, wavelengths, date, sensor.top_of_atmosphere, rng)
    gain = 1.0 + date.gain + date.tilt * (wavelengths - 0.8)
    columns = 1.0 + sensor.stripes * rng.standard_normal((1, seen.shape[1], len(wavelengths)))
    seen *= (gain * columns).astype(np.float32)
    deviation = np.float32(date.noise) * (np.float32(0.5) + seen.clip(0.0, 1.0))
    seen += deviation * rng.standard_normal(seen.shape, dtype=np.float32)
    numbers = np.rint(seen * np.float32(sensor.scale)).clip(1, 65535).astype(np.uint16)
    return np.moveaxis(numbers, -1, 0)


def _abundances(
    scene: Landscape,
    means: list[dict[str, Mixture]],
    variant: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Shares [size, size, materials] of each pixel.

    They are those of its cover in `means` of its `variant`, varied by unit and by pixel.
    """
    table = np.array(
        [
            [[mean[cover].get(name, 0.0) for name in MATERIALS] for cover in COVERS]
            for mean in means
        ],
        np.float32,
    )
    between = np.array([_UNIT_SPREAD.get(cover, _OTHER_SPREAD) for cover in COVERS], np.float32)
    within = np.array([_PIXEL_SPREAD.get(cover, _OTHER_SPREAD) for cover in COVERS], np.float32)
    units = int(scene.unit.max()) + 1
    factors = rng.standard_normal((units, len(MATERIALS)), dtype=np.float32)[scene.unit]
    factors *= between[scene.cover][..., None]
    factors += within[scene.cover][..., None] * rng.standard_normal(factors.shape, dtype=np.float32)
    shares = table[variant, scene.cover] * np.exp(factors)
    shares[..., MATERIALS.index("shade")] *= 1.0 + 0.45 * scene.rows.astype(np.float32)
    shares[..., MATERIALS.index("soil")] *= 1.0 + 0.45 * scene.rows.astype(np.float32)
    _lay(shares, scene.ground == ROAD, {"asphalt": 0.75, "concrete": 0.25}, 0.8)
    _lay(shares, scene.ground == TRACK, {"soil": 0.6, "grass": 0.4}, 0.5)
    _lay(shares, scene.ground == PARK, means[0]["grassland"], 0.7)
    _lay(shares, scene.ground == ROOF, {"metal": 0.6, "concrete": 0.4}, 0.95)
    _lay(shares, scene.ground == POND, {"lake": 1.0}, 0.95)
    total = shares.sum(axis=-1, keepdims=True)
    return np.asarray(shares / np.maximum(total, np.float32(1e-6)), dtype=np.float32)


def _lay(
    shares: npt.NDArray[np.float32],
    where: npt.NDArray[np.bool_],
    mixture: Mixture,
    strength: float,
) -> None:
    """Put `mixture` over `strength` of the pixels' area, in place."""
    row = np.array([mixture.get(name, 0.0) for name in MATERIALS], np.float32)
    below = shares[where]
    below /= np.maximum(below.sum(axis=-1, keepdims=True), np.float32(1e-6))
    shares[where] = (1.0 - strength) * below + strength * row


def _illumination(
    scene: Landscape, region: Region, date: Acquisition, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Brightness [size, size] relative to level ground: slopes towards the sun, view, texture."""
    elevation, azimuth = np.deg2rad(date.elevation), np.deg2rad(date.azimuth)
    down, right = np.gradient(scene.height * 1.2 * region.relief)
    # Rows run south, columns east: the sun stands in direction (-cos, sin) of (row, column).
    facing = down * np.cos(azimuth) - right * np.sin(azimuth)
    slope = np.clip(1.0 + facing / np.tan(elevation), 0.3, 1.7)
    texture = 1.0 + 0.05 * rng.standard_normal(slope.shape)
    per_unit = np.exp(0.06 * rng.standard_normal(int(scene.unit.max()) + 1))[scene.unit]
    return np.asarray(slope * texture * per_unit, dtype=np.float32)


def _atmosphere(
    reflectance: npt.NDArray[np.float32],
    wavelengths: npt.NDArray[np.float64],
    date: Acquisition,
    top_of_atmosphere: bool,
    rng: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Aerosol over the scene, uneven; molecules and gases where the product keeps them."""
    path = 1.0 / np.sin(np.deg2rad(date.elevation)) + 1.0
    spread = (1.0 + 0.15 * noise(reflectance.shape[0], 60.0, rng)).clip(0.3, 2.0)
    aerosol = path * date.haze * (wavelengths / 0.55) ** -1.3
    depth = spread[..., None].astype(np.float32) * aerosol.astype(np.float32)
    # Single scattering: a tenth of the light that aerosol takes from the beam reaches the sensor
    # as glow, a fifth is lost to the scene; of molecules, which scatter evenly, a quarter each.
    glow = np.float32(0.10) - np.float32(0.10) * np.exp(-depth)
    beam = np.exp(np.float32(-0.18) * depth)
    if top_of_atmosphere:
        molecules = path * 0.098 * (wavelengths / 0.55) ** -4.0
        gases = np.sum(
            [
                strength * np.exp(-(((wavelengths - centre) / width) ** 2))
                for centre, width, strength in _GASES
            ],
            axis=0,
        )
        clear = np.exp(-0.5 * path * gases).astype(np.float32)
        glow = (glow + (0.25 * (1.0 - np.exp(-molecules))).astype(np.float32)) * clear
        beam *= np.exp(-0.25 * molecules).astype(np.float32) * clear
    return np.asarray(reflectance * beam + glow, dtype=np.float32)


def _canopy(kind: str, green: float, closure: float, shade: float) -> Mixture:
    """Foliage over litter and ground; `closure` is the area the crowns cover."""
    return {
        kind: closure * green * (1 - shade),
        "dry": closure * (1 - green) * (1 - shade) + 0.4 * (1 - closure),
        "soil": 0.6 * (1 - closure),
        "shade": closure * shade,
    }


def _shares(mixture: Mixture) -> Mixture:
    total = sum(mixture.values())
    return {name: share / total for name, share in mixture.items()}
