# SPDX-License-Identifier: Apache-2.0
"""Reads the miniature's scenes back from frames: count, shape, colour, size, motion, background, every shape's path.

Works on the fact that shapes are vivid and backdrops nearly grey. `parse` never fails: what it cannot read is None.
"""

import re
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

# As the videos are drawn (benchmarks/reference/data.py).
COLOURS = {
    "red": (0.92, 0.10, 0.10),
    "green": (0.12, 0.80, 0.15),
    "blue": (0.15, 0.22, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.90, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
SLIDES = ("moving left", "moving right", "moving up", "moving down")
BOUNCES = ("bouncing off the left", "bouncing off the right", "bouncing off the ceiling", "bouncing off the floor")
SCALINGS = ("growing", "shrinking")
MOTIONS = SLIDES + BOUNCES + SCALINGS + ("spinning",)
# Side of the frame's middle, x and y.
PLACES = {"in the middle": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1),
          "at the bottom": (0, 1)}  # fmt: skip
COUNTS = {"one": 1, "two": 2}
PROMPT = re.compile(
    r"(?P<count>one|two) (?:(?P<size>small|large) )?(?P<colour>\w+) (?P<shape>circle|square|triangle)s? "
    rf"(?P<motion>{'|'.join(MOTIONS)}) (?:(?P<place>{'|'.join(PLACES)}) )?over a (?P<background>\w+) background"
)

VIVID = 0.40  # least spread between the largest and smallest colour channel of a shape's pixel
GREY = 0.12  # spread of a backdrop's pixel at most
LEAST_AREA = 10  # pixels; the smallest shape drawn has 40
BETWEEN = 4.8  # radius between small and large
ASIDE = 2.6  # pixels from the frame's middle at which a shape is at a side of it
STEADY = 0.8  # share of the frames that must show the same number of shapes


@dataclass
class Track:
    """One shape over the clip; arrays have one row per frame that shows it."""

    frames: np.ndarray  # frame numbers
    centres: np.ndarray  # (n, 2), x and y in pixels
    radii: np.ndarray  # of the disc of equal area, in pixels
    colour: str
    shape: str
    motion: Optional[str]
    place: str
    size: str
    velocity: np.ndarray  # least-squares pixels per frame, x and y
    moves_on: bool  # the motion goes on in each third of the clip


@dataclass
class Reading:
    """What the frames show; `steady` is the share of frames with the usual number of shapes."""

    steady: float
    background: str
    tracks: List[Track] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.tracks)

    def agreed(self, attribute: str) -> Optional[str]:
        """The value all tracks share, or None."""
        values = {getattr(track, attribute) for track in self.tracks}
        return values.pop() if len(values) == 1 else None


def parse(frames: np.ndarray) -> Reading:
    """Read uint8 frames (T, H, W, 3)."""
    pixels = np.asarray(frames, dtype=np.float32) / 255.0
    spread = pixels.max(-1) - pixels.min(-1)
    covers = [_covers(frame) for frame in spread]
    usual = int(np.bincount([len(found) for found in covers]).argmax())
    shown = [number for number, found in enumerate(covers) if len(found) == usual]
    reading = Reading(steady=len(shown) / len(covers), background=_background(pixels, spread > GREY))
    if usual and len(shown) >= 6:
        chains = _chains([covers[number] for number in shown])
        reading.tracks = [_track(np.array(shown), chain, pixels) for chain in chains]
    return reading


def _covers(spread: np.ndarray) -> List[np.ndarray]:
    """How much of every pixel each shape covers, by its vividness; a connected vivid region is a shape."""
    labels, number = ndimage.label(spread > VIVID)
    found = []
    for label in range(1, number + 1):
        region = labels == label
        if region.sum() < LEAST_AREA:
            continue
        full = np.percentile(spread[region], 75)
        # The half-covered pixels around the region are its own, unless another region is as near.
        others = ndimage.binary_dilation((labels > 0) & ~region)
        near = region | (ndimage.binary_dilation(region, iterations=2) & ~others)
        found.append(np.where(near, np.clip((spread - GREY) / (full - GREY), 0, 1), 0))
    return found


