# SPDX-License-Identifier: Apache-2.0
"""Two sequence-parallel ranks that need not have the same osaccel: run by test_ranks.py under torchrun.

usage: ranks_script.py JSON; for each rank: "environ" to change (null unsets), "active" false for a Python without
osaccel, "sleep" seconds before the first call. "limit" is the seconds after which a rank is given up.
"""

import json
import os
import sys
import time
import types

rank, plan = os.environ["RANK"], json.loads(sys.argv[1])
mine = plan.get(rank, {})
for name, value in mine.get("environ", {}).items():
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value

import torch.distributed as dist  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tiny  # noqa: E402


class OpenSoraPipeline(tiny.Pipeline):
    """Each step exchanges what the ranks predicted, as the upstream's attention does."""

    def __call__(self, **arguments):
        return super().__call__(**arguments)

    def predict(self, latents, t, guidance_scale):
        noise = super().predict(latents, t, guidance_scale)
        dist.all_reduce(noise)
        return noise / 2


module = types.ModuleType("opensora.sample.pipeline_opensora")
module.OpenSoraPipeline = OpenSoraPipeline
sys.modules[module.__name__] = module
state = types.ModuleType("opensora.utils.parallel_states")
state.get_sequence_parallel_state = lambda: True
state.nccl_info = types.SimpleNamespace(group=None)
sys.modules[state.__name__] = state

if mine.get("active", True):
    import osaccel.auto  # noqa: F401
    from osaccel.hooks import agreement

    agreement.LIMIT = plan.get("limit", agreement.LIMIT)

dist.init_process_group("gloo")
state.nccl_info.group = dist.group.WORLD
pipeline = OpenSoraPipeline()
time.sleep(mine.get("sleep", 0))
for _ in range(2):
    latents = pipeline(num_inference_steps=6)
print(f"rank {rank} sampled {latents.double().sum():.12f}, blocks {sum(pipeline.block_calls())}", flush=True)
dist.barrier()
# Else gloo's threads may still hold tensors when Python ends, and abort the process. They go with the last reference.
state.nccl_info.group = None
dist.destroy_process_group()
