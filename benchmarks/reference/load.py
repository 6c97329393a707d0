# SPDX-License-Identifier: Apache-2.0
"""Load the miniature and its prompts: what other benchmarks import."""

from argparse import Namespace
from pathlib import Path
from typing import Any, List

from osaccel.demo.parser import judge, score

from . import data
from .data import CAPTION_WORDS, FRAMES, SIZE
from .paths import CHECKPOINT

GUIDANCE = 2.0  # of 2, 3, 4 and 6, with which 40 calibration prompts all gave what they name, the mildest
STEPS = 100

__all__ = [
    "CAPTION_WORDS", "FRAMES", "GUIDANCE", "SIZE", "STEPS", "calibration_prompts", "heldout_prompts", "judge",
    "load_pipeline", "score",
]  # fmt: skip


def load_pipeline(sample_method: str = "EulerAncestralDiscrete", checkpoint: Path = CHECKPOINT) -> Any:
    """The miniature's OpenSoraPipeline in float32 on the CPU, its progress bar switched off."""
    from opensora.sample import sample_t2v

    folder = Path(checkpoint)
    pipeline = sample_t2v.load_pipeline(
        Namespace(
            device="cpu",
            cache_dir=None,
            sample_method=sample_method,
            ae="CausalVAEModel_D8_4x4x4",
            ae_path=str(folder / "vae"),
            model_path=str(folder / "model"),
            text_encoder_name=str(folder / "text_encoder"),
        )  # fmt: skip
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def heldout_prompts(n: int) -> List[str]:
    """The first `n` prompts of combinations that no training and no calibration video shows (426 exist)."""
    return [scene.caption for scene in data.scenes("heldout")][:n]


def calibration_prompts(n: int) -> List[str]:
    """The first `n` prompts that searches may look at (392 exist)."""
    return [scene.caption for scene in data.scenes("calibration")][:n]