def _offsets(cover: np.ndarray):
    """Centre of a cover as x, y in pixels, and every pixel's place about it as a complex number."""
    rows, columns = np.indices(cover.shape) + 0.5
    centre = np.array([(cover * columns).sum(), (cover * rows).sum()]) / cover.sum()
    return centre, (columns - centre[0]) + 1j * (rows - centre[1])


def _chains(covers: List[List[np.ndarray]]) -> List[List[np.ndarray]]:
    """The shapes of every frame in the order of the frame before, nearest centres first."""
    ordered = [covers[0]]
    for current in covers[1:]:
        before = np.array([_offsets(cover)[0] for cover in ordered[-1]])
        here = np.array([_offsets(cover)[0] for cover in current])
        distance = np.linalg.norm(before[:, None] - here[None], axis=-1)
        ordered.append([current[index] for index in linear_sum_assignment(distance)[1]])
    return [list(chain) for chain in zip(*ordered)]


def _track(shown: np.ndarray, chain: List[np.ndarray], pixels: np.ndarray) -> Track:
    centres = np.array([_offsets(cover)[0] for cover in chain])
    radii = np.sqrt(np.array([cover.sum() for cover in chain]) / np.pi)
    mean = np.mean([pixels[number][cover > 0.8].mean(0) for number, cover in zip(shown, chain)], axis=0)
    harmonics = {order: np.array([_harmonic(cover, order) for cover in chain]) for order in (3, 4)}
    shape = _shape({order: np.abs(values).mean() for order, values in harmonics.items()})
    turn = _turn(harmonics, shape)
    motion = _motion(centres, radii, turn)
    return Track(
        frames=shown,
        centres=centres,
        radii=radii,
        colour=min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - mean).sum()),
        shape=shape,
        motion=motion,
        place=_place(centres, motion, pixels.shape[1:3]),
        size=_size(radii, motion),
        velocity=np.polyfit(shown, centres, 1)[0],
        moves_on=_moves_on(shown, centres, radii, turn, motion),
    )


def _harmonic(cover: np.ndarray, order: int) -> complex:
    """Angular Fourier coefficient of the cover about its centre, weighted by distance ** order, scale-free."""
    place = _offsets(cover)[1]
    return (cover * place**order).sum() / (cover * np.abs(place) ** order).sum()


def _shape(strength: Dict[int, float]) -> str:
    # Ideal values: triangle 0.48 at order 3, square 0.43 at order 4, disc 0 at both; soft edges lower them.
    if strength[3] > 0.20:
        return "triangle"
    return "square" if strength[4] > 0.14 else "circle"


def _turn(harmonics, shape: str) -> np.ndarray:
    """The tilt of a polygon in degrees, unwrapped; zeros for a disc."""
    if shape == "circle":
        return np.zeros(len(harmonics[3]))
    order = 3 if shape == "triangle" else 4
    return np.rad2deg(np.unwrap(np.angle(harmonics[order])) / order)


def _size(radii: np.ndarray, motion: Optional[str]) -> str:
    if motion in SCALINGS:
        return ""
    return "small" if np.median(radii) < BETWEEN else "large"


def _motion(centres, radii, turn) -> Optional[str]:
    growth = radii[-3:].mean() / radii[:3].mean()
    if growth > 1.2 or growth < 1 / 1.2:
        return "growing" if growth > 1 else "shrinking"
    spread = np.ptp(centres, axis=0)
    if spread.max() < 4:
        return "spinning" if abs(turn[-1] - turn[0]) > 40 else None
    axis = int(spread.argmax())
    if spread[1 - axis] > 0.4 * spread[axis]:
        return None
    path = centres[:, axis]
    net = path[-1] - path[0]
    if abs(net) < 0.78 * spread[axis]:
        third = len(path) // 3
        inner, outer = path[third:-third].mean(), np.concatenate([path[:third], path[-third:]]).mean()
        return BOUNCES[2 * axis + int(inner > outer)]
    return ("moving right", "moving down")[axis] if net > 0 else ("moving left", "moving up")[axis]


