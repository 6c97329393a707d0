# SPDX-License-Identifier: Apache-2.0
"""Run by benchmarks.wall in every rank: a sample script, unmodified, with a stopwatch around the parts of a video.

    python -m benchmarks.wall_rank OUT MODULE OPTIONS...

writes OUT/rank_N.json: for every video the seconds of text, denoising, VAE and saving, and a digest of its frames.
"""

import contextlib
import functools
import hashlib
import json
import os
import runpy
import sys
import time
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
import torch
import wrapt

PARTS = ("text", "denoising", "VAE", "saving")
# Processor seconds of the VAE part: on a CPU that other programs use too they say more than the clock does.
PROCESSOR = "VAE, processor"
PIPELINES = ("opensora.sample.pipeline_opensora", "opensora.sample.pipeline_opensora_sp")
SAVERS = (("imageio", "mimwrite"), ("imageio", "imwrite"), ("torchvision.utils", "save_image"))


class Stopwatch:
    """Seconds by part, video by video; what the device still has to do counts for the part that asked for it."""

    def __init__(self) -> None:
        self.videos: List[Dict[str, Any]] = []
        self._pipelines = 0

    def construct(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """A wrapt wrapper for the pipeline's constructor: a second one begins sample_t2v_sp's next, endless round."""
        self._pipelines += 1
        if self._pipelines > 1:
            raise SystemExit(0)
        return wrapped(*args, **kwargs)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started, processor = moment(), time.process_time()
        try:
            yield
        finally:
            self.videos[-1][name] += moment() - started
            if name == "VAE":
                self.videos[-1][PROCESSOR] += time.process_time() - processor

    def around(self, name: str) -> Callable:
        """A wrapt wrapper that counts a method's time as this part of the video under way."""

        def call(wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
            with self.part(name):
                return wrapped(*args, **kwargs)

        return call

    def video(self, call: Callable) -> Callable:
        """The pipeline's `__call__` with the stopwatch; what is neither text nor VAE is denoising."""

        # A plain function: osaccel takes a `__call__` that wrapt has wrapped for its own.
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            video: Dict[str, Any] = dict.fromkeys((*PARTS, PROCESSOR), 0.0)
            self.videos.append(video)
            started = moment()
            output = call(*args, **kwargs)
            video["denoising"] = moment() - started - video["text"] - video["VAE"]
            frames = np.ascontiguousarray(output.images.numpy())
            video["digest"] = hashlib.sha256(frames.tobytes()).hexdigest()
            return output

        return timed

    def save(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """A wrapt wrapper for what writes a file; the grid that a script saves last belongs to no video."""
        if not self.videos or self.videos[-1]["saving"]:
            return wrapped(*args, **kwargs)
        with self.part("saving"):
            return wrapped(*args, **kwargs)


def moment() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(stopwatch: Stopwatch) -> None:
    """Put the stopwatch around the script's pipeline, when it is imported, and around what saves its videos."""

    def wrap(module: Any) -> None:
        pipeline = module.OpenSoraPipeline
        wrapt.wrap_function_wrapper(pipeline, "__init__", stopwatch.construct)
        wrapt.wrap_function_wrapper(pipeline, "encode_prompt", stopwatch.around("text"))
        wrapt.wrap_function_wrapper(pipeline, "decode_latents", stopwatch.around("VAE"))
        pipeline.__call__ = stopwatch.video(pipeline.__call__)

    for name in PIPELINES:
        wrapt.register_post_import_hook(wrap, name)
    for module, function in SAVERS:
        # Not every script's environment has all of them.
        with contextlib.suppress(ImportError):
            wrapt.wrap_function_wrapper(module, function, stopwatch.save)


def main() -> None:
    out, module, *options = sys.argv[1:]
    stopwatch = Stopwatch()
    watch(stopwatch)
    sys.argv = [module, *options]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        with open(os.path.join(out, f"rank_{os.environ.get('RANK', '0')}.json"), "w") as file:
            json.dump(stopwatch.videos, file)


if __name__ == "__main__":
    main()
