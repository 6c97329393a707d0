# SPDX-License-Identifier: Apache-2.0
"""Where the miniature's denoising falls short, by timestep: `python -m benchmarks.reference.errors --out DIR`.

Compared are the transformer with and without the caption, and a look-up: the mean of the training latents in DIR, each
weighted by how likely it is to have become the noisy latents (the optimal denoiser of that set). Errors are mean
squared errors of the denoised latents in units of the latents' variance; lower is better. Above the look-up the network
has something left to learn; below it, it generalises past the set.
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import torch

from . import data
from .load import load_pipeline
from .paths import CHECKPOINT
from .train import Config, alphas_cumprod, load_latents, to_tensor, tokenize

TIMESTEPS = (100, 200, 300, 400, 500, 600, 700, 800, 850, 900, 950)


def calibration_latents(pipeline: Any, count: int) -> Tuple[torch.Tensor, List[str]]:
    """Latents (N, C, T, H, W) and captions of videos that the training has not seen."""
    videos, captions = zip(*(data.sample("calibration", index) for index in range(count)))
    return pipeline.vae.encode(to_tensor(np.stack(videos))), list(captions)


def network(pipeline: Any, noisy: torch.Tensor, timestep: int, captions: List[str]) -> torch.Tensor:
    """The predicted noise."""
    tokens = tokenize(captions)
    text = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    return pipeline.transformer(
        noisy, timestep=torch.full((len(noisy),), timestep), encoder_hidden_states=text[:, None],
        encoder_attention_mask=tokens.attention_mask[:, None], return_dict=False,
    )[0]  # fmt: skip


def look_up(noisy: torch.Tensor, known: torch.Tensor, sigma: float, part: int = 4000) -> torch.Tensor:
    """The optimal denoised (N, ...) of noisy = x + sigma * noise if x were one of `known` (M, ...), float16."""
    flat, parts = noisy.flatten(1), known.flatten(1).split(part)
    scores = [(flat @ some.float().T - some.float().pow(2).sum(1) / 2) / sigma**2 for some in parts]
    weights = torch.cat(scores, dim=1).softmax(1).split(part, dim=1)
    return sum(share @ some.float() for share, some in zip(weights, parts)).view_as(noisy)


@torch.no_grad()
def errors(pipeline: Any, known: torch.Tensor, count: int) -> List[Dict[str, float]]:
    clean, captions = calibration_latents(pipeline, count)
    variance, rows = clean.var().item(), []
    torch.manual_seed(0)
    for timestep in TIMESTEPS:
        alpha = alphas_cumprod()[timestep]
        sigma, noise = float(((1 - alpha) / alpha).sqrt()), torch.randn_like(clean)
        exploding = clean + sigma * noise

        def of(found: torch.Tensor) -> float:
            return float((found - clean).pow(2).mean() / variance)

        row = {"timestep": timestep, "sigma": sigma}
        for name, texts in (("caption", captions), ("no caption", [""] * count)):
            row[name] = of(exploding - sigma * network(pipeline, alpha.sqrt() * exploding, timestep, texts))
        rows.append({**row, "look-up": of(look_up(exploding, known, sigma))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training, for its latents")
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--known", type=int, default=40000, help="training latents to look up in")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    known = load_latents(Config(), options.out)[0][: options.known]
    print(f"{'timestep':>10}{'sigma':>10}{'caption':>12}{'no caption':>12}{'look-up':>12}")
    for row in errors(load_pipeline(checkpoint=options.checkpoint), known, options.videos):
        losses = "".join(f"{row[name]:>12.4f}" for name in ("caption", "no caption", "look-up"))
        print(f"{row['timestep']:>10}{row['sigma']:>10.2f}{losses}")


if __name__ == "__main__":
    main()
