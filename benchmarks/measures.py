# SPDX-License-Identifier: Apache-2.0
"""Measures between samplings that share their Brownian motion: coupled error, energy distance, band deviations.

Every measure is paired over videos: the bootstrap resamples whole videos, the same ones in every arm.
"""

import contextlib
import math
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import torch

from osaccel.search.denoiser_log import NoiseLevels, cosine_matrix

MEASURES = ("coupled error", "energy distance", "low band", "middle band", "high band")


class Motion:
    """One Brownian motion W(lam), lam = 1 / s^2, on the union of all arms' noise levels; drawn again from its seed.

    A student step's noise is the normalised sum of the increments it passes, so arms differ by their steps alone.
    """

    def __init__(self, sigmas: Iterable[float], shape: Sequence[int], seed: int):
        self.snrs = sorted({round(1 / sigma**2, 12) for sigma in sigmas})
        self.shape, self.seed = tuple(shape), seed
        self._generator = torch.Generator().manual_seed(seed)
        self._first = torch.randn(self.shape, generator=self._generator)
        self._place = 0

    def initial(self) -> torch.Tensor:
        return self._first

    def until(self, snr: float) -> torch.Tensor:
        """Unit noise of the step that ends at `snr`."""
        total, width = torch.zeros(self.shape), 0.0
        while self.snrs[self._place] < snr * (1 - 1e-9):
            step = self.snrs[self._place + 1] - self.snrs[self._place]
            total += math.sqrt(step) * torch.randn(self.shape, generator=self._generator)
            width += step
            self._place += 1
        return total / math.sqrt(max(width, 1e-30))

    @contextlib.contextmanager
    def patched(self, module: Any, levels: NoiseLevels, times: Sequence[float]) -> Iterator[None]:
        """Let the scheduler in `module` draw its noise from this motion while it follows `times`."""
        ends = iter([round(1 / levels.sigma(time) ** 2, 12) for time in times[1:]])
        original = module.randn_tensor

        def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> torch.Tensor:
            end = next(ends, None)
            # The last step ends at s = 0 and its noise has no weight.
            noise = torch.zeros(self.shape) if end is None else self.until(end)
            return noise.to(device, dtype)

        module.randn_tensor = draw
        try:
            yield
        finally:
            module.randn_tensor = original


def band_deviations(x: torch.Tensor) -> torch.Tensor:
    """Squared 3-D cosine coefficients per video, averaged in three rings of frequency, (N, 3)."""
    axes = [cosine_matrix(size) for size in x.shape[2:]]
    power = torch.einsum("bcthw,pt,qh,rw->bcpqr", x.float(), *axes).square()
    grids = [torch.arange(size).float() / size for size in x.shape[2:]]
    radius = (grids[0][:, None, None] ** 2 + grids[1][None, :, None] ** 2 + grids[2][None, None, :] ** 2).sqrt()
    edges = radius.flatten().quantile(torch.tensor([1 / 3, 2 / 3]))
    ring = torch.bucketize(radius, edges)
    return torch.stack([power[:, :, ring == number].mean(dim=(1, 2)) for number in range(3)], dim=1)


def _distances(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    return torch.cdist(x.flatten(1).float(), y.flatten(1).float()).double().numpy()


class _Arm:
    """One arm's final latents reduced to what the bootstrap needs: everything per video or per pair of videos."""

    def __init__(self, final: torch.Tensor, teacher: torch.Tensor, data: torch.Tensor):
        self.errors = (final - teacher).flatten(1).square().mean(1).double().numpy()
        self.within, self.across = _distances(final, final), _distances(final, data).mean(1)
        self.power = band_deviations(final).double().numpy()

    def measures(self, rows: np.ndarray, inside: float, data_power: np.ndarray) -> Dict[str, float]:
        counts = np.bincount(rows, minlength=len(self.errors)).astype(float)
        n = counts.sum()
        # A video drawn twice is no independent pair with itself.
        pairs = counts @ self.within @ counts / (n * n - (counts**2).sum())
        values = {
            "coupled error": math.sqrt(self.errors[rows].mean()),
            "energy distance": 2 * self.across[rows].mean() - pairs - inside,
        }
        ratios = np.sqrt(self.power[rows].mean(0) / data_power)
        values.update(dict(zip(MEASURES[2:], ratios.tolist())))
        return values


def compare(
    results: Dict[str, torch.Tensor], data: Sequence[torch.Tensor], counts: Sequence[int], draws: int = 1000
) -> Dict[str, Any]:
    """All measures of all arms with 95 % bootstrap intervals, the gaps closed, and what differs clearly from plain.

    results: final latents per arm, "plain 100" the teacher; data: two sets of real latents, the second for the floor.
    """
    teacher = results["plain 100"]
    made = {name: _Arm(final, teacher, data[0]) for name, final in results.items()}
    inside = _distances(data[0], data[0]).sum() / (len(data[0]) * (len(data[0]) - 1))
    data_power = band_deviations(data[0]).double().numpy().mean(0)
    generator = np.random.default_rng(0)
    size = len(teacher)
    samples = [np.arange(size), *(generator.integers(0, size, size) for _ in range(draws))]
    boot = {name: [arm.measures(rows, inside, data_power) for rows in samples] for name, arm in made.items()}
    floor = _Arm(data[1], data[1], data[0]).measures(np.arange(len(data[1])), inside, data_power)
    report: Dict[str, Any] = {"videos": size, "floor": floor, "arms": {}, "against plain": {}, "gap closed": {}}
    for name, values in boot.items():
        report["arms"][name] = {measure: _interval([value[measure] for value in values]) for measure in MEASURES}
    for count in counts:
        for name in results:
            if name.endswith(f" {count}") and not name.startswith("plain"):
                report["against plain"][name], report["gap closed"][name] = _against(boot, name, f"plain {count}")
    return report


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
    lines = [f"{report['videos']} videos; 95 % bootstrap intervals", _row("arm", MEASURES)]
    for name, values in report["arms"].items():
        lines.append(_row(name, [_cell(values[measure]) for measure in MEASURES]))
    lines.append(_row("data against data", [f"{report['floor'][measure]:.4f}" for measure in MEASURES]))
    lines += ["", "loss minus plain's (negative is better; * clear of zero)", _row("arm", MEASURES)]
    for name, values in report["against plain"].items():
        lines.append(_row(name, [_cell(values[measure], mark=True) for measure in MEASURES]))
    lines += ["", "gap to 100 steps closed", _row("arm", MEASURES)]
    for name, values in report["gap closed"].items():
        lines.append(_row(name, [_cell(values[measure]) for measure in MEASURES]))
    return "\n".join(lines)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<18}" + "".join(f"{cell:>30}" for cell in cells)


def _cell(value: Sequence[float], mark: bool = False) -> str:
    clear = "*" if mark and (value[1] > 0 or value[2] < 0) else ""
    return f"{value[0]:.4f} [{value[1]:.4f}, {value[2]:.4f}]{clear}"
