# SPDX-License-Identifier: Apache-2.0
"""How far an arm's videos are from the plain run of the same noise, and how sure that is."""

import math
from typing import Any, Callable, Dict, List, Sequence

import numpy as np

from benchmarks.lib.bench import Sample
from osaccel.search.frames import psnr

__all__ = ["STATISTICS", "TURNED", "errors", "interval", "over", "psnr", "summary", "turned", "worst_tenth"]

# Relative errors are below .2 or near the size of the latents: then it is another video.
TURNED = 0.5
LOST = 1e6
DRAWS = 2000

# A statistic of values along an axis.
Statistic = Callable[..., Any]


def errors(samples: Sequence[Sample], plain: Sequence[Sample]) -> List[float]:
    """Relative L2 of the final latents, video by video; `LOST` where they are not finite."""
    each = [float((own.latents - base.latents).norm() / base.latents.norm()) for own, base in zip(samples, plain)]
    return [error if math.isfinite(error) else LOST for error in each]


def worst_tenth(values: Any, axis: int = 0) -> Any:
    """The mean of the largest tenth, of one value at least."""
    values = np.sort(np.asarray(values), axis=axis)
    count = values.shape[axis]
    return np.take(values, range(count - max(1, round(count / 10)), count), axis=axis).mean(axis=axis)


def turned(values: Any, axis: int = 0) -> Any:
    """The share of videos that became others."""
    return (np.asarray(values) > TURNED).mean(axis=axis)


# What a table says of errors. "typical" is the median: a few turned videos do not move it.
STATISTICS: Dict[str, Statistic] = {
    "mean": np.mean, "typical": np.median, "worst tenth": worst_tenth, "turned": turned
}  # fmt: skip


def interval(values: Any, statistic: Statistic = np.mean) -> List[float]:
    """The statistic and its 95 % bootstrap interval over videos (the first axis).

    The same videos are drawn for every arm of as many, so statistics of several arms' values in one array are paired.
    """
    drawn = np.random.default_rng(0).choice(np.asarray(values), (DRAWS, len(values)))
    return [float(statistic(values, axis=0)), *map(float, np.percentile(statistic(drawn, axis=1), [2.5, 97.5]))]


def over(own: Sequence[float], other: Sequence[float], statistic: Statistic = np.mean) -> List[float]:
    """How much larger the statistic of the first errors is than that of the second, with its paired interval."""

    def ratio(pairs: Any, axis: int = 0) -> Any:
        found = statistic(pairs, axis=axis)
        return found[..., 0] / found[..., 1] - 1

    return interval(np.array([own, other]).T, ratio)


def summary(values: Sequence[float]) -> Dict[str, List[float]]:
    """Every statistic of errors with its interval."""
    return {name: interval(values, statistic) for name, statistic in STATISTICS.items()}
