# SPDX-License-Identifier: Apache-2.0
"""Read from frames what a caption names, with filters of known waves and colours; nothing here is trained.

`read(frames)` gives a `Texture`, `judge(frames, caption)` says attribute by attribute whether it is the caption's.
"""

import functools
import itertools
from typing import Dict, List, Tuple

import numpy as np

from .data import (
    COLOURS,
    GRID,
    LIGHTS,
    PACES,
    PATTERNS,
    RING_WAYS,
    SCALES,
    SETS,
    SIZE,
    TIMES,
    WAYS,
    Texture,
    by_caption,
    directions,
    gain,
    ways,
)

LAG = 3  # frames between which drift is measured: 1 pixel at the slow pace, 2 at the quick one
CLOUDED = 0.5  # share of a picture's energy in the best regular waves, below which it is clouds
CLOUD_EDGE = 0.123  # cycles a pixel: training clouds have 0.130 to 0.164 (fine), 0.085 to 0.117 (broad)
ATTRIBUTES = ("pattern", "scale", "set", "ink", "paper", "way", "pace", "light")


def judge(frames: np.ndarray, caption: str) -> Dict[str, bool]:
    """Whether every attribute of uint8 frames (T, H, W, 3) is the caption's, and `valid`: all of them."""
    wanted, seen = by_caption()[caption], read(frames)
    verdict = {name: getattr(seen, name) == getattr(wanted, name) for name in ATTRIBUTES}
    return {**verdict, "valid": all(verdict.values())}


def read(frames: np.ndarray) -> Texture:
    """The texture that uint8 frames (T, H, W, 3) show."""
    pictures = frames.astype(np.float32) / 255
    light = read_light(pictures)
    lit = pictures / gain(light)[:, None, None, None]
    ink, paper, cover = read_palette(lit)
    height = cover - cover.mean((1, 2), keepdims=True)
    pattern, scale = read_pattern(height)
    way, pace = read_drift(height, pattern)
    phase = "" if pattern == "clouds" else read_set(height, pattern, scale, way, pace)
    return Texture(pattern, scale, phase, ink, paper, way, pace, light)


def read_light(pictures: np.ndarray) -> str:
    """The light whose course the mean brightness of the frames fits best, up to a factor."""
    level = pictures.mean((1, 2, 3))

    def misfit(light):
        course = gain(light)
        return np.sum((level - course * (level @ course) / (course @ course)) ** 2)

    return min(LIGHTS, key=misfit)


def read_palette(lit: np.ndarray) -> Tuple[str, str, np.ndarray]:
    """Ink, paper and cover (T, H, W) in [0, 1] of the pair of colours between which the pixels lie.

    Ink is the one that covers less than half.
    """

    def project(pair):
        first, second = (np.array(COLOURS[name], np.float32) for name in pair)
        line = first - second
        cover = np.clip((lit - second) @ line / (line @ line), 0, 1)
        return np.mean((second + cover[..., None] * line - lit) ** 2), pair, cover

    _, (ink, paper), cover = min((project(pair) for pair in itertools.combinations(COLOURS, 2)), key=lambda fit: fit[0])
    return (ink, paper, cover) if cover.mean() < 0.5 else (paper, ink, 1 - cover)


@functools.lru_cache(maxsize=None)
def filters(pattern: str, scale: str) -> List[np.ndarray]:
    """The pattern's waves at rest, complex (pixels, ), of mean 0."""
    number = 2 * np.pi / SCALES[scale]
    if pattern == "rings":
        phases = [number * np.hypot(GRID, GRID[:, None])]
    else:
        x, y = np.meshgrid(GRID, GRID)
        vectors = directions(pattern, np.random.default_rng(0))
        phases = [number * (vector[0] * x + vector[1] * y) for vector in vectors]
    waves = [np.exp(1j * phase).ravel() for phase in phases]
    return [wave - wave.mean() for wave in waves]


