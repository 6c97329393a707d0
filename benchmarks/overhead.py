# SPDX-License-Identifier: Apache-2.0
"""What osaccel costs and what a cached loop gains: `python -m benchmarks.overhead`; ratios measured in one run.

    python -m benchmarks.overhead [--device cuda]

1. Seconds of a generation with osaccel active and nothing configured / without osaccel. Both arms alternate in one
   process; the median ratio comes with a 95 % bootstrap interval.
2. Measured speed-up of a loop under a plan / its ideal speed-up, for the four keys and for a plan with every action,
   with blocks of over 5 ms.
3. Time of the correction in one step on real latent sizes, beside `scheduler.step` itself and beside the upstream's
   network on the same core or GPU.
4. Milliseconds that `import osaccel.auto` adds to a Python process that never imports the upstream.
5. Time outside the blocks over time inside them: of a plan search with all that it records, of recorded generations
   alone, and of a plain one; with blocks of over 5 ms.

On a CPU these are CPU seconds of one thread, so that other programs beside it hardly count; on a GPU, in bfloat16,
seconds until it has finished. The upstream's own model is timed by `python -m benchmarks.wall steps`.
"""

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import nn

from benchmarks.lib.kept import made_by
from benchmarks.lib.quality import interval
from osaccel import hooks
from osaccel.clock import Clock
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import Generation
from osaccel.interceptors import StepCall
from osaccel.plan import UNDER_SKIP, Plan, Region, of_dit_cache
from osaccel.sampling.corrected import Corrected
from osaccel.sampling.standin import StandIn
from osaccel.search.session import Session
from osaccel.settings import DEFAULT_CORRECTION, Settings
from osaccel.targets import Guidance, Target

STEPS = 20
# Latents of two videos, 93 frames of 480 x 640; the upstream's transformer on them without guidance: patches of 2 x 2,
# weights as its authors give them for v1.2.
LATENTS, TOKENS, WEIGHTS = (2, 4, 24, 60, 80), 2 * 24 * 30 * 40, 2.7e9


class Place(NamedTuple):
    """Where loops run, and the width, heads and tokens whose blocks take about 5 ms there."""

    device: str
    dtype: torch.dtype
    width: int
    heads: int
    tokens: int

    def seconds(self, function: Callable[[], object]) -> float:
        """Of this process on a CPU, until the device has finished on a GPU."""
        if self.device == "cpu":
            started = time.process_time()
            function()
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - started


PLACES = {"cpu": Place("cpu", torch.float32, 384, 8, 128), "cuda": Place("cuda", torch.bfloat16, 2304, 24, 6144)}


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 8):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden_states: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(*[hidden_states] * 3, need_weights=False)[0]
        return hidden_states + self.mlp(hidden_states)


class Transformer(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, blocks: int, width: int, heads: int):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])

    def forward(self, hidden_states: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, timestep=timestep)
        return hidden_states


TARGET = Target(guidance=Guidance(batch_first=("hidden_states", "timestep")))
FOUR_KEYS = DitCacheConfig(cache_block_start=1, cache_num_blocks=10, cache_step_start=2, cache_step_interval=2)
PLANS = {
    "four keys": of_dit_cache(FOUR_KEYS),
    "every action": Plan(
        steps=STEPS,
        skip=(5, 9, 13),
        conditional_only=(3, 6, 7, 10, 11, 14, 15, 18),
        regions=(Region(1, 6, (4, 7, 12, 16)), Region(6, 12, (8, 11, 16, 17), 1)),
        correction=UNDER_SKIP,
    ),
}


class OpenSoraPipeline:
    """A denoising loop and nothing else, so that what is measured is the transformer's loop."""

    def __init__(self, blocks: int, width: int, tokens: int, place: Place, heads: int = 8):
        torch.manual_seed(0)
        self.transformer: Any = Transformer(blocks, width, heads).to(place.device, place.dtype).eval()
        self.scheduler: Any = EulerAncestralDiscreteScheduler()
        self.shape, self.place = (1, tokens, width), place

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = STEPS) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps, device=self.place.device)
        latents = torch.zeros(self.shape, device=self.place.device, dtype=self.place.dtype)
        for t in self.scheduler.timesteps:
            both = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            without, with_text = self.transformer(both, timestep=t).chunk(2)
            noise = 0.01 * (without + 2 * (with_text - without))
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def median_ratio(first: List[float], second: List[float]) -> Tuple[float, float, float]:
    """Median of the pairwise ratios first / second, with its 95 % bootstrap interval."""
    middle, low, high = interval(np.array(first) / np.array(second), np.median)
    return middle, low, high


