# SPDX-License-Identifier: Apache-2.0
"""Load the second model and its prompts: what benchmarks import, named as in `benchmarks.reference.load`."""

from pathlib import Path
from typing import List

from . import data
from .data import CAPTION_WORDS, FRAMES, SIZE
from .paths import CHECKPOINT
from .readout import judge

GUIDANCE = 5.0
STEPS = 100

__all__ = [
    "CAPTION_WORDS", "CHECKPOINT", "FRAMES", "GUIDANCE", "SIZE", "STEPS", "calibration_prompts", "heldout_prompts",
    "judge", "load_pipeline",
]  # fmt: skip


def load_pipeline(sample_method: str = "EulerAncestralDiscrete", checkpoint: Path = CHECKPOINT):
    """The second model's OpenSoraPipeline in float32 on the CPU, its progress bar switched off."""
    import torch

    from opensora.models.text_encoder import TextEncoder, WordTokenizer
    from opensora.sample.pipeline_opensora import OpenSoraPipeline
    from opensora.sample.sample_t2v import make_scheduler

    from .model import AutoencoderWrapper, LinearAutoencoder, PlacedOpenSoraT2V

    folder = Path(checkpoint)
    transformer = PlacedOpenSoraT2V.from_pretrained(folder / "model", torch_dtype=torch.float32)
    pipeline = OpenSoraPipeline(
        vae=AutoencoderWrapper(LinearAutoencoder.from_pretrained(folder / "vae")),
        text_encoder=TextEncoder.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=WordTokenizer.from_pretrained(folder / "text_encoder"),
        scheduler=make_scheduler(sample_method),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def heldout_prompts(n: int) -> List[str]:
    """The first `n` prompts of combinations that no training and no calibration video shows (4081 exist)."""
    return [texture.caption for texture in data.textures("heldout")[:n]]


def calibration_prompts(n: int) -> List[str]:
    """The first `n` prompts that searches may look at (3443 exist)."""
    return [texture.caption for texture in data.textures("calibration")[:n]]
