# SPDX-License-Identifier: Apache-2.0
"""Read from frames what a caption names, with filters of known waves and colours; nothing here is trained.

`read(frames)` gives a `Texture`, `judge(frames, caption)` says attribute by attribute whether it is the caption's.
"""

import itertools
from typing import Dict, Tuple

import numpy as np

from .data import (
    COLOURS,
    FRAMES,
    LIGHTS,
    PACES,
    PATTERNS,
    SETS,
    SIDES,
    TIMES,
    WAYS,
    Texture,
    by_caption,
    course,
    fall,
    planes,
    velocity,
    wave_vectors,
    ways,
)

LAG = 4  # frames between which drift is measured: 1 pixel at the slow pace, 2 at the quick one
ATTRIBUTES = ("pattern", "set", "ink", "paper", "way", "pace", "light", "side")


def judge(frames: np.ndarray, caption: str) -> Dict[str, bool]:
    """Whether every attribute of uint8 frames (T, H, W, 3) is the caption's, and `valid`: all of them."""
    wanted, seen = by_caption()[caption], read(frames)
    verdict = {name: getattr(seen, name) == getattr(wanted, name) for name in ATTRIBUTES}
    return {**verdict, "valid": all(verdict.values())}


def read(frames: np.ndarray) -> Texture:
    """The texture that uint8 frames (T, H, W, 3) show."""
    pictures = frames.astype(np.float32) / 255
    light = min(LIGHTS, key=lambda name: misfit(pictures.mean((1, 2, 3)), course(name)))
    side = min(SIDES, key=lambda name: misfit(pictures.mean((0, 3)).ravel(), fall(name).ravel()))
    ink, paper, cover = read_palette(pictures / course(light)[:, None, None, None] / fall(side)[..., None])
    height = cover - cover.mean((1, 2), keepdims=True)
    pattern = read_pattern(height)
    way, pace = read_drift(height, pattern)
    return Texture(pattern, read_set(height, pattern, way, pace), ink, paper, way, pace, light, side)


def misfit(level: np.ndarray, shape: np.ndarray) -> float:
    """Square error of brightness (N,) against a shape (N,) at its best factor."""
    return float(np.sum((level - shape * (level @ shape) / (shape @ shape)) ** 2))


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


def amplitudes(height: np.ndarray, pattern: str) -> np.ndarray:
    """Complex amplitudes (N, T) of the pattern's waves in heights (T, H, W)."""
    waves = np.exp(-1j * planes(wave_vectors(pattern)))
    return waves.reshape(len(waves), -1) @ height.reshape(FRAMES, -1).T


def read_pattern(height: np.ndarray) -> str:
    """The pattern whose waves hold most of the energy of heights (T, H, W) of mean 0.

    Two crossing waves are of equal strength; counting the weaker twice tells them from a single one.
    """

    def energy(pattern):
        parts = np.sum(np.abs(amplitudes(height, pattern)) ** 2, axis=1)
        return len(parts) * parts.min()

    return max(PATTERNS, key=energy)


def read_drift(height: np.ndarray, pattern: str) -> Tuple[str, str]:
    """Way and pace of the shift under which frames LAG apart agree best; two empty words where nothing moves."""
    found = [(_shifted_error(height, 0, 0), ("", ""))]
    for way, (pace, speed) in itertools.product(ways(pattern), PACES.items()):
        step = round(LAG * speed)
        found.append((_shifted_error(height, WAYS[way][0] * step, WAYS[way][1] * step), (way, pace)))
    return min(found)[1]


def read_set(height: np.ndarray, pattern: str, way: str, pace: str) -> str:
    """The set nearest to the waves' phase in the middle of the clip, their drift taken back."""
    drift = wave_vectors(pattern) @ velocity(way, pace)
    seen = np.sum(amplitudes(height, pattern) * np.exp(1j * drift[:, None] * TIMES), axis=1)
    total = np.sum(seen / (np.abs(seen) + 1e-9))
    return max(SETS, key=lambda name: (total * np.exp(-2j * np.pi * SETS[name])).real)


def _shifted_error(height: np.ndarray, x: int, y: int) -> float:
    """Mean square change of heights (T, H, W) over LAG frames, when the content goes x to the right and y down."""
    before, after = height[:-LAG], height[LAG:]
    rows, columns = height.shape[1:]
    from_y, from_x = slice(max(0, -y), rows - max(0, y)), slice(max(0, -x), columns - max(0, x))
    to_y, to_x = slice(max(0, y), rows + min(0, y)), slice(max(0, x), columns + min(0, x))
    return float(np.mean((after[:, to_y, to_x] - before[:, from_y, from_x]) ** 2))
