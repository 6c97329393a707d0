# SPDX-License-Identifier: Apache-2.0
"""Sample held-out prompts and read what was drawn: `python -m benchmarks.reference.second.evaluate`.

Writes evaluation.json and contact_sheet.png; prints every attribute's share with its 95 % Wilson interval, first for
rendered videos of the same prompts after the autoencoder (the ceiling), then for samples. Also printed: brightness and
contrast of the samples against the rendered videos, which too much guidance would raise.
"""

import time
from pathlib import Path
from typing import Dict, List

import imageio
import numpy as np
import torch

from ..evaluate import contact_sheet, report, sample_videos, sampling_options
from ..train import to_tensor
from . import data
from .load import CAPTION_WORDS, FRAMES, GUIDANCE, SIZE, calibration_prompts, heldout_prompts, judge, load_pipeline
from .paths import CHECKPOINT

SIZES = {"num_frames": FRAMES, "height": SIZE, "width": SIZE, "max_sequence_length": CAPTION_WORDS}


def rendered(pipeline, prompts: List[str], seed: int) -> np.ndarray:
    """The prompts' videos (N, T, H, W, 3), drawn by the generator, encoded and decoded."""
    videos = []
    for number, prompt in enumerate(prompts):
        frames = data.render(data.by_caption()[prompt], np.random.default_rng([data.STREAM, seed, number]))
        latents = pipeline.vae.encode(to_tensor(frames * 255)[None])
        videos.append(pipeline.decode_latents(latents)[0].numpy())
    return np.stack(videos)


def verdicts_of(videos: np.ndarray, prompts: List[str]) -> List[Dict[str, bool]]:
    return [judge(video, prompt) for video, prompt in zip(videos, prompts)]


def looks(videos: np.ndarray) -> str:
    """Mean brightness and mean deviation within a frame, of uint8 videos, in 1 / 255."""
    return f"brightness {videos.mean():.1f}, contrast {videos.std(axis=(2, 3)).mean():.1f}"


def main() -> None:
    parser = sampling_options(__doc__, prompts=96)
    parser.add_argument("--split", choices=("heldout", "calibration"), default="heldout")
    parser.set_defaults(guidance=GUIDANCE, checkpoint=CHECKPOINT, out=Path("second_evaluation"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = (heldout_prompts if args.split == "heldout" else calibration_prompts)(args.prompts)
    pipeline = load_pipeline(checkpoint=args.checkpoint)
    truth = rendered(pipeline, prompts, args.seed)
    ceiling = np.mean([verdict["valid"] for verdict in verdicts_of(truth, prompts)])
    began = time.time()
    videos = sample_videos(pipeline, prompts, args.steps, args.guidance, args.seed, **SIZES)
    report(args, prompts, verdicts_of(videos, prompts), time.time() - began)
    print(f"rendered videos after the autoencoder: valid {ceiling:.1%}; {looks(truth)}; samples: {looks(videos)}")
    imageio.imwrite(args.out / "contact_sheet.png", contact_sheet(videos))


if __name__ == "__main__":
    main()
