# SPDX-License-Identifier: Apache-2.0
"""Caches at equal computed blocks on the trained miniature.

    python -m benchmarks.caches [--prompts 12] [--ratio 1.6] [--json FILE]      one table
    python -m benchmarks.caches --curve FILE.png [--json FILE]                  fidelity against computed blocks

The ratio is all block calls of the plain 100-step run / those of an arm. Every arm samples the same held-out prompts
from the same noise and with the same warm-up. Methods with a threshold get one that meets the budget on
calibration prompts. Intervals are 95 % bootstrap over prompts; errors are against the plain 100-step run.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from benchmarks import masks, packages, rules
from benchmarks.harness import Arm, Bench, judged, meet_budget, run_arms
from benchmarks.reference.load import STEPS, calibration_prompts, heldout_prompts, load_pipeline
from benchmarks.reference.paths import CHECKPOINT
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.formats import read_cache_config
from osaccel.generation import Generation
from osaccel.network.policy import IntervalPolicy, MaskPolicy, Region, computed_blocks

WARMUP = 10
RATIO, RATIOS = 1.6, (1.3, 1.5, 1.8, 2.2)
CALIBRATION_SEED = 10**6


def cached(policy: Any, steps: int) -> Arm:
    return Arm(lambda pipeline: Generation(pipeline, policy=policy), steps)


def fewer_steps(budget: int, num_blocks: int) -> int:
    return budget // num_blocks


def interval_config(budget: int, num_blocks: int, steps: int, warmup: int) -> DitCacheConfig:
    """The four keys within the budget of the smallest interval, then of the fewest blocks; block 0 runs if it can."""
    for interval in range(2, 9):
        for count in range(1, num_blocks + 1):
            config = DitCacheConfig(
                cache_block_start=min(1, num_blocks - count), cache_num_blocks=count,
                cache_step_start=warmup, cache_step_interval=interval,
            )  # fmt: skip
            if computed_blocks(IntervalPolicy(config), num_blocks, steps) <= budget:
                return config
    raise ValueError(f"no interval up to 8 keeps {num_blocks} blocks x {steps} steps within {budget} block calls")


def even_mask(budget: int, num_blocks: int, steps: int, warmup: int) -> List[bool]:
    """Block 0 always runs, the others in the warm-up, at the last step and as evenly between as the budget allows."""
    runs = (budget - steps) // (num_blocks - 1) - warmup
    if not 1 < runs <= steps - warmup:
        raise ValueError(f"{budget} block calls do not fit {warmup} warm-up steps of {steps}")
    later = {warmup + number * (steps - 1 - warmup) // (runs - 1) for number in range(runs)}
    return [step < warmup or step in later for step in range(steps)]


def taylor_schedule(budget: int, num_blocks: int, steps: int, warmup: int) -> Tuple[int, int]:
    """Interval and warm-up of TaylorSeer: the smallest interval within the budget, and what is left as warm-up."""
    runs = budget // num_blocks
    for interval in range(2, steps):
        for start in range(steps, warmup - 1, -1):
            later = sum((step - start - 1) % interval == 0 for step in range(start, steps))
            if start + later <= runs:
                return interval, start
    raise ValueError(f"no interval keeps TaylorSeer within {budget} block calls")


class Calibration:
    """What methods learn from generations on calibration prompts; once for all budgets."""

    def __init__(self, bench: Bench, steps: int = STEPS, warmup: int = WARMUP):
        self.bench, self.steps, self.warmup = bench, steps, warmup
        self.region = Region(1, bench.num_blocks)

    def computed(self, attach: Callable, prompts: int = 2) -> float:
        """Computed blocks of an arm, the mean over prompts."""
        arm = Arm(attach, self.steps)
        every = enumerate(calibration_prompts(prompts), start=CALIBRATION_SEED)
        return sum(self.bench.sample(arm, prompt, seed).computed for seed, prompt in every) / prompts

    def learn(self, attach: Callable) -> None:
        """One generation, for rules that learn from it."""
        self.computed(attach, prompts=1)

    @functools.cached_property
    def skip_costs(self) -> np.ndarray:
        prompts = calibration_prompts(2)
        return masks.costs(self.bench, prompts, CALIBRATION_SEED, self.steps, self.warmup, self.region)

    @functools.cached_property
    def mag_ratios(self) -> List[float]:
        return packages.mag_ratios(self.steps, self.learn)

    @functools.cached_property
    def tea_polynomial(self) -> np.poly1d:
        return rules.tea_polynomial(self.learn)


class Comparison:
    """The arms at one budget."""

    def __init__(self, calibration: Calibration, ratio: float):
        self.calibration, self.steps, self.warmup = calibration, calibration.steps, calibration.warmup
        self.num_blocks = calibration.bench.num_blocks
        self.budget = int(self.steps * self.num_blocks / ratio)
        self.size = (self.budget, self.num_blocks, self.steps, self.warmup)
        self.mask = even_mask(*self.size)
        self.thresholds: Dict[str, float] = {}
        self.left_out: Dict[str, str] = {}

    def own(self, config: Optional[DitCacheConfig]) -> Dict[str, Arm]:
        """osaccel: the four keys, also those of a file if there is one; masks with reuse and forecast."""
        arms, region = {}, self.calibration.region
        for label, keys in (("", interval_config(*self.size)), (" (file)", config)):
            if keys is not None:
                name = f"osaccel, {IntervalPolicy(keys).regions[0]}, interval {keys.cache_step_interval}{label}"
                arms[name] = cached(IntervalPolicy(keys), self.steps)
        placed = masks.place(self.calibration.skip_costs, sum(self.mask), self.warmup)
        for name, mask, forecast in (
            ("even mask, reuse", self.mask, False),
            ("even mask, forecast", self.mask, True),
            ("placed mask, forecast", placed, True),
        ):
            arms[f"osaccel, {region}, {name}"] = cached(MaskPolicy(region, mask, forecast), self.steps)
        return arms

    def tuned(self, name: str, make: Callable[[Any, float], Any]) -> Dict[str, Arm]:
        """The arm of a method that `make(pipeline, threshold)` attaches, unless no threshold meets the budget."""

        def computed(threshold: float) -> float:
            return self.calibration.computed(lambda pipeline: make(pipeline, threshold))

        try:
            threshold = self.thresholds[name] = meet_budget(computed, self.budget, slack=self.num_blocks)
        except ValueError as error:
            self.left_out[name] = str(error)
            return {}
        return {name: Arm(lambda pipeline: make(pipeline, threshold), self.steps)}

    def of_packages(self, absent: Dict[str, str]) -> Dict[str, Arm]:
        arms: Dict[str, Arm] = {}
        given = (self.steps, self.warmup)
        if "cache-dit" not in absent:
            for taylor, word in ((False, ""), (True, " + TaylorSeer")):
                name = f"cache-dit DBCache{word}, threshold"
                attach = functools.partial(packages.cache_dit, taylor=taylor)
                arms.update(self.tuned(name, lambda own, value, attach=attach: attach(own, *given, value)))
            arms["cache-dit DBCache + TaylorSeer, even mask"] = Arm(
                lambda own: packages.cache_dit(own, *given, mask=self.mask, taylor=True), self.steps
            )
        if "diffusers" not in absent:
            ratios = self.calibration.mag_ratios
            makers: Dict[str, Callable] = {
                "FirstBlockCache": lambda own, value: packages.first_block(own, *given, value),
                "MagCache": lambda own, value: packages.mag_cache(own, *given, value, ratios),
                "SeaCache": lambda own, value: packages.sea_cache(own, *given, value),
            }
            for short, make in makers.items():
                arms.update(self.tuned(f"diffusers {short}", make))
            every, start = taylor_schedule(*self.size)
            arms[f"diffusers TaylorSeer, interval {every}"] = Arm(
                lambda own: packages.taylor_seer(own, self.steps, start, every), self.steps
            )
        return arms

    def arms(self, absent: Dict[str, str], config: Optional[DitCacheConfig] = None) -> Dict[str, Arm]:
        """All arms, the plain run first."""
        fewer = [self.steps // 2, fewer_steps(self.budget, self.num_blocks)]
        polynomial = self.calibration.tea_polynomial
        return {
            f"plain {self.steps}": Arm(steps=self.steps),
            **{f"plain {count}": Arm(steps=count) for count in fewer},
            **self.own(config),
            **self.of_packages(absent),
            **self.tuned("TeaCache (rule)", lambda own, value: rules.tea_cache(own, self.warmup, value, polynomial)),
        }


def compare(
    calibration: Calibration,
    ratio: float,
    prompts: Sequence[str],
    absent: Dict[str, str],
    config: Optional[DitCacheConfig] = None,
) -> Dict[str, Any]:
    """One budget's report: every arm's row, the budget in block calls, the thresholds found."""
    comparison = Comparison(calibration, ratio)
    samples = run_arms(calibration.bench, comparison.arms(absent, config), prompts)
    reference = next(iter(samples.values()))
    rows = {name: judged(own, reference, prompts) for name, own in samples.items()}
    return {
        "ratio": ratio, "budget": comparison.budget, "thresholds": comparison.thresholds,
        "left out": comparison.left_out, "rows": rows,
    }  # fmt: skip


def show(report: Dict[str, Any]) -> str:
    """The readable table of one budget."""
    lines = [
        f"budget {report['budget']} block calls ({report['ratio']:g}x)",
        f"{'':<48}{'blocks':>7}{'latent rel. L2':>25}{'PSNR dB':>20}{'SSIM':>7}{'as prompted':>13}{'speed-up':>22}",
    ]
    for name, row in report["rows"].items():
        errors = _cell(row.get("latent_error"), "{:.4f} ({:.4f}-{:.4f})")
        quality = _cell(row.get("psnr"), "{:.1f} ({:.1f}-{:.1f})")
        likeness = _cell(row.get("ssim"), "{:.3f}")
        speed = _cell(row["speedup"], "{:.2f}x ({:.2f}-{:.2f})")
        lines.append(
            f"{name:<48}{row['computed']:>7.0f}{errors:>25}{quality:>20}{likeness:>7}"
            f"{100 * row['as_prompted'][0]:>11.0f} %{speed:>22}"
        )
    return "\n".join([*lines, *(f"{name} left out: {reason}" for name, reason in report["left out"].items())])


def _cell(values: Optional[Sequence[float]], form: str) -> str:
    return "-" if values is None else form.format(*values)


def plot(reports: Sequence[Dict[str, Any]], path: Path) -> None:
    """Latent error and PSNR against the share of blocks computed, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: Dict[str, List[Tuple[float, Dict[str, Any]]]] = {}
    for report in reports:
        for name, row in report["rows"].items():
            if "latent_error" in row:
                share = row["computed"] / next(iter(report["rows"].values()))["computed"]
                lines.setdefault(method_of(name), []).append((share, row))
    figure, axes = plt.subplots(1, 2, figsize=(14, 6))
    for number, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point[0])
        own = name.startswith("osaccel")
        style = {"marker": "o" if own else "sv^D"[number % 4], "linewidth": 2.2 if own else 1.1, "markersize": 4,
                 "linestyle": "--" if name.startswith("fewer") else "-", "color": f"C{number % 10}"}  # fmt: skip
        for axis, measure in zip(axes, ("latent_error", "psnr")):
            axis.plot([share for share, _ in points], [row[measure][0] for _, row in points], label=name, **style)
    axes[0].set(xlabel="share of block calls computed", ylabel="relative L2 of the final latents", yscale="log")
    axes[1].set(xlabel="share of block calls computed", ylabel="PSNR of the frames, dB")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def method_of(name: str) -> str:
    """The line of the plot to which an arm belongs: its name without what the budget decides."""
    if name.startswith("plain"):
        return "fewer steps"
    if name.startswith("osaccel") and "interval" in name:
        return "osaccel, interval (file)" if "(file)" in name else "osaccel, interval"
    return name.split(", interval")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="held-out prompts (12)")
    parser.add_argument("--ratio", type=float, nargs="+", help=f"block calls saved ({RATIO}; for a curve {RATIOS})")
    parser.add_argument("--curve", type=Path, help="several budgets, plotted to this PNG")
    parser.add_argument("--cache-config", type=Path, help="also a dit_cache_config.json, at its own budget")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    absent = packages.missing()
    print("\n".join(absent.values()), flush=True)
    reports = run(options, absent)
    if options.json:
        options.json.write_text(json.dumps({"prompts": options.prompts, "budgets": reports}, indent=1) + "\n")
    if options.curve:
        plot(reports, options.curve)


def run(options: argparse.Namespace, absent: Dict[str, str]) -> List[Dict[str, Any]]:
    """Every ratio's comparison, each table printed as soon as it is there."""
    torch.set_num_threads(1)
    ratios = options.ratio or (RATIOS if options.curve else (RATIO,))
    pipeline, prompts = load_pipeline(checkpoint=options.checkpoint), heldout_prompts(options.prompts)
    num_blocks = len(pipeline.transformer.transformer_blocks)
    fewer = [fewer_steps(int(STEPS * num_blocks / ratio), num_blocks) for ratio in ratios]
    calibration = Calibration(Bench(pipeline, [STEPS, STEPS // 2, *fewer]))
    config = read_cache_config(str(options.cache_config)) if options.cache_config else None
    reports = []
    for ratio in ratios:
        reports.append(compare(calibration, ratio, prompts, absent, config))
        print(show(reports[-1]) + "\n", flush=True)
    return reports


if __name__ == "__main__":
    main()
