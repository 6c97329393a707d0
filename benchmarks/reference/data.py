# SPDX-License-Identifier: Apache-2.0
"""Procedural videos of moving shapes with captions: seeded, unlimited, and split so that no prompt or seed is shared.

A `Scene` is what a caption says; it says nearly all, as the long captions of text-to-video training sets do.
`render(scene, rng)` draws what it leaves open (exact place and speed, shade, backdrop), so a video is a pure function
of (scene, seed). Lengths are in pixels of a 32 x 32 frame, speeds in pixels per frame.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import Dict, Iterator, List, Tuple

import numpy as np

from osaccel.demo.parser import BOUNCES, COLOURS, COUNTS, MOTIONS, PLACES, SCALINGS, SLIDES

FRAMES, SIZE = 17, 32
# What captions are padded to; none is longer.
CAPTION_WORDS = 16

# Radius of the disc of equal area, so that size and shape are independent attributes.
RADII = {"small": (3.7, 4.0), "large": (5.6, 6.0)}
# Edges of the polygon (0 is a disc) and the distance of an edge from the centre for the disc radius 1.
SHAPES = {"circle": (0, 1.0), "square": (4, 0.8862), "triangle": (3, 0.7776)}
BACKGROUNDS = ("dark", "light", "striped")

# Share of the 256 hash buckets; the split of a prompt depends on its text alone.
SPLITS = {"train": (0, 200), "calibration": (200, 226), "heldout": (226, 256)}
ASIDE = 5.2  # of a shape's path or place from the middle of the frame, where the caption names a side
APART = (7.4, 8.4)  # of two shapes' paths from the middle: they stay two connected regions, and inside the frame
GROWTH = (3.6, 5.9)  # radii at the two ends of growing and shrinking


@dataclass(frozen=True)
class Scene:
    """The attributes a caption names.

    `size` is empty where the motion itself changes the size, `place` for two shapes, which fill the frame side by side.
    """

    count: str
    size: str
    colour: str
    shape: str
    motion: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        noun = self.shape if self.count == "one" else self.shape + "s"
        words = [self.count, self.size, self.colour, noun, self.motion, self.place, "over a", self.background]
        words.append("background")
        return " ".join(word for word in words if word)

    @property
    def split(self) -> str:
        bucket = hashlib.sha256(self.caption.encode()).digest()[0]
        return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def _allowed(scene: Scene) -> bool:
    if scene.count == "two":  # what fits side by side
        return scene.size == "small" and scene.motion in SLIDES + BOUNCES and not scene.place
    if scene.place not in places(scene.motion):
        return False
    if scene.motion in SCALINGS:
        return scene.size == ""
    if scene.motion == "spinning":  # a disc shows no turn, and a small polygon too little of it
        return scene.size == "large" and scene.shape != "circle"
    return scene.size != ""


def places(motion: str) -> List[str]:
    """Where one shape of this motion may be: off the middle only across the way it goes."""
    if motion not in SLIDES + BOUNCES:
        return list(PLACES)
    return [name for name, side in PLACES.items() if side[_axis(motion)] == 0]


@functools.lru_cache(maxsize=None)
def all_scenes() -> Tuple[Scene, ...]:
    axes = (COUNTS, ("", *RADII), COLOURS, SHAPES, MOTIONS, ("", *PLACES), BACKGROUNDS)
    return tuple(scene for scene in (Scene(*values) for values in itertools.product(*axes)) if _allowed(scene))


def scenes(split: str) -> List[Scene]:
    """The scenes of one split, in a fixed mixed order, so that a prefix of the list is a fair sample."""
    chosen = [scene for scene in all_scenes() if scene.split == split]
    return sorted(chosen, key=lambda scene: hashlib.sha256(("order " + scene.caption).encode()).hexdigest())


def by_caption() -> Dict[str, Scene]:
    return {scene.caption: scene for scene in all_scenes()}


def seed_sequence(split: str, index: int) -> np.random.Generator:
    """The random stream of video `index`; the split is part of the seed, so streams of two splits never meet."""
    return np.random.default_rng([20240701, list(SPLITS).index(split), index])


def sample(split: str, index: int) -> Tuple[np.ndarray, str]:
    """Video `index` of a split: uint8 frames (T, H, W, 3) and the caption."""
    rng = seed_sequence(split, index)
    pool = _balanced(split)
    group = pool[rng.integers(len(pool))]
    scene = group[rng.integers(len(group))]
    return render(scene, rng), scene.caption


def stream(split: str, start: int = 0) -> Iterator[Tuple[np.ndarray, str]]:
    return (sample(split, index) for index in itertools.count(start))


_POOLS: Dict[str, List[List[Scene]]] = {}


def _balanced(split: str) -> List[List[Scene]]:
    """Scenes grouped by motion: drawing the group first shows rare motions as often as frequent ones."""
    if split not in _POOLS:
        groups = [[scene for scene in scenes(split) if scene.motion == motion] for motion in MOTIONS]
        _POOLS[split] = [group for group in groups if group]
    return _POOLS[split]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw one video of `scene`: uint8 (FRAMES, SIZE, SIZE, 3)."""
    canvas = np.repeat(_background(scene.background, rng)[None], FRAMES, axis=0)
    radius, tilt = _radius(scene, rng), _tilt(scene, rng)
    reach = radius.max() * _reach(scene)
    colour = np.clip(np.array(COLOURS[scene.colour]) + rng.uniform(-0.04, 0.04, 3), 0, 1).astype(np.float32)
    for centre in _paths(scene, reach, rng):
        cover = _coverage(scene.shape, centre, radius, tilt)[..., None]
        canvas += cover * (colour - canvas)
    return (canvas * 255 + 0.5).astype(np.uint8)


