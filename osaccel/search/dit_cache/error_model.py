# SPDX-License-Identifier: Apache-2.0
"""What error of the final latents a cache will make, and how often it will turn a video into another one.

From one observed generation, the error up to one common factor.

Reusing a delta changes the latents of its step by about

    g(step, start, stop) * |change of the region's delta since it was stored|

The changes are known for every region, step and gap (`regions`); g is measured by single steps (`probes`), of what
stays of such a change: its low frequencies; what is finer is mostly corrected by later steps. Changes of neighbouring
steps point the same way, so their sizes are added up.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from osaccel.search.dit_cache.candidates import Candidate

# The share of videos that turn, over the lasting change that is made in the first EARLY of the steps. Not well known,
# as few turn: `python -m benchmarks.belief` gives it from 600 calibration videos.
TURNS, EARLY = 1.0, 0.3


class Gains(NamedTuple):
    """log g over the steps for a region of all blocks, and how it differs with where a region starts and stops.

    Args:
        steps: (step,), of all blocks.
        starts: (block + 1, step), how much more when the region starts at this block.
        stops: (block + 1, step), how much more when it stops before this block.
    """

    steps: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def unknown_gains(num_blocks: int, num_steps: int) -> Gains:
    """Where nothing was measured: an error that enters early passes through more blocks, and late steps matter more."""
    shape = (num_blocks + 1, num_steps)
    stops = (-1.2 * np.arange(num_blocks + 1) / num_blocks)[:, None]
    return Gains(np.linspace(0.0, 0.8, num_steps), np.zeros(shape), np.broadcast_to(stops, shape))


class Predictions(NamedTuple):
    """Of each candidate: the error, in a unit of their own; and the share of videos that turn into others."""

    errors: np.ndarray
    turned: np.ndarray


def predictions(pool: Sequence[Candidate], grams: np.ndarray, gains: Optional[Gains] = None) -> Predictions:
    """What every candidate of the pool is predicted to do.

    Args:
        grams: (gap, step, block, block), see `osaccel.search.dit_cache.region_errors`.
        gains: what was measured of g; without, no share of turned videos is predicted.
    """
    num_steps, num_blocks = grams.shape[1:3]
    turns = TURNS if gains else 0.0
    gains = gains or unknown_gains(num_blocks, num_steps)
    sums = np.pad(grams.cumsum(2).cumsum(3), ((0, 0), (0, 0), (1, 0), (1, 0)))
    errors, early = np.zeros(len(pool)), np.zeros(len(pool))
    together: Dict[Tuple[int, int], List[int]] = {}
    for row, candidate in enumerate(pool):
        together.setdefault((candidate.first, candidate.interval), []).append(row)
    for (first, interval), rows in together.items():
        steps = np.array([n for n in range(first, num_steps) if (n - first) % interval], dtype=int)
        corners = sums[(steps - first) % interval - 1, steps]
        start, stop = (np.array([pool[row][end] for row in rows]) for end in (0, 1))
        squares = corners[:, stop, stop] - corners[:, start, stop] - corners[:, stop, start] + corners[:, start, start]
        log_gain = (gains.steps + gains.starts[start] + gains.stops[stop])[:, steps]
        lasting = np.exp(log_gain) * np.sqrt(np.maximum(squares, 0.0)).T
        errors[rows], early[rows] = lasting.sum(1), lasting[:, steps < EARLY * num_steps].sum(1)
    return Predictions(errors, np.minimum(turns * early, 1.0))