def idle_overhead(pairs: int, place: Place) -> Tuple[float, float, float]:
    """Arms alternate, and so does which of them goes first."""
    module: Any = types.ModuleType("opensora.sample.pipeline_opensora")
    module.OpenSoraPipeline = type("OpenSoraPipeline", (OpenSoraPipeline,), {"__call__": OpenSoraPipeline.__call__})
    pipeline = OpenSoraPipeline(8, 64, 64, place)
    with_hooks = module.OpenSoraPipeline(8, 64, 64, place)
    sys.modules[module.__name__] = module
    hooks.install()
    arms = {"active": with_hooks, "plain": pipeline}
    times: Dict[str, List[float]] = {name: [] for name in arms}
    for pair in range(pairs + 2):
        for name in sorted(arms, reverse=bool(pair % 2)):
            spent = place.seconds(arms[name])
            if pair >= 2:
                times[name].append(spent)
    hooks.uninstall()
    return median_ratio(times["active"], times["plain"])


@contextlib.contextmanager
def timed(modules: Sequence[Any], place: Place) -> Iterator[List[float]]:
    """The seconds that each forward of these modules takes, of all in one list."""
    inside: List[float] = []

    def forward(own: Any, *args: Any, **kwargs: Any) -> Any:
        found: List[Any] = []
        inside.append(place.seconds(lambda: found.append(own(*args, **kwargs))))
        return found[0]

    for module in modules:
        module.forward = functools.partial(forward, module.forward)
    try:
        yield inside
    finally:
        for module in modules:
            del module.forward


def outside_share(pipeline: OpenSoraPipeline) -> float:
    """The share of a plain loop's time that is spent outside the transformer."""
    with timed([pipeline.transformer], pipeline.place) as inside:
        whole = pipeline.place.seconds(pipeline)
    return 1 - sum(inside) / whole


def planned_speed(plan: Plan, repeats: int, place: Place) -> Dict[str, float]:
    """The speed-up of a loop under a plan over what its network work and the time outside the blocks leave."""
    pipeline = OpenSoraPipeline(12, place.width, place.tokens, place, place.heads)
    blocks = pipeline.transformer.transformer_blocks
    inputs = torch.zeros(2, *pipeline.shape[1:], device=place.device, dtype=place.dtype)
    with torch.no_grad():
        block_ms = 1000 * min(place.seconds(lambda: blocks[0](inputs)) for _ in range(10))
    times: Dict[str, List[float]] = {"plain": [], "planned": []}
    for repeat in range(repeats):
        for name in sorted(times, reverse=bool(repeat % 2)):
            scope = Generation(pipeline, plan, TARGET) if name == "planned" else contextlib.nullcontext()
            with scope:
                times[name].append(place.seconds(pipeline))
    outside = outside_share(pipeline)
    ideal = 1 / (outside + (1 - outside) * plan.work(len(blocks), STEPS))
    measured, low, high = median_ratio(times["plain"], times["planned"])
    return {
        "block_ms": block_ms, "ideal": ideal, "measured": measured, "of_ideal": measured / ideal,
        "of_ideal_low": low / ideal, "of_ideal_high": high / ideal,
    }  # fmt: skip


def search_cost(place: Place, steps: int, calls: int) -> Dict[str, float]:
    """Time outside the blocks over time inside, of a plan search, of recorded generations alone and of a plain one."""
    pipeline = OpenSoraPipeline(12, place.width, place.tokens, place, place.heads)
    blocks = list(pipeline.transformer.transformer_blocks)
    with tempfile.TemporaryDirectory() as folder, timed(blocks, place) as inside:
        output = str(Path(folder) / "plan.json")
        session = Session(
            Settings(search="plan", plan_output=output, search_then="continue", search_prompts=calls), TARGET
        )

        def call() -> None:
            session.on_call(type(pipeline).__call__, pipeline, (pipeline,), {"num_inference_steps": steps})

        try:
            recorded = sum(place.seconds(call) for _ in range(calls - 1))
            beside = recorded / sum(inside) - 1
            # In the last call, once it is recorded, the search runs.
            whole = recorded + place.seconds(call)
        finally:
            session.abandon()
        found = {"searching": whole / sum(inside) - 1, "recording": beside, "block_ms": 1000 * float(np.median(inside))}
        inside.clear()
        plain = place.seconds(lambda: pipeline(steps))
        return {**found, "plain": plain / sum(inside) - 1}


