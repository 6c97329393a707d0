# SPDX-License-Identifier: Apache-2.0
"""Seconds of one denoising step of OpenSoraT2V with random weights, plain, under plans and with another kernel.

What random weights compute is nothing, but they take as long as trained ones. `small` is for trying the command out;
the other sizes are v1.2's published model, for a GPU, and need the upstream's own code (--checkout): two of its videos,
and one (29x240p) whose blocks take a few milliseconds only.

`beside the blocks` is what a step takes outside the forwards of the blocks; `added` what osaccel adds there, as a share
of the whole: all beyond what the run takes that only leaves the mask out, of which a conditional-only step is granted
half and a skipped one none.
"""

import argparse
import contextlib
import gc
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, NamedTuple, Optional

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler

from benchmarks.lib.kept import made_by
from osaccel.demo import arms as demo
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import Generation
from osaccel.plan import Plan, Region, of_dit_cache
from osaccel.search.plan import observation
from osaccel.search.recording.replay import Call, Replay
from osaccel.settings import DEFAULT_CORRECTION
from osaccel.targets import TARGETS
from osaccel.wall import attention

GUIDANCE = 7.5
TARGET = TARGETS["opensora.sample.pipeline_opensora"]
# Two full steps, then this again and again: F computes everything, H the conditional half, R forecasts all blocks but
# the first, S skips. By their speed-up in 20 steps of 32 blocks.
PATTERNS = {"1.5x": "FHFS", "2x": "FHRFSHFRS", "3x": "FRSHSRSHR"}


class Size(NamedTuple):
    """Latent frames, height and width of a video, and what of the model's configuration goes with them."""

    latents: Any
    words: int
    model: Dict[str, Any]


# OpenSoraT2V-ROPE-L/122 as v1.2.0's checkpoints configure it, and the same with next to nothing in it.
V1_2 = {
    "num_layers": 32, "num_attention_heads": 24, "attention_head_dim": 96, "cross_attention_dim": 2304,
    "caption_channels": 4096, "attention_mode": "xformers",
}  # fmt: skip
SMALL = {
    "num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 24, "cross_attention_dim": 96,
    "caption_channels": 32, "attention_mode": "math",
}  # fmt: skip
COMMON = {
    "in_channels": 4, "out_channels": 4, "patch_size": 2, "patch_size_t": 1, "attention_bias": True, "use_rope": True,
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
    "activation_fn": "gelu-approximate", "interpolation_scale_t": 1.0, "interpolation_scale_h": 1.0,
    "interpolation_scale_w": 1.0,
}  # fmt: skip
SIZES = {
    "small": Size((5, 16, 16), 16, SMALL),
    "29x240p": Size((8, 30, 40), 512, V1_2),
    "29x480p": Size((8, 60, 80), 512, V1_2),
    "93x720p": Size((24, 90, 160), 512, V1_2),
}


