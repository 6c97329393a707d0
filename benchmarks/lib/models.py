# SPDX-License-Identifier: Apache-2.0
"""The reference models that commands can be asked for, each described by what its `load` module offers."""

import argparse
import importlib
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

MODULES = {"miniature": "benchmarks.reference.load", "second": "benchmarks.reference.second.load"}
SAMPLER = "EulerAncestralDiscrete"


class Case(NamedTuple):
    """What is sampled: a prompt and the seed of its noise."""

    prompt: str
    seed: int


class Model(NamedTuple):
    """A trained model and the call that it was trained for.

    `load(sample_method=..., checkpoint=...)` gives its pipeline; `heldout(n)` and `calibration(n)` the first prompts
    that nothing saw and that searches may look at; `judge(frames, prompt)`, where there is a parser, what they show.
    """

    name: str
    load: Callable[..., Any]
    heldout: Callable[[int], List[str]]
    calibration: Callable[[int], List[str]]
    guidance: float
    steps: int
    frames: int
    size: int
    caption_words: int
    judge: Optional[Callable[[Any, str], Dict[str, bool]]] = None

    def arguments(self) -> Dict[str, Any]:
        """Of a pipeline call, what every call shares."""
        return {
            "guidance_scale": self.guidance, "num_frames": self.frames, "height": self.size, "width": self.size,
            "max_sequence_length": self.caption_words,
        }  # fmt: skip

    def latent_shape(self, pipeline: Any) -> Tuple[int, int, int, int]:
        """(C, T, H, W), as the pipeline makes them."""
        strides = pipeline.vae.vae_scale_factor
        odd = self.frames % 2  # a causal autoencoder gives the first frame a latent of its own
        frames = -(-(self.frames - odd) // strides[0]) + odd
        return (pipeline.transformer.config.in_channels, frames, self.size // strides[1], self.size // strides[2])

    def generate(self, pipeline: Any, prompts: Sequence[str], steps: int, latents: torch.Tensor) -> torch.Tensor:
        """Final latents (N, C, T, H, W) from initial noise of unit deviation."""
        with torch.no_grad():
            return pipeline(
                list(prompts), num_inference_steps=steps, latents=latents, output_type="latent", **self.arguments()
            ).images

    def heldout_cases(self, count: int, first: int = 0, seed: int = 0) -> List[Case]:
        """Held-out videos from number `first` on, of seed `seed` + number; past the last prompt they begin again."""
        prompts = self.heldout(first + count)
        return [Case(prompts[number % len(prompts)], seed + number) for number in range(first, first + count)]

    def calibration_cases(self, count: int, seed: int) -> List[Case]:
        return [Case(prompt, seed + number) for number, prompt in enumerate(self.calibration(count))]


def model(name: str) -> Model:
    """The reference model of this name."""
    found = importlib.import_module(MODULES[name])
    return Model(
        name, found.load_pipeline, found.heldout_prompts, found.calibration_prompts, found.GUIDANCE, found.STEPS,
        found.FRAMES, found.SIZE, found.CAPTION_WORDS, getattr(found, "judge", None),
    )  # fmt: skip


def load(options: argparse.Namespace, sampler: str = SAMPLER) -> Tuple[Model, Any]:
    """The model that was asked for and its pipeline."""
    chosen = model(options.model)
    where = {} if options.checkpoint is None else {"checkpoint": options.checkpoint}
    return chosen, chosen.load(sample_method=sampler, **where)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODULES, default="miniature", help="the reference model (miniature)")
    parser.add_argument("--checkpoint", type=Path, help="of the model, other than the one that is kept")