def correction_cost(steps: int, place: Place = PLACES["cpu"]) -> Dict[str, float]:
    """What a correction adds to a mean `scheduler.step`: seconds, and those of a network step at the same place.

    The network's are those of its weights' multiplications alone, at the rate that a large product reaches here.
    """
    plans = {
        "scheduler_s": Plan(),
        "added_s": Plan(correction=DEFAULT_CORRECTION),
        "added_under_skip_s": Plan(steps=steps, skip=tuple(range(1, steps - 1, 2)), correction=UNDER_SKIP),
    }
    found = {name: _step_seconds(plan, steps, place) for name, plan in plans.items()}
    plain = found.pop("scheduler_s")
    network = WEIGHTS * 2 * TOKENS / flops_per_second(place)
    return {"scheduler_s": plain, **{name: value - plain for name, value in found.items()}, "network_s": network}


def _step_seconds(plan: Plan, steps: int, place: Place) -> float:
    """Of a `scheduler.step` with what a plan does to it."""
    scheduler: Any = EulerAncestralDiscreteScheduler()
    clock = Clock()
    latents, *outputs = (torch.randn(LATENTS).to(place.device, place.dtype) for _ in range(4))
    scheduler.set_timesteps(steps, device=place.device)
    corrected, times = (StandIn if plan.skip else Corrected)(plan, clock), []
    corrected.begin(scheduler)

    def network(hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return outputs[clock.step % 3]

    def step(hidden_states: torch.Tensor, t: torch.Tensor) -> None:
        told = corrected.network(network, (hidden_states, t), {})
        corrected.step(lambda one: one.made_on(scheduler.step), StepCall((told, t, latents), {}))

    for t in scheduler.timesteps:
        times.append(place.seconds(functools.partial(step, scheduler.scale_model_input(latents, t), t)))
        clock.end_step()
    # The first steps have no change to look back to, the last one is first order; the slowest tenth is the machine's.
    return float(np.mean(np.sort(times[3:-1])[: -len(times) // 10]))


def flops_per_second(place: Place, repeats: int = 10) -> float:
    """Of a product of two square matrices, on one core or the GPU."""
    size = 1024 if place.device == "cpu" else 8192
    one, other = torch.randn(2, size, size, device=place.device, dtype=place.dtype)
    return 2 * size**3 / min(place.seconds(lambda: one @ other) for _ in range(repeats))


def import_cost(repeats: int) -> float:
    code = "import time; t = time.perf_counter(); import osaccel.auto; print(1000 * (time.perf_counter() - t))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(repeats)]
    return float(np.median([float(run.stdout) for run in runs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--device", choices=list(PLACES), default="cpu")
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    place = PLACES[arguments.device]
    if place.device == "cpu":
        torch.set_num_threads(1)
    print("\n".join(f"{name}: {value}" for name, value in made_by().items()))
    ratio, low, high = idle_overhead(arguments.pairs, place)
    speeds = {name: planned_speed(plan, 14, place) for name, plan in PLANS.items()}
    cost = import_cost(9)
    corrected = correction_cost(40, place)
    searching = search_cost(place, 50, 2)
    print(f"active, nothing configured / without osaccel   {ratio:.4f}  (95 % interval {low:.4f} to {high:.4f})")
    for name, speed in speeds.items():
        print(
            f"{name}: ideal {speed['ideal']:.3f}x, measured {speed['measured']:.3f}x = {speed['of_ideal']:.3f} of it "
            f"({speed['of_ideal_low']:.3f} to {speed['of_ideal_high']:.3f}; a block takes {speed['block_ms']:.1f} ms)"
        )
    added, network = corrected["added_s"], corrected["network_s"]
    print(
        f"correction of a step on latents {LATENTS}   {1000 * added:.2f} ms = "
        f"{added / corrected['scheduler_s']:.2f} of scheduler.step, {added / network:.1e} of the network's; "
        f"with every other step skipped {1000 * corrected['added_under_skip_s']:.2f} ms"
    )
    print(f"import osaccel.auto                            {cost:.1f} ms")
    print(
        f"outside the blocks / inside: plan search {searching['searching']:.1%}, recorded generations "
        f"{searching['recording']:.1%}, plain ones {searching['plain']:.1%} "
        f"(a block takes {searching['block_ms']:.1f} ms)"
    )
    if arguments.json:
        found = {"made by": made_by(), "idle_ratio": [ratio, low, high], "plans": speeds, "correction": corrected,
                 "import_ms": cost, "search": searching}  # fmt: skip
        with open(arguments.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
