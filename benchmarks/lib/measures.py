# SPDX-License-Identifier: Apache-2.0
"""Measures between samplings that share their Brownian motion: coupled error, distances to data, band deviations.

Videos come in groups: all videos of one prompt, or mixture, compared with fresh data of that prompt only, so that what
differs from prompt to prompt is no noise. Distances are unbiased within a group, their values means over the groups.
Without groups the videos are compared with all data at once. Every measure is paired: the bootstrap resamples whole
groups, or videos, the same ones in every arm.
"""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel.search.timesteps.denoised import cosine_matrix

MEASURES = ("coupled error", "typical error", "energy distance", "mmd", "low band", "middle band", "high band")
BANDS = MEASURES[4:]


def band_deviations(x: torch.Tensor) -> torch.Tensor:
    """Squared 3-D cosine coefficients per video, averaged in three rings of frequency, (N, 3)."""
    axes = [cosine_matrix(size) for size in x.shape[2:]]
    power = torch.einsum("bcthw,pt,qh,rw->bcpqr", x.float(), *axes).square()
    grids = [torch.arange(size).float() / size for size in x.shape[2:]]
    radius = (grids[0][:, None, None] ** 2 + grids[1][None, :, None] ** 2 + grids[2][None, None, :] ** 2).sqrt()
    edges = radius.flatten().quantile(torch.tensor([1 / 3, 2 / 3]))
    ring = torch.bucketize(radius, edges)
    return torch.stack([power[:, :, ring == number].mean(dim=(1, 2)) for number in range(3)], dim=1)


class Data:
    """Fresh real latents, what every arm is compared with.

    latents: (groups * n, C, T, H, W), the same number for every group, group after group; groups: None for no prompts.
    """

    def __init__(self, latents: torch.Tensor, groups: Optional[int]):
        self.parts = _grouped(latents, groups or 1)
        inside = [_off_diagonal(_distances(part, part)) for part in self.parts]
        # One kernel width for all groups: the median distance between two data of a group.
        self.width = float(np.median(np.concatenate(inside)))
        self.inside = np.array([[values.mean() for values in self.both(part)] for part in inside])
        power = band_deviations(latents).double().numpy().reshape(len(self.parts), -1, 3).mean(1)
        self.power = power if groups else power[0]

    def both(self, distances: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """The distances and their Gaussian kernel with the other sign, so that both are treated alike."""
        return distances, -np.exp(-0.5 * (distances / self.width) ** 2)


def _grouped(latents: torch.Tensor, groups: int) -> List[torch.Tensor]:
    if len(latents) % groups:
        raise ValueError(f"{len(latents)} videos are not {groups} groups of the same size")
    return list(latents.flatten(1).float().chunk(groups))


def _distances(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    return torch.cdist(x, y).double().numpy()


def _off_diagonal(square: np.ndarray) -> np.ndarray:
    """Without each video's distance to itself: (n, n) to (n * (n - 1),)."""
    return square[~np.eye(len(square), dtype=bool)]


class _GroupDistances:
    """Energy distance and squared mmd of each group; a bootstrap draw is a weighted mean of them."""

    def __init__(self, final: torch.Tensor, data: Data):
        rows = []
        for part, other, inside in zip(_grouped(final, len(data.parts)), data.parts, data.inside):
            across = [values.mean() for values in data.both(_distances(part, other))]
            within = [values.mean() for values in data.both(_off_diagonal(_distances(part, part)))]
            rows.append(2 * np.array(across) - np.array(within) - inside)
        self.values = np.array(rows)

    def mean(self, counts: np.ndarray) -> np.ndarray:
        return counts @ self.values / counts.sum()


class _PooledDistances:
    """The same of all videos against all data; a bootstrap draw weighs pairs of videos."""

    def __init__(self, final: torch.Tensor, data: Data):
        flat = final.flatten(1).float()
        self.inside = data.inside[0]
        self.across = [values.mean(1) for values in data.both(_distances(flat, data.parts[0]))]
        self.within = [values * (1 - np.eye(len(flat))) for values in data.both(_distances(flat, flat))]

    def mean(self, counts: np.ndarray) -> np.ndarray:
        n = counts.sum()
        # A video drawn twice is no independent pair with itself.
        pairs = [counts @ values @ counts / (n * n - (counts**2).sum()) for values in self.within]
        return 2 * np.array([counts @ values / n for values in self.across]) - np.array(pairs) - self.inside


class _Arm:
    """One arm's final latents reduced to what the bootstrap needs: everything per group, or per video."""

    def __init__(self, final: torch.Tensor, teacher: torch.Tensor, data: Data, groups: Optional[int]):
        size = groups or len(final)
        self.errors = (final - teacher).flatten(1).square().mean(1).double().numpy().reshape(size, -1)
        self.distances = _GroupDistances(final, data) if groups else _PooledDistances(final, data)
        self.power = band_deviations(final).double().numpy().reshape(size, -1, 3).mean(1)
        self.data_power = data.power

    def measures(self, counts: np.ndarray) -> Dict[str, float]:
        """counts: how often each group is drawn."""
        weights = counts / counts.sum()
        energy, kernel = self.distances.mean(counts)
        values = {
            "coupled error": math.sqrt(weights @ self.errors.mean(1)),
            "typical error": math.sqrt(np.median(np.repeat(self.errors, counts.astype(int), axis=0))),
            "energy distance": float(energy),
            "mmd": float(kernel),
        }
        real = weights @ self.data_power if self.data_power.ndim == 2 else self.data_power
        ratios = np.sqrt((weights @ self.power) / real)
        values.update(dict(zip(BANDS, ratios.tolist())))
        return values


def compare(
    results: Dict[str, torch.Tensor],
    data: Sequence[torch.Tensor],
    counts: Sequence[int],
    groups: Optional[int] = None,
    draws: int = 1000,
    pairs: Sequence[Tuple[str, str]] = (),
) -> Dict[str, Any]:
    """All measures of all arms with 95 % bootstrap intervals, the gaps closed, and what differs clearly from plain.

    results: final latents per arm, group after group, at least two of each group, "plain 100" the teacher.
    data: real latents, group after group, and a second set of the arms' size for the floor.
    groups: how many prompts; None where there are none.
    pairs: arms of any length whose losses are to be compared as well.
    """
    teacher, real = results["plain 100"], Data(data[0], groups)
    made = {name: _Arm(final, teacher, real, groups) for name, final in results.items()}
    made["data against data"] = _Arm(data[1], data[1], real, groups)
    generator, size = np.random.default_rng(0), groups or len(teacher)
    drawn = [generator.integers(0, size, size) for _ in range(draws)]
    samples = [np.ones(size), *(np.bincount(rows, minlength=size).astype(float) for rows in drawn)]
    boot = {name: [arm.measures(rows) for rows in samples] for name, arm in made.items()}
    report: Dict[str, Any] = {"videos": len(teacher), "groups": groups, "arms": {}, "against plain": {},
                              "gap closed": {}}  # fmt: skip
    for name, values in boot.items():
        report["arms"][name] = {measure: _interval([value[measure] for value in values]) for measure in MEASURES}
    report["floor"] = report["arms"].pop("data against data")
    for count in counts:
        for name in results:
            if name.endswith(f" {count}") and not name.startswith("plain"):
                report["against plain"][name], report["gap closed"][name] = _against(boot, name, f"plain {count}")
    if pairs:
        report["pairs"] = {f"{one} - {other}": _difference(boot, one, other) for one, other in pairs}
    return report


def _difference(boot: Dict[str, List[Dict[str, float]]], one: str, other: str) -> Dict[str, List[float]]:
    """By measure: how much more the first one loses."""
    found = {}
    for measure in MEASURES:
        ours, theirs = (np.array([_loss(measure, value[measure]) for value in boot[arm]]) for arm in (one, other))
        found[measure] = _interval(ours - theirs)
    return found


def _loss(measure: str, value: float) -> float:
    """What is better when smaller: a band's ratio counts by its distance from one."""
    return abs(1 - value) if measure.endswith("band") else value


def _against(boot: Dict[str, List[Dict[str, float]]], name: str, plain: str) -> Tuple[Dict, Dict]:
    difference, closed = {}, {}
    for measure in MEASURES:
        ours, theirs, best = (
            np.array([_loss(measure, value[measure]) for value in boot[arm]]) for arm in (name, plain, "plain 100")
        )
        difference[measure] = _interval(ours - theirs)
        gap = theirs - best
        closed[measure] = _interval((theirs - ours) / np.where(np.abs(gap) < 1e-12, np.nan, gap))
    return difference, closed


def _interval(values: Any) -> List[float]:
    """[value on all videos, lower and upper end of the 95 % bootstrap interval]."""
    values = np.asarray(values, dtype=float)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5]) if np.isfinite(values[1:]).any() else (math.nan, math.nan)
    return [float(values[0]), float(low), float(high)]


