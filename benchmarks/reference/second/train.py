# SPDX-License-Identifier: Apache-2.0
"""Train the second model: `python -m benchmarks.reference.second.train --out DIR`; run it again to go on.

Stages, each from its own file in DIR: autoencoder (a fit of a second), latents, transformer with text encoder; then the
averaged networks are written as the checkpoint. `--export-only` writes what the training has reached so far.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import List, Tuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..loop import Loop
from ..train import Examples, initialise, to_tensor
from . import data
from .model import LinearAutoencoder, make_transformer
from .paths import CHECKPOINT


@dataclass(frozen=True)
class Config:
    """Sizes and lengths; `tiny` is for the tests."""

    seed: int = 7
    channels: int = 10
    fitted: int = 1500  # videos the autoencoder is fitted to
    videos: int = 16000
    steps: int = 12000
    decay_from: float = 0.7  # part of the steps after which the learning rate falls
    batch: int = 32
    # The floor of the signal's share in the weight of an error, as for the miniature.
    floor: float = 0.003
    rate: float = 1.5e-3
    warmup: int = 250
    decay: float = 0.999
    bf16: bool = True
    compiled: bool = True  # the blocks, by torch.compile; needs a C++ compiler
    layers: int = 8
    heads: int = 4
    head_dim: int = 32
    text_dim: int = 64
    caption_dropout: float = 0.1
    save_every: int = 250

    def rate_at(self, step: int) -> float:
        """Warm-up, a long constant stretch, then a straight fall to 2 %: how long it is can be settled on the way."""
        begin = round(self.decay_from * self.steps)
        falling = max(0.0, (step - begin) / (self.steps - begin))
        return self.rate * min(1.0, (step + 1) / self.warmup) * (1 - 0.98 * falling)


def tiny() -> Config:
    return Config(
        fitted=8, videos=16, steps=6, batch=4, warmup=2, bf16=False, compiled=False, layers=2, heads=2, head_dim=8,
        text_dim=16, save_every=2,
    )  # fmt: skip


def videos(numbers: range) -> Tuple[torch.Tensor, List[str]]:
    """Training videos (N, 3, T, H, W) in [-1, 1] and their captions."""
    frames, captions = zip(*(data.sample("train", number) for number in numbers))
    return to_tensor(np.stack(frames) * 255), list(captions)


def fit_autoencoder(config: Config, out: Path) -> LinearAutoencoder:
    folder = out / "vae"
    if not (folder / "config.json").exists():
        autoencoder = LinearAutoencoder(config.channels)
        autoencoder.fit(videos(range(config.fitted))[0])
        autoencoder.save_pretrained(folder)
    return LinearAutoencoder.from_pretrained(folder)


@torch.no_grad()
def encode_latents(config: Config, out: Path, autoencoder: LinearAutoencoder) -> Tuple[torch.Tensor, List[str]]:
    """Half-precision latents (videos, C, T, H, W) of the training set and their captions, kept in DIR/latents.pt."""
    path, size = out / "latents.pt", min(200, config.videos)
    if not path.exists():
        latents, captions = [], []
        for start in tqdm(range(0, config.videos, size), desc="latents"):
            batch, texts = videos(range(start, min(start + size, config.videos)))
            latents.append(autoencoder.encode(batch).half())
            captions += texts
        temporary = path.with_suffix(".tmp")
        torch.save({"latents": torch.cat(latents), "captions": captions}, temporary)
        temporary.replace(path)
    stored = torch.load(path, weights_only=True)
    return stored["latents"], stored["captions"]


def make_tokenizer():
    from opensora.models.text_encoder import WordTokenizer

    return WordTokenizer(sorted({word for texture in data.all_textures() for word in texture.caption.split()}))


def tokenize(captions):
    """Word ids and mask, (N, CAPTION_WORDS) each, of one caption or several."""
    return make_tokenizer()(captions, padding="max_length", max_length=data.CAPTION_WORDS, return_tensors="pt")


class Denoiser(nn.Module):
    """The two networks that are trained together, so that they share one optimiser and one average."""

    def __init__(self, config: Config, vocabulary: int):
        from opensora.models.text_encoder import TextEncoder

        super().__init__()
        size = (data.FRAMES // 4, data.SIZE // 4, data.SIZE // 4)
        self.text_encoder = TextEncoder(vocab_size=vocabulary, dim=config.text_dim)
        self.transformer = make_transformer(
            config.layers, config.heads, config.head_dim, config.text_dim, config.channels, size
        )
        initialise(self.transformer)

    def forward(self, latents, timestep, ids, mask):
        text = self.text_encoder(ids, attention_mask=mask)[0]
        options = {"encoder_hidden_states": text[:, None], "encoder_attention_mask": mask[:, None]}
        return self.transformer(latents, timestep=timestep, return_dict=False, **options)[0]


def transformer_loop(config: Config, out: Path, read_only: bool = False) -> Loop:
    torch.manual_seed(config.seed + 1)
    model = Denoiser(config, len(make_tokenizer()))
    path = out / "transformer.pt"
    return Loop(model, path, config.steps, config.rate_at, config.decay, config.bf16, read_only)


def train_transformer(config: Config, out: Path, examples: Examples, stop_at: int = 0) -> Loop:
    loop = transformer_loop(config, out)
    for block in loop.model.transformer.transformer_blocks if config.compiled else ():
        block.compile(dynamic=False)

    def loss_at(model, step):
        noisy, timestep, ids, mask, noise, weight = examples.batch(step)
        return (weight * (model(noisy, timestep, ids, mask).float() - noise).pow(2)).mean()

    if loop.step < loop.steps:
        loop.run(loss_at, config.save_every, stop_at)
    return loop


def export(config: Config, out: Path, target: Path) -> int:
    """Write the averaged networks, the large one in half precision; returns the step they come from."""
    loop = transformer_loop(config, out, read_only=True)
    fit_autoencoder(config, out).save_pretrained(target / "vae")
    loop.average.transformer.half().save_pretrained(target / "model")
    loop.average.text_encoder.save_pretrained(target / "text_encoder")
    make_tokenizer().save_pretrained(str(target / "text_encoder"))
    return loop.step


def run(config: Config, out: Path, stop_at: int = 0) -> Loop:
    """All stages; finished ones are only loaded."""
    out.mkdir(parents=True, exist_ok=True)
    latents, captions = encode_latents(config, out, fit_autoencoder(config, out))
    return train_transformer(config, out, Examples(config, latents, captions, tokenize), stop_at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, latents and loss curve")
    parser.add_argument("--to", type=Path, default=CHECKPOINT, help="folder of the exported checkpoint")
    parser.add_argument("--export-only", action="store_true", help="train no further")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to see that everything works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = tiny() if args.tiny else Config()
    if not args.export_only:
        run(config, args.out)
    print(f"exported step {export(config, args.out, args.to)} to {args.to}")


if __name__ == "__main__":
    main()