def _energy(pixels: np.ndarray, wave: np.ndarray) -> float:
    """Energy of pixels (T, H * W) in the sine and the cosine of a wave."""
    basis = np.linalg.qr(np.stack([wave.real, wave.imag], axis=1))[0]
    return float(np.sum((pixels @ basis) ** 2))


def read_pattern(height: np.ndarray) -> Tuple[str, str]:
    """Pattern and scale whose waves hold most of the energy of heights (T, H, W) of mean 0."""
    pixels = height.reshape(len(height), -1)
    energy = np.sum(pixels**2) + 1e-9

    def share(pattern, scale):
        parts = [_energy(pixels, wave) / energy for wave in filters(pattern, scale)]
        # Two crossing waves are of equal strength; counting the weaker twice tells them from a single one.
        return len(parts) * min(parts)

    regular = [(name, scale) for name in PATTERNS if name != "clouds" for scale in SCALES]
    found = max(regular, key=lambda pair: share(*pair))
    return found if share(*found) > CLOUDED else ("clouds", _cloud_scale(pixels))


def _cloud_scale(pixels: np.ndarray) -> str:
    """The scale by the mean frequency, weighted by energy, of the spectrum of pixels (T, H * W)."""
    spectrum = np.mean(np.abs(np.fft.fft2(pixels.reshape(-1, SIZE, SIZE), s=(64, 64))) ** 2, axis=0)
    frequency = np.hypot(np.fft.fftfreq(64), np.fft.fftfreq(64)[:, None])
    return "fine" if np.sum(spectrum * frequency) > CLOUD_EDGE * np.sum(spectrum) else "broad"


def read_drift(height: np.ndarray, pattern: str) -> Tuple[str, str]:
    """Way and pace of the shift under which frames LAG apart agree best; two empty words where nothing moves."""
    if pattern == "rings":
        height = _profile(height)
        vectors = RING_WAYS
    else:
        vectors = {way: WAYS[way] for way in ways(pattern)}
    found = [(_shifted_error(height, 0, 0), ("", ""))]
    for (way, (x, y)), (pace, speed) in itertools.product(vectors.items(), PACES.items()):
        step = round(LAG * speed)
        found.append((_shifted_error(height, x * step, y * step), (way, pace)))
    return min(found)[1]


def read_set(height: np.ndarray, pattern: str, scale: str, way: str, pace: str) -> str:
    """The set nearest to the waves' phase in the middle of the clip, their drift taken back."""
    pixels, speed = height.reshape(len(height), -1), PACES.get(pace, 0.0)
    if pattern == "rings":
        along = [RING_WAYS.get(way, (0, 0))[0]]
    else:
        along = directions(pattern, np.random.default_rng(0)) @ np.array(WAYS.get(way, (0, 0)))
    total = 0.0
    for wave, part in zip(filters(pattern, scale), along):
        drift = np.exp(2j * np.pi / SCALES[scale] * part * speed * TIMES)
        seen = np.sum(drift * (pixels @ wave.conj()))
        total += seen / (abs(seen) + 1e-9)
    return max(SETS, key=lambda name: (total * np.exp(-2j * np.pi * SETS[name])).real)


def _profile(height: np.ndarray) -> np.ndarray:
    """Mean height (T, 1, radii) on circles about the middle."""
    bins = np.hypot(GRID, GRID[:, None]).astype(int).ravel()
    kept = bins < SIZE // 2
    counts = np.bincount(bins[kept])
    rows = [np.bincount(bins[kept], frame.ravel()[kept]) / counts for frame in height]
    return np.stack(rows)[:, None]


def _shifted_error(height: np.ndarray, x: int, y: int) -> float:
    """Mean square change of heights (T, H, W) over LAG frames, when the content goes x to the right and y down."""
    before, after = height[:-LAG], height[LAG:]
    rows, columns = height.shape[1:]
    from_y, from_x = slice(max(0, -y), rows - max(0, y)), slice(max(0, -x), columns - max(0, x))
    to_y, to_x = slice(max(0, y), rows + min(0, y)), slice(max(0, x), columns + min(0, x))
    return float(np.mean((after[:, to_y, to_x] - before[:, from_y, from_x]) ** 2))
