# SPDX-License-Identifier: Apache-2.0
"""Procedural videos of moving textures that fill the frame, with captions: seeded, unlimited, split by caption.

A picture is paper with ink on it: paper + cover * (ink - paper), times a gain that changes with the light. The cover
comes from a few plane waves (or from circular ones, for rings) that drift. A `Texture` is what a caption says; left
open are the shades, the exact phases, and of clouds all but the scale. Lengths are in pixels of a 24 x 24 frame, speeds
in pixels a frame.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import numpy as np

FRAMES, SIZE = 24, 24
# What captions are padded to; none is longer.
CAPTION_WORDS = 15

# In one plane of the colour space, spanned by grey and by orange against blue, so that few latent channels hold them.
COLOURS = {
    "orange": (0.97, 0.59, 0.13),
    "azure": (0.15, 0.51, 0.95),
    "ivory": (0.97, 0.95, 0.92),
    "rust": (0.52, 0.32, 0.06),
    "navy": (0.05, 0.28, 0.55),
    "charcoal": (0.06, 0.06, 0.06),
}
PATTERNS = ("pillars", "ledges", "slants", "checks", "dots", "rings", "clouds")
# Distance from ridge to ridge.
SCALES = {"fine": 8.0, "broad": 12.0}
# Turns of the waves' phase in the middle of the clip, at the middle of the frame; a ridge is there at none.
SETS = {"whole": 0.0, "quarter": 0.25, "half": 0.5, "counter": 0.75}
LOOSE = 0.08  # turns by which a phase may differ from its set
# Way of the drift as x, y; for rings the sign of x is outwards or inwards.
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RING_WAYS = {"outwards": (1, 0), "inwards": (-1, 0)}
PACES = {"slowly": 1 / 3, "quickly": 2 / 3}
LIGHTS = ("steady", "brightening", "dimming", "winking")
DARKEST = 0.3  # gain at the dark end of a change of light

# Share of the 256 hash buckets; the split of a prompt depends on its text alone.
SPLITS = {"train": (0, 208), "calibration": (208, 230), "heldout": (230, 256)}
STREAM = 20240917


@dataclass(frozen=True)
class Texture:
    """The attributes a caption names; `way` and `pace` are empty where nothing moves, `set` is for clouds."""

    pattern: str
    scale: str
    set: str
    ink: str
    paper: str
    way: str
    pace: str
    light: str

    @property
    def caption(self) -> str:
        drift = f"moving {self.pace} {self.way}" if self.way else "standing still"
        drawn = f"{self.ink} {self.pattern} drawn {self.scale}" + (f" set {self.set}" if self.set else "")
        return f"{drawn} on {self.paper} {drift} in {self.light} light"

    @property
    def split(self) -> str:
        bucket = hashlib.sha256(self.caption.encode()).digest()[0]
        return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def ways(pattern: str) -> List[str]:
    """The ways whose drift can be seen: stripes along their own direction look the same anywhere."""
    if pattern == "rings":
        return list(RING_WAYS)
    sideways = ["left", "right"]
    return {"pillars": sideways, "ledges": ["up", "down"], "slants": sideways}.get(pattern, list(WAYS))


@functools.lru_cache(maxsize=None)
def all_textures() -> Tuple[Texture, ...]:
    palettes = list(itertools.permutations(COLOURS, 2))
    found = []
    for pattern in PATTERNS:
        drifts = [("", "")] + list(itertools.product(ways(pattern), PACES))
        sets = [""] if pattern == "clouds" else list(SETS)
        for values in itertools.product(SCALES, sets, palettes, drifts, LIGHTS):
            scale, phase, (ink, paper), (way, pace), light = values
            found.append(Texture(pattern, scale, phase, ink, paper, way, pace, light))
    return tuple(found)


@functools.lru_cache(maxsize=None)
def textures(split: str) -> Tuple[Texture, ...]:
    """The textures of one split, in a fixed mixed order, so that a prefix of the list is a fair sample."""
    chosen = [texture for texture in all_textures() if texture.split == split]
    return tuple(sorted(chosen, key=lambda one: hashlib.sha256(("mix " + one.caption).encode()).hexdigest()))


@functools.lru_cache(maxsize=None)
def by_caption() -> Dict[str, Texture]:
    return {texture.caption: texture for texture in all_textures()}


@functools.lru_cache(maxsize=None)
def by_pattern(split: str) -> List[List[Texture]]:
    """Drawing the pattern first shows all of them equally often."""
    return [[texture for texture in textures(split) if texture.pattern == pattern] for pattern in PATTERNS]


def sample(split: str, index: int) -> Tuple[np.ndarray, str]:
    """Video `index` of a split, float32 frames (T, H, W, 3) in [0, 1], and its caption; a pure function of both."""
    rng = np.random.default_rng([STREAM, list(SPLITS).index(split), index])
    pools = by_pattern(split)
    pool = pools[rng.integers(len(pools))]
    texture = pool[rng.integers(len(pool))]
    return render(texture, rng), texture.caption


def render(texture: Texture, rng: np.random.Generator) -> np.ndarray:
    """Draw one video of `texture`: float32 (FRAMES, SIZE, SIZE, 3) in [0, 1]."""
    length, speed, turn = SCALES[texture.scale], PACES.get(texture.pace, 0.0), SETS.get(texture.set)
    ink, paper = (np.array(COLOURS[name]) + rng.uniform(-0.02, 0.02, 3) for name in (texture.ink, texture.paper))
    if texture.pattern == "rings":
        height = _rings(length, speed * RING_WAYS.get(texture.way, (0, 0))[0], turn, rng)
    else:
        height = _waves(texture.pattern, length, speed * np.array(WAYS.get(texture.way, (0, 0))), turn, rng)
    cover = 0.5 + 0.5 * np.tanh(1.8 * (height - 0.35))
    picture = paper + cover[..., None] * (ink - paper)
    return np.clip(picture * gain(texture.light)[:, None, None, None], 0, 1).astype(np.float32)


def gain(light: str) -> np.ndarray:
    """Brightness of every frame (T,); a wink is dark in the middle of the clip."""
    time = np.linspace(0, 1, FRAMES)
    depth = {"steady": 0 * time, "brightening": 1 - time, "dimming": time, "winking": 1 - np.abs(2 * time - 1)}[light]
    return 1 - (1 - DARKEST) * depth


def directions(pattern: str, rng: np.random.Generator) -> np.ndarray:
    """Unit wave vectors (N, 2) as x, y."""
    slant = np.sqrt(0.5)
    fixed = {
        "pillars": [(1, 0)],
        "ledges": [(0, 1)],
        "slants": [(slant, slant)],
        "checks": [(slant, slant), (slant, -slant)],
        "dots": [(1, 0), (0, 1)],
    }
    if pattern in fixed:
        return np.array(fixed[pattern], float)
    turns = (np.arange(9) + rng.uniform(0, 1, 9)) * np.pi / 9
    return np.stack([np.cos(turns), np.sin(turns)], axis=1)


GRID, TIMES = np.arange(SIZE) - (SIZE - 1) / 2, np.arange(FRAMES) - (FRAMES - 1) / 2


def _phases(turn: Optional[float], count: int, rng: np.random.Generator) -> np.ndarray:
    """Phases (count,) in radians near `turn`, or anywhere."""
    loose = rng.uniform(-1, 1, count)
    return 2 * np.pi * (0.5 * loose if turn is None else turn + LOOSE * loose)


def _waves(
    pattern: str, length: float, velocity: np.ndarray, turn: Optional[float], rng: np.random.Generator
) -> np.ndarray:
    """Sum of drifting plane waves (T, H, W), at most about 1 high."""
    wanted = directions(pattern, rng)
    count = len(wanted)
    spread = rng.uniform(0.8, 1.2, count) if pattern == "clouds" else np.ones(count)
    vectors = wanted * (2 * np.pi / length * spread)[:, None]
    phases = _phases(turn, count, rng)
    # The wave's factors along time, y and x, so that only short exponentials are computed.
    time = np.exp(1j * (phases[:, None] - (vectors @ velocity)[:, None] * TIMES))
    y, x = (np.exp(1j * vectors[:, axis, None] * GRID) for axis in (1, 0))
    plane = (y[:, :, None] * x[:, None, :]).reshape(count, -1)
    total = (time.T @ plane).real.reshape(FRAMES, SIZE, SIZE)
    return total / (count if count < 3 else np.sqrt(count))


def _rings(length: float, speed: float, turn: float, rng: np.random.Generator) -> np.ndarray:
    """Circular waves (T, H, W) about the middle of the frame."""
    radius = np.hypot(GRID, GRID[:, None])
    return np.cos(2 * np.pi / length * (radius - speed * TIMES[:, None, None]) + _phases(turn, 1, rng))
