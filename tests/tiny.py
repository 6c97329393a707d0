# SPDX-License-Identifier: Apache-2.0
"""The smallest pipeline that shows the behaviour under test: real diffusers schedulers, the upstream's loop."""

import inspect
import sys

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import nn

from osaccel.interceptors import Interceptor
from osaccel.targets import Guidance, Target

WIDTH = 8
# The pipelines below run guidance as the upstream does.
TARGET = Target(guidance=Guidance(batch_first=("hidden_states", "timestep"), block_dim_parallel=1))
SEQUENCE_FIRST = TARGET._replace(guidance=TARGET.guidance._replace(block_dim=1))


# Torch 2.5 is there for Python 3.13, but with it torch.save, pickle of a tensor and torch.compile fail: plainly, too.
HALF_A_TORCH = sys.version_info >= (3, 13) and torch.__version__.startswith("2.5.")
needs_pickling = pytest.mark.skipif(HALF_A_TORCH, reason="torch 2.5 cannot pickle tensors on Python 3.13")
needs_compile = pytest.mark.skipif(HALF_A_TORCH, reason="torch 2.5 has no torch.compile on Python 3.13")


class Block(nn.Module):
    """Non-linear and dependent on the timestep, so that a wrong delta shows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, timestep=None, attention_mask=None):
        return hidden_states + 0.3 * torch.tanh(self.linear(hidden_states) * (1 + timestep / 1000))


class CountingBlock(Block):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, hidden_states, timestep=None, attention_mask=None):
        self.calls += 1
        return super().forward(hidden_states, timestep, attention_mask)


class Transformer(nn.Module):
    """Blocks called with keywords, batch first or, as under sequence parallelism, sequence first."""

    def __init__(self, num_blocks, sequence_first=False, block=CountingBlock):
        super().__init__()
        self.sequence_first = sequence_first
        self.transformer_blocks = nn.ModuleList([block() for _ in range(num_blocks)])

    def forward(self, hidden_states, timestep=None):
        if self.sequence_first:
            hidden_states = hidden_states.transpose(0, 1).contiguous()
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, timestep=timestep, attention_mask=None)
        return hidden_states.transpose(0, 1).contiguous() if self.sequence_first else hidden_states


class Pipeline:
    """The upstream's denoising loop; `forwards` is 1 (guidance in one batch) or 2 (one forward per half)."""

    def __init__(
        self, num_blocks=6, scheduler=None, forwards=1, sequence_first=False, dtype=torch.float32, block=CountingBlock
    ):
        torch.manual_seed(0)
        self.transformer = Transformer(num_blocks, sequence_first, block).to(dtype).eval()
        self.scheduler = scheduler or EulerAncestralDiscreteScheduler()
        self.forwards, self.dtype = forwards, dtype

    @torch.no_grad()
    def __call__(self, num_inference_steps=10, guidance_scale=7.5, batch=1, timesteps=None, seed=1, callback=None):
        generator = torch.Generator().manual_seed(seed)
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        latents = torch.randn(batch, 5, WIDTH, generator=generator, dtype=self.dtype) * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepted else {}
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.predict(self.scheduler.scale_model_input(latents, t), t.to(self.dtype), guidance_scale)
            latents = self.scheduler.step(noise, t, latents, **extra, return_dict=False)[0].to(self.dtype)
            if callback is not None:
                callback(i, t, latents)
        return latents

    def predict(self, latents, t, guidance_scale):
        if self.forwards == 2:
            low, high = self.transformer(-latents, timestep=t), self.transformer(latents, timestep=t)
        elif guidance_scale > 1:
            low, high = self.transformer(torch.cat([-latents, latents]), timestep=t).chunk(2)
        else:
            return self.transformer(latents, timestep=t)
        return low + guidance_scale * (high - low)

    def block_calls(self):
        return [block.calls for block in self.transformer.transformer_blocks]


class UnseededPipeline(Pipeline):
    """Draws its noise from the global random state, as the upstream's scripts make it do; takes their arguments."""

    @torch.no_grad()
    def __call__(self, prompt="", num_inference_steps=10, guidance_scale=7.5, num_frames=5, height=8, width=8):
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        latents = torch.randn(1, 5, WIDTH) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            noise = self.predict(self.scheduler.scale_model_input(latents, t), t.float(), guidance_scale)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


class Watch(Interceptor):
    """What reaches the scheduler."""

    def __init__(self):
        self.calls = []

    def step(self, proceed, call):
        self.calls.append(call)
        return proceed(call)


def reference_loop(pipeline, config, **arguments):
    """The same generation with the documented cache rule written out: plain modules, no osaccel code."""
    start, stop = config["cache_block_start"], config["cache_block_start"] + config["cache_num_blocks"]
    state = {"step": -1, "forward": 0, "delta": {}}

    def forward(hidden_states, timestep=None):
        state["forward"] += 1
        branch = state["forward"]
        since = state["step"] - config["cache_step_start"]
        reuse = since >= 0 and since % config["cache_step_interval"] != 0 and stop > start
        for index, block in enumerate(pipeline.transformer.transformer_blocks):
            if index == start:
                entered = hidden_states
                if reuse:
                    hidden_states = hidden_states + state["delta"][branch]
            if not (reuse and start <= index < stop):
                hidden_states = Block.forward(block, hidden_states, timestep=timestep)
            if index == stop - 1 and stop > start and since >= 0 and not reuse:
                state["delta"][branch] = hidden_states - entered
        return hidden_states

    def next_step(*args, **kwargs):
        state["step"] += 1
        state["forward"] = 0
        return type(pipeline.scheduler).scale_model_input(pipeline.scheduler, *args, **kwargs)

    pipeline.transformer.forward = forward
    pipeline.scheduler.scale_model_input = next_step
    try:
        return pipeline(**arguments)
    finally:
        del pipeline.transformer.forward, pipeline.scheduler.scale_model_input