def _place(centres: np.ndarray, motion: Optional[str], frame: Tuple[int, int]) -> str:
    """The side on which the shape is, or moves past the middle; a bounce or a slide has no place along its own way."""
    offset = centres.mean(0) - np.array(frame[::-1]) / 2
    if motion in SLIDES + BOUNCES:
        offset[int(np.ptp(centres, axis=0).argmax())] = 0
    side = np.where(np.abs(offset) > ASIDE, np.sign(offset), 0)
    return next((name for name, direction in PLACES.items() if tuple(side) == direction), "in a corner")


def _moves_on(shown, centres, radii, turn, motion) -> bool:
    """Whether each third of the clip covers at least 40 % of its share of the way."""
    if motion is None:
        return False
    if motion in SCALINGS:
        course = radii
    elif motion == "spinning":
        course = turn
    else:
        course = centres[:, int(np.ptp(centres, axis=0).argmax())]
    way = np.concatenate([[0.0], np.abs(np.diff(course)).cumsum()])
    marks = np.interp(np.linspace(shown[0], shown[-1], 4), shown, way)
    return bool((np.diff(marks) >= 0.4 * way[-1] / 3).all())


def _background(pixels: np.ndarray, masks: np.ndarray) -> str:
    """Median over time of the pixels no shape covers; stripes are what a slanted plane does not explain."""
    grown = np.stack([ndimage.binary_dilation(mask, iterations=1) for mask in masks])
    level = np.where(grown, np.nan, pixels.mean(-1))
    seen = ~np.isnan(level).all(0)
    if seen.sum() < 16:  # vivid noise all over
        return "none"
    backdrop = np.nanmedian(level[:, seen], axis=0)
    rows, columns = np.nonzero(seen)
    plane = np.stack([rows, columns, np.ones_like(rows)], axis=1).astype(np.float32)
    rest = backdrop - plane @ np.linalg.lstsq(plane, backdrop, rcond=None)[0]
    if rest.std() > 0.05:
        return "striped"
    return "light" if backdrop.mean() > 0.49 else "dark"


ATTRIBUTES = ("count", "size", "colour", "shape", "motion", "place", "background")


def attributes(prompt: str) -> Dict[str, str]:
    """What a prompt asks for; `size` or `place` is empty where it names none. ValueError for any other prompt."""
    found = PROMPT.fullmatch(prompt)
    if found is None:
        raise ValueError(f"{prompt!r} is no prompt of the miniature, such as 'two small red circles moving up over a "
                         "dark background'.")  # fmt: skip
    return {name: value or "" for name, value in found.groupdict().items()}


def judge(frames: np.ndarray, prompt: str) -> Dict[str, bool]:
    """Which prompted attributes the frames show; `valid` is all of them in a steady scene."""
    asked, reading = attributes(prompt), parse(frames)
    result = {name: reading.agreed(name) == asked[name] for name in ATTRIBUTES[1:5]}
    result["place"] = not asked["place"] or reading.agreed("place") == asked["place"]
    result["count"] = reading.count == COUNTS[asked["count"]]
    result["background"] = reading.background == asked["background"]
    result["steady"] = reading.steady >= STEADY
    result["valid"] = all(result.values())
    result["moves_on"] = bool(reading.tracks) and all(track.moves_on for track in reading.tracks)
    return result


def score(videos: Sequence[np.ndarray], prompts: Sequence[str]) -> Dict[str, float]:
    """Mean of every judgement over videos (N, T, H, W, 3), uint8, or a tensor of that shape."""
    verdicts = [judge(np.asarray(video), prompt) for video, prompt in zip(videos, prompts)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}
