# SPDX-License-Identifier: Apache-2.0
"""How much every block's delta changes from step to step: `python -m benchmarks.reference.redundancy`.

A block's delta is its output minus its input; plotted is |delta(step) - delta(step - 1)| / |delta(step)|, the mean over
prompts. This redundancy is what a cache lives on. Writes redundancy.json and redundancy.png.
"""

import json
from pathlib import Path
from typing import Any, List, Optional, Sequence

import numpy as np
import torch

from .data import CAPTION_WORDS
from .evaluate import sampling_options
from .load import calibration_prompts, load_pipeline


class DeltaWatch:
    """Forward hooks that keep every block's last delta and record its relative change, (steps, blocks)."""

    def __init__(self, blocks: Any):
        self.last: List[Optional[torch.Tensor]] = [None] * len(blocks)
        self.rows: List[List[float]] = []
        self.handles = [
            block.register_forward_hook(lambda module, args, output, place=place: self._see(place, args[0], output))
            for place, block in enumerate(blocks)
        ]

    def _see(self, place: int, before: torch.Tensor, after: torch.Tensor) -> None:
        delta = after - before
        if place == 0:
            self.rows.append([])
        past = self.last[place]
        self.rows[-1].append(float("nan") if past is None else ((delta - past).norm() / delta.norm()).item())
        self.last[place] = delta

    def close(self) -> np.ndarray:
        for handle in self.handles:
            handle.remove()
        return np.array(self.rows)[1:]


def measure(pipeline: Any, prompts: Sequence[str], steps: int, guidance: float, seed: int) -> np.ndarray:
    """Relative change (steps - 1, blocks), the mean over prompts; a sampler with one forward per step is assumed."""
    tables = []
    for number, prompt in enumerate(prompts):
        watch = DeltaWatch(pipeline.transformer.transformer_blocks)
        noise = torch.Generator().manual_seed(seed + number)
        pipeline(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=noise,
                 max_sequence_length=CAPTION_WORDS, output_type="latent")  # fmt: skip
        tables.append(watch.close())
    return np.mean(tables, axis=0)


def plot(table: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    # The last step changes far more than the others, and would leave them all one colour.
    image = left.imshow(
        table.T, aspect="auto", origin="lower", vmin=0, vmax=np.percentile(table, 98),
        extent=(0.5, len(table) + 0.5, -0.5, table.shape[1] - 0.5),
    )  # fmt: skip
    left.set(xlabel="step", ylabel="block", title="relative change of the block's delta to the step before")
    figure.colorbar(image, ax=left, extend="max")
    for block in range(0, table.shape[1], max(1, table.shape[1] // 4)):
        right.plot(range(1, len(table) + 1), table[:, block], label=f"block {block}")
    right.set(xlabel="step", ylabel="relative change", title="selected blocks", ylim=(0, None))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    args = sampling_options(__doc__, prompts=3).parse_args()
    pipeline = load_pipeline(checkpoint=args.checkpoint)
    table = measure(pipeline, calibration_prompts(args.prompts), args.steps, args.guidance, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"steps": args.steps, "prompts": args.prompts, "relative_change": table.round(5).tolist()}
    (args.out / "redundancy.json").write_text(json.dumps(content) + "\n")
    plot(table, args.out / "redundancy.png")
    print(f"mean {table.mean():.3f}, least {table.min():.3f}, most {table.max():.3f} over steps and blocks")
    print("per block", table.mean(0).round(3).tolist())


if __name__ == "__main__":
    main()