def table(report: Dict[str, Any]) -> str:
    """Readable: one row per arm, then differences to plain (* where the interval excludes zero) and gaps closed."""
    lines = [
        f"{report['videos']} videos in {report['groups'] or 1} groups; 95 % bootstrap intervals",
        _row("arm", MEASURES),
    ]
    for name, values in report["arms"].items():
        lines.append(_row(name, [_cell(values[measure]) for measure in MEASURES]))
    lines.append(_row("data against data", [_cell(report["floor"][measure]) for measure in MEASURES]))
    lines += ["", "loss minus plain's (negative is better; * clear of zero)", _row("arm", MEASURES)]
    for name, values in report["against plain"].items():
        lines.append(_row(name, [_cell(values[measure], mark=True) for measure in MEASURES]))
    if "pairs" in report:
        lines += ["", "loss minus that of more steps", _row("arms", MEASURES)]
        lines += [_row(name, [_cell(values[measure], mark=True) for measure in MEASURES])
                  for name, values in report["pairs"].items()]  # fmt: skip
    lines += ["", "gap to 100 steps closed", _row("arm", MEASURES)]
    for name, values in report["gap closed"].items():
        lines.append(_row(name, [_cell(values[measure]) for measure in MEASURES]))
    return "\n".join(lines)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<36}" + "".join(f"{cell:>28}" for cell in cells)


def _cell(value: Sequence[float], mark: bool = False) -> str:
    clear = "*" if mark and (value[1] > 0 or value[2] < 0) else ""
    return f"{value[0]:.4f} [{value[1]:.4f}, {value[2]:.4f}]{clear}"
