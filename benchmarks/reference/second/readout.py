# SPDX-License-Identifier: Apache-2.0
"""Read from frames what a caption names, with filters of known waves and colours; nothing here is trained.

`read(frames)` gives a `Texture`, `judge(frames, caption)` says attribute by attribute whether it is the caption's.
"""

import functools
import itertools
from typing import Dict, List, Tuple

import numpy as np

from .data import COLOURS, LIGHTS, PATTERNS, RING_WAYS, SCALES, SIZE, WAYS, Texture, by_caption, directions, gain, ways

LAG = 3  # frames between which drift is measured: 1 pixel at the slow pace, 2 at the quick one
STEPS = {"slowly": 1, "quickly": 2}
CLOUDED = 0.5  # share of a picture's energy in the best regular waves, below which it is clouds
CLOUD_EDGE = 0.123  # cycles a pixel: training clouds have 0.130 to 0.164 (fine), 0.085 to 0.117 (broad)
ATTRIBUTES = ("pattern", "scale", "ink", "paper", "way", "pace", "light")


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
    return Texture(pattern, scale, ink, paper, way, pace, light)


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
def filters(pattern: str, scale: str) -> List[List[np.ndarray]]:
    """For some wavelengths and centres, orthonormal sines and cosines (pixels, 2) of each of the pattern's waves."""
    low, high = SCALES[scale]
    lengths = np.linspace(low, high, 4)
    if pattern == "rings":
        centres = itertools.product((-0.8, 0, 0.8), repeat=2)
        return [
            [_wave(2 * np.pi / length * _radius(*centre))] for length, centre in itertools.product(lengths, centres)
        ]
    y, x = np.mgrid[:SIZE, :SIZE]
    vectors = directions(pattern, np.random.default_rng(0))
    return [[_wave(2 * np.pi / length * (vector[0] * x + vector[1] * y)) for vector in vectors] for length in lengths]


def _wave(phase: np.ndarray) -> np.ndarray:
    parts = np.stack([np.cos(phase).ravel(), np.sin(phase).ravel()], axis=1)
    return np.linalg.qr(parts - parts.mean(0))[0]


def _radius(x: float, y: float) -> np.ndarray:
    grid = np.arange(SIZE) - (SIZE - 1) / 2
    return np.hypot(grid - x, grid[:, None] - y)


def read_pattern(height: np.ndarray) -> Tuple[str, str]:
    """Pattern and scale whose waves hold most of the energy of heights (T, H, W) of mean 0."""
    pixels = height.reshape(len(height), -1)
    energy = np.sum(pixels**2) + 1e-9

    def share(pattern, scale):
        best = 0.0
        for waves in filters(pattern, scale):
            parts = [np.sum((pixels @ wave) ** 2) / energy for wave in waves]
            # Two crossing waves are of equal strength; counting the weaker twice tells them from a single one.
            best = max(best, len(parts) * min(parts))
        return best

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
    for (way, (x, y)), (pace, step) in itertools.product(vectors.items(), STEPS.items()):
        found.append((_shifted_error(height, x * step, y * step), (way, pace)))
    return min(found)[1]


def _profile(height: np.ndarray) -> np.ndarray:
    """Mean height (T, 1, radii) on circles about the middle."""
    bins = _radius(0, 0).astype(int).ravel()
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