class Stopwatch:
    """Seconds that the blocks' own forwards take, half batches too; it waits for the device at the end only."""

    def __init__(self, blocks: Iterable[Any], device: torch.device):
        self.on_gpu, self._spans = device.type == "cuda", []  # type: ignore[var-annotated]
        for block in blocks:
            block.forward = self._timed(block.forward)

    def _timed(self, forward: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            output = forward(*args, **kwargs)
            self._spans.append((started, self._now()))
            return output

        return timed

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> List[float]:
        """Of every call since the last reading; the device has been waited for."""
        spans, self._spans = self._spans, []
        return [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in spans]


class Denoiser:
    """The pipeline's denoising loop around a transformer, and nothing else of it.

    Args:
        transformer: an OpenSoraT2V.
        size: of the video, see SIZES.
    """

    def __init__(self, transformer: torch.nn.Module, size: Size):
        self.transformer: Any = transformer
        self.scheduler: Any = EulerAncestralDiscreteScheduler()
        self.device, self.dtype = next(transformer.parameters()).device, next(transformer.parameters()).dtype
        blocks: Any = transformer.transformer_blocks
        self.stopwatch = Stopwatch(blocks, self.device)
        draw = torch.Generator().manual_seed(0)
        self.noise = torch.randn((1, 4, *size.latents), generator=draw)
        text = torch.randn((2, 1, size.words, size.model["caption_channels"]), generator=draw)
        self.text = text.to(self.device, self.dtype)
        # The negative prompt is short: its padding is hidden, as in a real call.
        self.words = torch.ones((2, 1, size.words), device=self.device, dtype=torch.long)
        self.words[0, :, size.words // 4 :] = 0

    @torch.no_grad()
    def __call__(self, steps: int) -> Dict[str, Any]:
        """Seconds of each step, those of the blocks in all of them, and the final latents on the host."""
        self.scheduler.set_timesteps(steps, device=self.device)
        draw = torch.Generator(self.device).manual_seed(1)
        latents = self.noise.to(self.device, self.dtype) * self.scheduler.init_noise_sigma
        moments = [self.moment()]
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.predict(latents, t), t, latents, generator=draw, return_dict=False)[0]
            moments.append(self.moment())
        return {
            "seconds": np.diff(moments).tolist(), "blocks": self.stopwatch.read(), "latents": latents.float().cpu()
        }  # fmt: skip

    def predict(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
        noise = self.transformer(
            both, attention_mask=torch.ones_like(both)[:, 0], encoder_hidden_states=self.text,
            encoder_attention_mask=self.words, timestep=t.expand(2), return_dict=False,
        )[0]  # fmt: skip
        without, with_text = noise.chunk(2)
        return without + GUIDANCE * (with_text - without)

    def moment(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Arm(NamedTuple):
    """One way to denoise.

    Attributes:
        attach: `attach(denoiser)` is entered around all steps.
        ideal: its speed-up by blocks.
        called: the steps at which the network is called, halves counted half, over all steps.
        sample: runs the steps; gives what Denoiser does.
    """

    attach: Callable[[Any], ContextManager]
    ideal: float = 1.0
    called: float = 1.0
    sample: Callable[[Denoiser, int], Dict[str, Any]] = Denoiser.__call__


def mixed(pattern: str, blocks: int, steps: int) -> Plan:
    """A plan of full, conditional-only, forecast and skipped steps; see PATTERNS."""
    letters = ("FF" + pattern * steps)[:steps]
    skip, half, forecast = (tuple(step for step in range(steps) if letters[step] == one) for one in "SHR")
    return Plan(steps=steps, skip=skip, conditional_only=half, regions=(Region(1, blocks, forecast, 1),))


def planned(plan: Plan, blocks: int, steps: int, flash: bool = False) -> Arm:
    @contextlib.contextmanager
    def attach(denoiser: Any) -> Iterator[None]:
        with Generation(denoiser, plan, TARGET), kernel("flash" if flash else "keep")(denoiser):
            yield

    called = 1 - (len(plan.skip) + len(plan.conditional_only) / 2) / steps
    return Arm(attach, 1 / plan.work(blocks, steps), called)


def kernel(wanted: str) -> Callable[[Any], ContextManager]:
    @contextlib.contextmanager
    def attach(denoiser: Any) -> Iterator[None]:
        undo = attention.attach(denoiser, wanted)
        try:
            yield
        finally:
            if undo is not None:
                undo()

    return attach


def recorded(denoiser: Denoiser, steps: int) -> Dict[str, Any]:
    """A plain generation as the plan search records it, all that is worked out of it included."""
    started = denoiser.moment()
    replay = Replay(Call(denoiser.__call__, denoiser, (steps,), {}, TARGET))
    found, observed = observation.record(replay, list(denoiser.transformer.transformer_blocks))
    found["seconds"] = [(denoiser.moment() - started) / steps]
    tensors = [value for value in observed.values() if isinstance(value, torch.Tensor)]
    found["host"] = (replay.recording.nbytes() + sum(t.numel() * t.element_size() for t in tensors)) / 2**30
    return found


def arms(blocks: int, steps: int, flash: bool) -> Dict[str, Arm]:
    """Plain as the upstream runs it, then each way alone, then the fastest plan with the other kernel."""
    # On the miniature's own model, which has no kernels to choose from, leaving the mask out does nothing.
    found = {"plain": Arm(contextlib.nullcontext), "mask left out": Arm(kernel("keep"))}
    if flash:
        found["flash"] = Arm(kernel("flash"))
    four_keys = DitCacheConfig(
        cache_block_start=1, cache_num_blocks=round(0.52 * blocks), cache_step_start=2, cache_step_interval=2
    )
    found["four keys"] = planned(of_dit_cache(four_keys), blocks, steps)
    for speed, pattern in PATTERNS.items():
        found[f"plan, {speed}"] = planned(mixed(pattern, blocks, steps), blocks, steps)
    found["corrected"] = planned(Plan(correction=DEFAULT_CORRECTION), blocks, steps)
    found["recorded for a search"] = Arm(contextlib.nullcontext, sample=recorded)
    if flash:
        found["plan, 3x, and flash"] = planned(mixed(PATTERNS["3x"], blocks, steps), blocks, steps, flash=True)
    return found


def build(size: Size, checkout: Optional[str], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The upstream's OpenSoraT2V, or the miniature's without a checkout, with random weights."""
    sys.path.insert(0, checkout or str(demo.HERE))
    module = importlib.import_module("opensora.models.diffusion.opensora.modeling_opensora")
    frames, height, width = size.latents
    torch.manual_seed(0)
    with torch.device(device):  # the weights are drawn where they are needed: billions of them take minutes on a CPU
        model = module.OpenSoraT2V(**COMMON, **size.model, sample_size=(height, width), sample_size_t=frames)
    return model.eval().to(device=device, dtype=dtype)


def measure(denoiser: Denoiser, arm: Arm, steps: int) -> Dict[str, Any]:
    on_gpu = denoiser.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with arm.attach(denoiser):
        found = arm.sample(denoiser, steps)
    found["memory"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    found["ideal"] = arm.ideal
    return found


def run(name: str, arguments: argparse.Namespace) -> Dict[str, Any]:
    """Every arm `repeats` times in turns; the first turn warms up and is not counted."""
    size = SIZES[name]
    if size.model is V1_2 and not arguments.checkout:
        raise SystemExit(f"--size {name} needs --checkout: the miniature's attention is not made for such videos")
    denoiser = Denoiser(build(size, arguments.checkout, arguments.device, getattr(torch, arguments.dtype)), size)
    flash = attention.obstacle_to_flash(attention.facts_of(denoiser.transformer)) is None
    ways = arms(len(list(denoiser.transformer.transformer_blocks)), arguments.steps, flash)
    wanted = {name: arm for name, arm in ways.items() if not arguments.arms or name in ("plain", *arguments.arms)}
    turns: Dict[str, List[Dict[str, Any]]] = {way: [] for way in wanted}
    # Whole and half batches, forecasts and stand-ins: what these warm up is warm for all.
    for warm_up in (Arm(contextlib.nullcontext), ways["plan, 3x"], *([ways["flash"]] if flash else [])):
        measure(denoiser, warm_up, arguments.steps)
    for turn in range(arguments.repeats):
        for way in sorted(wanted, key=list(ways).index, reverse=bool(turn % 2)):
            turns[way].append(measure(denoiser, wanted[way], arguments.steps))
    found = {way: summary(own, turns["plain"], arguments.steps) for way, own in turns.items()}
    bare = found.get("mask left out", found["plain"])["beside"]
    for way, row in found.items():
        row["added"] = (row["beside"] - bare * wanted[way].called) / row["seconds"]
    return found


def summary(own: List[Dict[str, Any]], plain: List[Dict[str, Any]], steps: int) -> Dict[str, Any]:
    """Medians of the turns: seconds a step, speed-up, its part of the ideal, time beside the blocks, GiB, error."""
    seconds, base = (float(np.median([np.mean(found["seconds"]) for found in runs])) for runs in (own, plain))
    beside = [np.mean(found["seconds"]) - sum(found["blocks"]) / steps for found in own]
    reference = plain[0]["latents"]
    error = float((own[0]["latents"] - reference).norm() / reference.norm())
    ideal, speed = own[0]["ideal"], base / seconds
    return {
        "seconds": seconds, "turns": [float(np.mean(found["seconds"])) for found in own], "speed": speed,
        "ideal": ideal, "of_ideal": speed / ideal, "block": float(np.median(own[0]["blocks"])),
        "beside": float(np.median(beside)), "memory": own[0]["memory"], "host": own[0].get("host"), "error": error,
    }  # fmt: skip


def table(name: str, rows: Dict[str, Any], arguments: argparse.Namespace) -> str:
    """Markdown: a row per arm."""
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    lines = [
        f"{name}, {where}, torch {torch.__version__}, {arguments.dtype}, {arguments.steps} steps, medians of "
        f"{arguments.repeats} turns; a block takes {1000 * rows['plain']['block']:.2f} ms", "",
        "| arm | seconds a step | speed-up | ideal | measured / ideal | beside the blocks, ms a step | added "
        "| peak GiB | latents off plain by |",
        "|---" * 9 + "|",
    ]  # fmt: skip
    for way, row in rows.items():
        memory = "-" if row["memory"] is None else f"{row['memory']:.2f}"
        speeds = f"{row['speed']:.3f}x | {row['ideal']:.3f}x | {row['of_ideal']:.3f}"
        beside = f"{1000 * row['beside']:.1f} | {100 * row['added']:.2f} %"
        lines.append(f"| {way} | {row['seconds']:.4f} | {speeds} | {beside} | {memory} | {row['error']:.5f} |")
    lines += [f"{way}: {row['host']:.3f} GiB on the host" for way, row in rows.items() if row["host"]]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--checkout", help="Open-Sora-Plan v1.2.0; without it the miniature's own model is used")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these, and plain, by their names in the table")
    parser.add_argument("--json", help="also write the numbers to this file")


def main(arguments: argparse.Namespace) -> None:
    everything: Dict[str, Any] = {"made by": made_by()}
    print("\n".join(f"{name}: {value}" for name, value in everything["made by"].items()), end="\n\n")
    for name in arguments.size:
        gc.collect()  # the stopwatch and the blocks of the size before refer to each other, and hold its weights
        everything[name] = run(name, arguments)
        print(table(name, everything[name], arguments), end="\n\n", flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(everything, indent=2))
