# SPDX-License-Identifier: Apache-2.0
"""Generations of every kind in one process: `python soak_script.py FOLDER COUNT SAMPLED...` prints JSON.

Generation `n` is the same wherever it runs: its plan, prompt, size, seed and failure follow from n alone. The first
COUNT run on one pipeline; those sampled have run in a fresh process each before, forked when nothing was generated yet.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch

import osaccel.auto  # noqa: F401
import osaccel.demo

sys.path[:0] = [osaccel.demo.__path__[0], str(Path(__file__).resolve().parent.parent)]
from benchmarks.reference.load import load_pipeline  # noqa: E402
from osaccel import settings  # noqa: E402
from osaccel.formats import write_plan, write_timesteps  # noqa: E402
from osaccel.hooks import pipelines  # noqa: E402
from osaccel.messages import SettingsError  # noqa: E402
from osaccel.plan import Correction, Plan, Region  # noqa: E402

STEPS = 8
SIZES = [(17, 32, 32), (9, 32, 32), (1, 32, 32), (9, 16, 32), (5, 24, 24)]
PROMPTS = [
    "one large red circle moving left at the top over a dark background",
    "two small green squares moving up over a light background",
    "a blue triangle",
]
CACHE = {"cache_block_start": 2, "cache_num_blocks": 8, "cache_step_start": 1, "cache_step_interval": 3}
PLAN = Plan(
    steps=STEPS, skip=(4,), conditional_only=(2, 5, 6), regions=(Region(1, 7, (3, 6), 1),),
    correction=Correction(0.0, 0.5),
)  # fmt: skip


class Stopped(BaseException):
    """As KeyboardInterrupt: not to be caught by `except Exception`."""


def arms(folder):
    """What the settings ask for, one after the other."""
    (folder / "cache.json").write_text(json.dumps(CACHE))
    write_plan(str(folder / "plan.json"), PLAN)
    write_timesteps(str(folder / "list.txt"), [990.0, 840.5, 700.0, 560.25, 400.0, 250.0, 120.0])
    cache, plan, fewer = (str(folder / name) for name in ("cache.json", "plan.json", "list.txt"))
    return [
        {},
        {"OSACCEL_CACHE_CONFIG": cache},
        {"OSACCEL_PLAN": plan},
        {"OSACCEL_TIMESTEPS": fewer},
        {"OSACCEL_CORRECTION": "1"},
        {"OSACCEL_CACHE_CONFIG": cache, "OSACCEL_TIMESTEPS": fewer, "OSACCEL_CORRECTION": "1"},
        {"OSACCEL_PLAN": plan, "OSACCEL_ATTENTION": "auto"},
    ]


def failing(pipeline, number):
    """How generation `number` fails: a callback, what undoes it, and the number of steps that is asked for."""

    def callback(i, *_):
        if number % 8 == 3 and i == 5:
            raise Stopped
        if number % 8 == 5 and i == 2:
            # In the middle of the next step.
            hooks.append(pipeline.transformer.transformer_blocks[3].register_forward_pre_hook(fail))

    def fail(*_):
        raise ZeroDivisionError

    hooks = []
    # A plan is made for its number of steps.
    return callback, lambda: [hook.remove() for hook in hooks], STEPS + (number % 8 == 7)


def generate(pipeline, number, all_arms):
    """A digest of the latents, or the name of the failure."""
    frames, height, width = SIZES[number % len(SIZES)]
    pipelines._settings = settings.load(all_arms[number % len(all_arms)])
    callback, undo, steps = failing(pipeline, number)
    torch.manual_seed(number)
    try:
        latents = pipeline(
            PROMPTS[number % len(PROMPTS)], num_frames=frames, height=height, width=width, num_inference_steps=steps,
            guidance_scale=2.0, max_sequence_length=16, callback=callback, output_type="latent",
        ).images  # fmt: skip
        return hashlib.sha256(latents.numpy().tobytes()).hexdigest()
    except (Stopped, ZeroDivisionError, SettingsError) as error:
        return type(error).__name__
    finally:
        undo()


def memory():
    """[resident MB, live tensors, their MB], with cycles collected; without the model's."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return [resident / 2**20, len(tensors), sum(sizes.values()) / 2**20]


def names(pipeline):
    owners = [pipeline, pipeline.scheduler, *pipeline.transformer.modules()]
    return [[sorted(vars(owner)), len(getattr(owner, "_forward_pre_hooks", ()))] for owner in owners]


def loaded():
    torch.set_num_threads(1)
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fresh(number, all_arms):
    return generate(loaded(), number, all_arms)


def main(folder, count, sampled):
    all_arms = arms(Path(folder))
    pipeline = loaded()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        alone = pool.starmap(fresh, [(number, all_arms) for number in sampled], chunksize=1)
    results, used = [], []
    # What is there by now, the model too, need not be looked through again and again.
    gc.freeze()
    generate(pipeline, 0, all_arms)
    before = names(pipeline)
    for number in range(count):
        results.append(generate(pipeline, number, all_arms))
        used.append(memory())
    return {"results": results, "alone": alone, "memory": used, "left": names(pipeline) != before}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:3]), list(map(int, sys.argv[3:])))))
