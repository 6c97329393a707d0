# SPDX-License-Identifier: Apache-2.0
"""A script that samples for ever, standing for the upstream's: run by the search's tests in processes of their own.

usage: search_script.py sp|dp|one PROMPTS STEPS [SLEEP]; counts finished evaluations by what the search logs.
"""

import os
import sys
import time
import types

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tiny  # noqa: E402

mode, prompts, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
slow = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

if "PID_DIR" in os.environ:
    with open(os.path.join(os.environ["PID_DIR"], f"rank-{rank}.pid"), "w") as file:
        file.write(str(os.getpid()))
if world > 1:
    dist.init_process_group("gloo")


class OpenSoraPipeline(tiny.Pipeline):
    """Unseeded noise; under sequence parallelism each rank holds a shard and the blocks exchange their means."""

    @torch.no_grad()
    def __call__(self, prompt="", num_inference_steps=10, num_frames=5, height=8, width=8, guidance_scale=7.5):
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        latents = torch.randn(1, 5, tiny.WIDTH) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            noise = self.predict(self.scheduler.scale_model_input(latents, t), t.float(), guidance_scale)
            if mode == "sp":
                dist.all_reduce(noise)
            time.sleep(slow)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


module = types.ModuleType("opensora.sample.pipeline_opensora")
module.OpenSoraPipeline = OpenSoraPipeline
sys.modules[module.__name__] = module
if mode == "sp":
    state = types.ModuleType("opensora.utils.parallel_states")
    state.get_sequence_parallel_state = lambda: True
    state.nccl_info = types.SimpleNamespace(group=dist.group.WORLD)
    sys.modules[state.__name__] = state

from osaccel.hooks import pipelines  # noqa: E402


def say(line):
    """In one piece: the ranks share the stream, and print writes a line's end on its own."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


pipelines.wrap_pipeline(module)
pipeline = OpenSoraPipeline()
pipeline.transformer.requires_grad_(False)
if "OTHER_WEIGHTS" in os.environ:
    pipeline.transformer.transformer_blocks[0].linear.weight.mul_(1.5)
torch.manual_seed(rank if mode == "sp" else 0)
for number in range(prompts):
    if mode == "dp" and number % world != rank:
        continue
    prompt, guidance = f"prompt {number} {os.environ.get('PROMPT', '')}", float(os.environ.get("GUIDANCE", "7.5"))
    pipeline(prompt=prompt, num_inference_steps=steps, guidance_scale=guidance)
    say(f"rank {rank} sampled {number}")
say(f"rank {rank} reached its end after {pipeline.block_calls()} block calls")
# Gloo's threads abort a process that ends while they still hold tensors. They go with the last reference to their
# group, which the search of sequence-parallel ranks keeps; there they have a moment to let go.
if mode == "sp":
    time.sleep(0.5)
elif world > 1:
    dist.destroy_process_group()
