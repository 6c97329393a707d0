# SPDX-License-Identifier: Apache-2.0
"""Samples every arm under the same conditions.

A video's noise, ancestral noise included, follows from its own seed, in whatever batch it is sampled, and runs with
fewer steps are coupled to the plain run as well; each generation gets a copy of the transformer, so nothing an arm
leaves behind reaches another; and a block counts as computed when it really runs, whatever the arm itself reports.
"""

import contextlib
import copy
import time
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch

from benchmarks.lib.kept import Kept, digest_of, weights_digest
from benchmarks.lib.models import Case, Model
from benchmarks.lib.motion import Noise
from benchmarks.lib.work import counted


class Arm(NamedTuple):
    """One way to sample.

    attach: `attach(pipeline)` is entered around one generation with a fresh transformer.
    steps: how many it takes; None for as many as the plain run.
    name, family: its row, and the line to which it belongs in a plot.
    work: what it costs, where that is known beforehand: block calls x share of the batch, plain = 1.
    alone: its decisions depend on what it sees, so every video is sampled by itself.
    threshold: what it decides by, where it is tuned.
    key: what its results are kept under; must name all that they depend on. Without one they are not kept.
    """

    attach: Callable[[Any], ContextManager] = contextlib.nullcontext
    steps: Optional[int] = None
    name: str = "plain"
    family: str = "plain"
    work: Optional[float] = None
    alone: bool = False
    threshold: Optional[float] = None
    key: str = ""


class NotKept(Exception):
    """Something would have to be sampled, and only what is kept was asked for."""


PLAIN = Arm(work=1.0)
NETWORKS = ("transformer", "text_encoder", "vae")


class Sample(NamedTuple):
    """One video: final latents (1, C, T, H, W), block calls x share of the batch, seconds of denoising."""

    latents: torch.Tensor
    computed: float
    seconds: float


class Bench:
    """Samples arms on one pipeline of a reference model.

    Args:
        model: what the pipeline was trained for.
        pipeline: its pipeline, with any scheduler; other numbers of steps are coupled for EulerAncestralDiscrete and
            for deterministic ones.
        steps: of the plain run; None for the model's.
        batch: videos sampled at a time.
        folder: keeps plain runs, and whatever else is given a key; None for nothing kept.
        only_kept: sample nothing; what is not kept raises NotKept.
    """

    def __init__(
        self,
        model: Model,
        pipeline: Any,
        steps: Optional[int] = None,
        batch: int = 1,
        folder: Optional[Any] = None,
        only_kept: bool = False,
    ):
        self.model, self.pipeline, self.batch, self.only_kept = model, pipeline, batch, only_kept
        self.steps = steps or model.steps
        self.num_blocks = len(pipeline.transformer.transformer_blocks)
        self.shape = model.latent_shape(pipeline)
        self.kept = Kept(folder, self._bound() if folder else {})

    def _bound(self) -> Dict[str, Any]:
        """All that a plain run depends on beside its prompt and seed."""
        scheduler = self.pipeline.scheduler
        config = {key: value for key, value in scheduler.config.items() if key[:1] != "_"}
        return {
            "model": self.model.name, "sampler": type(scheduler).__name__, "steps": self.steps,
            "guidance": self.model.guidance, "sampler_config": digest_of(config),
            "weights": [weights_digest(getattr(self.pipeline, part)) for part in NETWORKS],
        }  # fmt: skip

    @property
    def plain_blocks(self) -> int:
        """Block calls of a plain run."""
        return self.num_blocks * self.steps

    def sample(self, arm: Arm, prompt: str, seed: int) -> Sample:
        return self.run(arm, [Case(prompt, seed)])[0]

    def run(self, arm: Arm, cases: Sequence[Case]) -> List[Sample]:
        """Every video of an arm."""
        size = 1 if arm.alone else self.batch
        parts = [cases[start : start + size] for start in range(0, len(cases), size)]
        return [sample for part in parts for sample in self._together(arm, part)]

    def plain(self, cases: Sequence[Case]) -> List[Sample]:
        """Every video's plain run, sampled if it is not kept yet; batch by batch, so an interrupted one goes on."""
        missing = [case for case in cases if not self.kept.has(_plain_name(case))]
        for start in range(0, len(missing), self.batch):
            part = missing[start : start + self.batch]
            for case, sample in zip(part, self._together(PLAIN, part)):
                self.kept.put(_plain_name(case), sample._asdict())
        return [Sample(**self.kept.get(_plain_name(case))) for case in cases]

    def frames(self, sample: Sample) -> np.ndarray:
        """Decoded, uint8 (T, H, W, 3)."""
        with torch.no_grad():
            return self.pipeline.decode_latents(sample.latents)[0].numpy()

    def _together(self, arm: Arm, cases: Sequence[Case]) -> List[Sample]:
        if self.only_kept:
            raise NotKept(arm.name)
        steps = arm.steps or self.steps
        noise = Noise(self.pipeline.scheduler, self.shape, [case.seed for case in cases], self.steps, steps)
        prompts = [case.prompt for case in cases]
        with self._own_transformer() as transformer, counted(list(transformer.transformer_blocks)) as calls:
            with arm.attach(self.pipeline), noise.attached():
                started = time.perf_counter()
                latents = self.model.generate(self.pipeline, prompts, steps, noise.initial())
                seconds = time.perf_counter() - started
        rows = len(cases) * (2 if self.model.guidance > 1 else 1)
        computed, each = sum(calls) / rows, seconds / len(cases)
        return [Sample(video, computed, each) for video in latents.float().split(1)]

    @contextlib.contextmanager
    def _own_transformer(self) -> Iterator[Any]:
        original = self.pipeline.transformer
        self.pipeline.transformer = copy.deepcopy(original)
        try:
            yield self.pipeline.transformer
        finally:
            self.pipeline.transformer = original


def _plain_name(case: Case) -> str:
    return f"plain-{case.seed}-{digest_of(case.prompt)[:12]}"