def _reach(scene: Scene) -> float:
    """Half the extent of a shape of disc radius 1, an upper bound over its tilts."""
    edges, apothem = SHAPES[scene.shape]
    if edges == 0 or (edges == 4 and scene.motion != "spinning"):
        return apothem
    return apothem / np.cos(np.pi / edges)


def _radius(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    if scene.motion in SCALINGS:
        ends = np.array(GROWTH) + rng.uniform(-0.1, 0.1, 2)
        path = np.linspace(ends[0], ends[1], FRAMES)
        return path if scene.motion == "growing" else path[::-1]
    return np.full(FRAMES, rng.uniform(*RADII[scene.size]))


def _tilt(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Angle of the first edge's normal; a triangle at rest points up."""
    rest = np.pi / 2 if scene.shape == "triangle" else 0.0
    if scene.motion != "spinning":
        return np.full(FRAMES, rest)
    start, step = np.deg2rad(rng.uniform(-6, 6)), np.deg2rad(rng.uniform(5, 6.5))
    return rest + start + step * np.arange(FRAMES)


def _paths(scene: Scene, reach: float, rng: np.random.Generator) -> List[np.ndarray]:
    """Centres (FRAMES, 2) as x, y of every shape; two of them share the way and stand side by side across it."""
    if scene.motion not in SLIDES + BOUNCES:
        place = SIZE / 2 + ASIDE * np.array(PLACES[scene.place]) + rng.uniform(-0.8, 0.8, 2)
        return [np.repeat(place[None], FRAMES, axis=0)]
    along, axis = _along(scene.motion, reach, rng), _axis(scene.motion)
    if scene.count == "two":
        apart = rng.uniform(*APART)
        sides = [-apart, apart]
    else:
        sides = [ASIDE * PLACES[scene.place][1 - axis] + rng.uniform(-0.8, 0.8)]
    pairs = [(along, np.full(FRAMES, SIZE / 2 + side)) for side in sides]
    return [np.stack(pair[:: 1 - 2 * axis], axis=1) for pair in pairs]


def _axis(motion: str) -> int:
    """Along which a slide or a bounce goes: 0 for x, 1 for y."""
    return 0 if motion.split()[-1] in ("left", "right") else 1


def _along(motion: str, reach: float, rng: np.random.Generator) -> np.ndarray:
    """The coordinate that moves, in every frame."""
    time, forth = np.arange(FRAMES), motion.split()[-1] in ("right", "down", "floor")
    if motion in SLIDES:
        way = rng.uniform(0.6, 0.7) * (time - FRAMES // 2)
        return SIZE / 2 + rng.uniform(-1, 1) + (way if forth else -way)
    # The wall is met once, in the middle of the clip.
    away = reach + rng.uniform(0.95, 1.1) * np.abs(time - rng.uniform(7, 9))
    return SIZE - away if forth else away


def _coverage(shape: str, centre: np.ndarray, radius: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Share of every pixel that the shape covers, (T, H, W), with an edge 1.2 pixels wide."""
    edges, apothem = SHAPES[shape]
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    x = (grid - centre[:, :1].astype(np.float32))[:, None, :]
    y = (grid - centre[:, 1:].astype(np.float32))[:, :, None]
    if edges == 0:
        distance = np.sqrt(x * x + y * y)
    else:
        distance = None
        for edge in range(edges):
            angle = (tilt + 2 * np.pi * edge / edges).astype(np.float32)[:, None, None]
            plane = np.cos(angle) * x + np.sin(angle) * y
            distance = plane if distance is None else np.maximum(distance, plane, out=distance)
    limit = (apothem * radius).astype(np.float32)[:, None, None]
    return np.clip(0.5 + (limit - distance) / 1.2, 0, 1)


def _background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A nearly grey backdrop (H, W, 3): a slanted gradient, with stripes where asked for."""
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE - 0.5
    y, x = np.meshgrid(grid, grid, indexing="ij")
    base = {"dark": (0.10, 0.24), "light": (0.74, 0.88), "striped": (0.42, 0.54)}[kind]
    slant = rng.uniform(0, 2 * np.pi)
    level = rng.uniform(*base) + rng.uniform(0.05, 0.16) * (np.cos(slant) * x + np.sin(slant) * y)
    if kind == "striped":
        angle = rng.choice([0.0, np.pi / 2])
        phase = 2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) * 4 + rng.uniform(0, 2 * np.pi)
        level = level + 0.13 * np.tanh(2.0 * np.sin(phase))
    tint = rng.uniform(-0.035, 0.035, 3).astype(np.float32)
    return np.clip(level[..., None] + tint, 0, 1).astype(np.float32)
