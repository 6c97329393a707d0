# SPDX-License-Identifier: Apache-2.0
"""Sample held-out prompts with the plain sampler and let the parser judge: `python -m benchmarks.reference.evaluate`.

Writes evaluation.json and contact_sheet.png, and prints every judgement's mean with its 95 % Wilson interval.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import imageio
import numpy as np
import torch

from .data import CAPTION_WORDS
from .load import GUIDANCE, STEPS, calibration_prompts, heldout_prompts, judge, load_pipeline
from .paths import CHECKPOINT


def wilson(share: float, n: int) -> Tuple[float, float]:
    """The 95 % interval of a share seen in `n` trials."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def sample_videos(
    pipeline: Any, prompts: Sequence[str], steps: int, guidance: float, seed: int, batch: int = 8, **sizes: Any
) -> np.ndarray:
    """Videos (N, T, H, W, 3); each prompt has its own noise stream, so a batch's size does not matter.

    `sizes` are further arguments of the call, for a model other than the miniature.
    """
    videos = []
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": CAPTION_WORDS, **sizes}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed + start + item) for item in range(len(part))]
        videos.append(pipeline(part, generator=noise, **options).images.numpy())
    return np.concatenate(videos)


def contact_sheet(videos: np.ndarray, rows: int = 16, scale: int = 3) -> np.ndarray:
    """Every second frame of the first videos, one video per row."""
    strips = [np.concatenate(list(video[::2]), axis=1) for video in videos[:rows]]
    return np.concatenate(strips).repeat(scale, axis=0).repeat(scale, axis=1)


def sampling_options(description: str, prompts: int) -> argparse.ArgumentParser:
    """The command line of every measurement on samples of the miniature."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=Path("reference_evaluation"))
    return parser


def main() -> None:
    parser = sampling_options(__doc__, prompts=48)
    parser.add_argument("--split", choices=("heldout", "calibration"), default="heldout")
    args = parser.parse_args()
    prompts = (heldout_prompts if args.split == "heldout" else calibration_prompts)(args.prompts)
    pipeline, began = load_pipeline(checkpoint=args.checkpoint), time.time()
    videos = sample_videos(pipeline, prompts, args.steps, args.guidance, args.seed)
    seconds = time.time() - began
    verdicts = [judge(video, prompt) for video, prompt in zip(videos, prompts)]
    report(args, prompts, verdicts, seconds)
    imageio.imwrite(args.out / "contact_sheet.png", contact_sheet(videos))


def report(
    args: argparse.Namespace, prompts: Sequence[str], verdicts: Sequence[Dict[str, bool]], seconds: float
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    means = {}
    for name in verdicts[0]:
        share = float(np.mean([verdict[name] for verdict in verdicts]))
        low, high = wilson(share, len(verdicts))
        means[name] = {"share": round(share, 4), "low": round(low, 4), "high": round(high, 4)}
        print(f"{name:>10}  {share:6.1%}  [{low:.1%}, {high:.1%}]")
    print(f"{len(prompts)} videos, {args.steps} steps, guidance {args.guidance}, {seconds / len(prompts):.1f} s each")
    settings = {"prompts": len(prompts), "split": args.split, "steps": args.steps, "guidance": args.guidance}
    each = [{"prompt": prompt, **verdict} for prompt, verdict in zip(prompts, verdicts)]
    content = {**settings, "seed": args.seed, "seconds": round(seconds, 1), "means": means, "videos": each}
    (args.out / "evaluation.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
