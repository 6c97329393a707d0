# SPDX-License-Identifier: Apache-2.0
"""Seconds of one denoising step of OpenSoraT2V with random weights, plain, cached and with another attention kernel.

What random weights compute is nothing, but they take as long as trained ones. `small` is for trying the command out;
the other sizes are v1.2's published model and videos, for a GPU, and need the upstream's own code (--checkout).
"""

import argparse
import contextlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler

from benchmarks.lib.own import masked
from osaccel.demo import arms as demo
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import Generation
from osaccel.plan import Plan, Region, of_dit_cache
from osaccel.wall import attention

GUIDANCE = 7.5


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
    "29x480p": Size((8, 60, 80), 512, V1_2),
    "93x720p": Size((24, 90, 160), 512, V1_2),
}


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
        draw = torch.Generator().manual_seed(0)
        self.noise = torch.randn((1, 4, *size.latents), generator=draw)
        text = torch.randn((2, 1, size.words, size.model["caption_channels"]), generator=draw)
        self.text = text.to(self.device, self.dtype)
        # The negative prompt is short: its padding is hidden, as in a real call.
        self.words = torch.ones((2, 1, size.words), device=self.device, dtype=torch.long)
        self.words[0, :, size.words // 4 :] = 0

    @torch.no_grad()
    def __call__(self, steps: int) -> Dict[str, Any]:
        """Seconds of each step, and the final latents on the host."""
        self.scheduler.set_timesteps(steps, device=self.device)
        draw = torch.Generator().manual_seed(1)
        latents = self.noise.to(self.device, self.dtype) * self.scheduler.init_noise_sigma
        moments = [self.moment()]
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.predict(latents, t), t, latents, generator=draw, return_dict=False)[0]
            moments.append(self.moment())
        return {"seconds": np.diff(moments).tolist(), "latents": latents.float().cpu()}

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
    """One way to denoise: `attach(denoiser)` is entered around all steps; `ideal` is its speed-up by blocks."""

    attach: Callable[[Any], ContextManager]
    ideal: float = 1.0


def planned(plan: Plan, blocks: int, steps: int, flash: bool = False) -> Arm:
    @contextlib.contextmanager
    def attach(denoiser: Any) -> Iterator[None]:
        with Generation(denoiser, plan), kernel("flash" if flash else "keep")(denoiser):
            yield

    return Arm(attach, 1 / plan.work(blocks, steps))


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


def arms(blocks: int, steps: int, flash: bool) -> Dict[str, Arm]:
    """Plain as the upstream runs it, then each way alone, then the fastest plan with the other kernel."""
    # On the miniature's own model, which has no kernels to choose from, leaving the mask out does nothing.
    found = {"plain": Arm(contextlib.nullcontext), "mask left out": Arm(kernel("keep"))}
    if flash:
        found["flash"] = Arm(kernel("flash"))
    four_keys = DitCacheConfig(
        cache_block_start=1, cache_num_blocks=blocks - 1, cache_step_start=2, cache_step_interval=2
    )
    found["four keys"] = planned(of_dit_cache(four_keys), blocks, steps)
    for speed in (2, 3):
        mask = [step < 2 or step % speed == 0 for step in range(steps)]
        plan = masked(Region(0, blocks), mask, forecast=True)
        found[f"plan, every {speed}. step"] = planned(plan, blocks, steps)
    if flash:
        found["plan, every 3. step, and flash"] = planned(plan, blocks, steps, flash=True)
    return found


def build(size: Size, checkout: Optional[str], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The upstream's OpenSoraT2V, or the miniature's without a checkout, with random weights."""
    sys.path.insert(0, checkout or str(demo.HERE))
    module = importlib.import_module("opensora.models.diffusion.opensora.modeling_opensora")
    frames, height, width = size.latents
    torch.manual_seed(0)
    model = module.OpenSoraT2V(**COMMON, **size.model, sample_size=(height, width), sample_size_t=frames)
    return model.eval().to(device=device, dtype=dtype)


def measure(denoiser: Denoiser, arm: Arm, steps: int) -> Dict[str, Any]:
    on_gpu = denoiser.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with arm.attach(denoiser):
        found = denoiser(steps)
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
    turns: Dict[str, List[Dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(arguments.repeats + 1):
        for way in sorted(ways, key=list(ways).index, reverse=bool(turn % 2)):
            found = measure(denoiser, ways[way], arguments.steps)
            if turn:
                turns[way].append(found)
    return {way: summary(own, turns["plain"]) for way, own in turns.items()}


def summary(own: List[Dict[str, Any]], plain: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Median seconds a step, speed-up, the part of the ideal one that is reached, GiB, and distance from plain."""
    seconds, base = (float(np.median([np.mean(found["seconds"]) for found in runs])) for runs in (own, plain))
    reference = plain[0]["latents"]
    error = float((own[0]["latents"] - reference).norm() / reference.norm())
    ideal, speed = own[0]["ideal"], base / seconds
    return {
        "seconds": seconds, "speed": speed, "ideal": ideal, "of_ideal": speed / ideal, "memory": own[0]["memory"],
        "error": error,
    }  # fmt: skip


def table(name: str, rows: Dict[str, Any], arguments: argparse.Namespace) -> str:
    """Markdown: a row per arm."""
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    lines = [
        f"{name}, {where}, torch {torch.__version__}, {arguments.dtype}, {arguments.steps} steps", "",
        "| arm | seconds a step | speed-up | ideal | measured / ideal | peak GiB | latents off plain by |",
        "|---" * 7 + "|",
    ]  # fmt: skip
    for way, row in rows.items():
        memory = "-" if row["memory"] is None else f"{row['memory']:.1f}"
        speeds = f"{row['speed']:.2f}x | {row['ideal']:.2f}x | {row['of_ideal']:.3f}"
        lines.append(f"| {way} | {row['seconds']:.4f} | {speeds} | {memory} | {row['error']:.5f} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--checkout", help="Open-Sora-Plan v1.2.0; without it the miniature's own model is used")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the numbers to this file")


def main(arguments: argparse.Namespace) -> None:
    everything = {}
    for name in arguments.size:
        everything[name] = run(name, arguments)
        print(table(name, everything[name], arguments), end="\n\n", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(everything, indent=2))
