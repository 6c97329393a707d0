# SPDX-License-Identifier: Apache-2.0
"""Procedural videos of moving textures that fill the frame, with captions: seeded, unlimited, split by caption.

A picture is paper with ink on it: paper + cover * (ink - paper), under a light that changes with time and falls from a
side. The cover comes from one or two plane waves that drift, 8 pixels from ridge to ridge along rows or columns. A
`Texture` is what a caption says; left open are the shades and the exact phases. Lengths are in pixels of a 24 x 24
frame, speeds in pixels a frame.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import Dict, List, Tuple

import numpy as np

FRAMES, SIZE = 16, 24
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
# Wave vectors as x, y, in turns per PERIOD.
PATTERNS = {
    "pillars": [(1, 0)],
    "ledges": [(0, 1)],
    "slants": [(1, 1)],
    "slopes": [(1, -1)],
    "checks": [(1, 1), (1, -1)],
    "dots": [(1, 0), (0, 1)],
}
PERIOD = 8
# Turns of the waves' phase in the middle of the clip, at the middle of the frame; a ridge is there at none.
SETS = {"whole": 0.0, "quarter": 0.25, "half": 0.5, "counter": 0.75}
LOOSE = 0.08  # turns by which a phase may differ from its set
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PACES = {"slowly": 0.25, "quickly": 0.5}
LIGHTS = ("steady", "brightening", "dimming")
SIDES = ("everywhere", "above", "left")
DARKEST = 0.4  # light at the dark end of its change, and at the far side

# Share of the 256 hash buckets; the split of a prompt depends on its text alone.
SPLITS = {"train": (0, 208), "calibration": (208, 230), "heldout": (230, 256)}
STREAM = 20240917


@dataclass(frozen=True)
class Texture:
    """The attributes a caption names; `way` and `pace` are empty where nothing moves."""

    pattern: str
    set: str
    ink: str
    paper: str
    way: str
    pace: str
    light: str
    side: str

    @property
    def caption(self) -> str:
        drift = f"moving {self.pace} {self.way}" if self.way else "standing still"
        drawn = f"{self.ink} {self.pattern} set {self.set} on {self.paper}"
        return f"{drawn} {drift} in {self.light} light from {self.side}"

    @property
    def split(self) -> str:
        bucket = hashlib.sha256(self.caption.encode()).digest()[0]
        return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def ways(pattern: str) -> List[str]:
    """The ways whose drift can be seen: stripes along their own direction look the same anywhere."""
    sideways = ["left", "right"]
    seen = {"pillars": sideways, "ledges": ["up", "down"], "slants": sideways, "slopes": sideways}
    return seen.get(pattern, list(WAYS))


@functools.lru_cache(maxsize=None)
def all_textures() -> Tuple[Texture, ...]:
    palettes = list(itertools.permutations(COLOURS, 2))
    found = []
    for pattern in PATTERNS:
        drifts = [("", "")] + list(itertools.product(ways(pattern), PACES))
        for values in itertools.product(SETS, palettes, drifts, LIGHTS, SIDES):
            phase, (ink, paper), (way, pace), light, side = values
            found.append(Texture(pattern, phase, ink, paper, way, pace, light, side))
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
    ink, paper = (np.array(COLOURS[name]) + rng.uniform(-0.02, 0.02, 3) for name in (texture.ink, texture.paper))
    vectors = wave_vectors(texture.pattern)
    turns = SETS[texture.set] + LOOSE * rng.uniform(-1, 1, len(vectors))
    drift = vectors @ velocity(texture.way, texture.pace)
    phases = 2 * np.pi * turns[:, None] - drift[:, None] * TIMES
    height = np.mean([np.cos(along + phase[:, None, None]) for along, phase in zip(planes(vectors), phases)], axis=0)
    cover = 0.5 + 0.5 * np.tanh(1.8 * (height - 0.35))
    picture = paper + cover[..., None] * (ink - paper)
    gain = course(texture.light)[:, None, None] * fall(texture.side)
    return np.clip(picture * gain[..., None], 0, 1).astype(np.float32)


GRID, TIMES = np.arange(SIZE) - (SIZE - 1) / 2, np.arange(FRAMES) - (FRAMES - 1) / 2


def wave_vectors(pattern: str) -> np.ndarray:
    """Wave vectors (N, 2) as x, y, in radians a pixel."""
    return 2 * np.pi / PERIOD * np.array(PATTERNS[pattern], float)


def planes(vectors: np.ndarray) -> np.ndarray:
    """Phases (N, H, W) of waves at rest, none at the middle of the frame."""
    return vectors[:, :1, None] * GRID + vectors[:, 1:, None] * GRID[:, None]


def velocity(way: str, pace: str) -> np.ndarray:
    return np.array(WAYS.get(way, (0, 0))) * PACES.get(pace, 0.0)


def course(light: str) -> np.ndarray:
    """Brightness of every frame (T,)."""
    ramp = np.linspace(DARKEST, 1, FRAMES)
    return {"steady": np.ones(FRAMES), "brightening": ramp, "dimming": ramp[::-1]}[light]


def fall(side: str) -> np.ndarray:
    """Brightness of every pixel (H, W)."""
    ramp, even = np.linspace(1, DARKEST, SIZE), np.ones((SIZE, SIZE))
    return {"everywhere": even, "above": even * ramp[:, None], "left": even * ramp}[side]
