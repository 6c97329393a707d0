# SPDX-License-Identifier: Apache-2.0
"""Train the miniature: `python -m benchmarks.reference.train --out DIR`; run it again to go on after an interruption.

Stages, each from its own checkpoint in DIR: autoencoder, latents, transformer with text encoder, export.
"""

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from . import data
from .loop import Loop, learning_rate, rank, share, step_generator, workers
from .paths import CHECKPOINT  # noqa: F401  (puts the miniature on sys.path)

STAGES = ("autoencoder", "latents", "transformer")


@dataclass(frozen=True)
class Config:
    """Sizes and lengths; `tiny` is for the tests."""

    seed: int = 0
    autoencoder_bf16: bool = True
    bf16: bool = True
    autoencoder_steps: int = 4000
    autoencoder_batch: int = 16
    autoencoder_rate: float = 2e-3
    latent_noise: float = 0.1  # keeps the decoder calm about the small errors of a sampler
    chunks: int = 64
    chunk: int = 1000
    # Steps at which the learning rate has come down; to train on, append the end of another cycle.
    cycles: Tuple[int, ...] = (15000,)
    batch: int = 64
    # The floor of the signal's share. Count, place and motion follow from the caption, and that at the noisiest
    # timesteps, so these count in full.
    floor: float = 0.003
    rate: float = 3e-3
    warmup: int = 300
    decay: float = 0.999
    compiled: bool = True  # the blocks, by torch.compile; needs a C++ compiler
    layers: int = 12
    heads: int = 4
    head_dim: int = 24
    text_dim: int = 96
    caption_dropout: float = 0.1
    # Rotary attention alone learns very late where in the frame a token is, and without that no caption that names a
    # place can be drawn. Rewarding a linear reading of the place after this block, it is learnt in a few hundred steps.
    place_block: int = 3
    place_weight: float = 0.03
    save_every: int = 500

    @property
    def steps(self) -> int:
        return self.cycles[-1]

    def rate_at(self, step: int) -> float:
        """The transformer's learning rate: a warm-up and a cosine per cycle."""
        begin, end = next(pair for pair in zip((0, *self.cycles), self.cycles) if step < pair[1])
        return learning_rate(self.rate, step - begin, end - begin, self.warmup)


def tiny() -> Config:
    return Config(
        autoencoder_steps=4,
        autoencoder_batch=2,
        autoencoder_bf16=False,
        bf16=False,
        compiled=False,
        chunks=2,
        chunk=4,
        cycles=(5, 8),
        batch=4,
        warmup=2,
        layers=2,
        place_block=0,
        heads=2,
        head_dim=12,
        text_dim=16,
        save_every=4,
    )


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., T, H, W, 3) -> float (..., 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float() / 127.5 - 1.0


def batches(size: int, start: int, stop: int, part: slice) -> Iterator[Tuple[torch.Tensor, List[str]]]:
    """This worker's part of batches `start` .. `stop`; the next one is drawn while the current one is used."""

    def draw(number: int) -> Tuple[torch.Tensor, List[str]]:
        videos, captions = zip(*(data.sample("train", number * size + item) for item in range(size)[part]))
        return to_tensor(np.stack(videos)), list(captions)

    with ThreadPoolExecutor(1) as pool:
        upcoming = [pool.submit(draw, start)] if start < stop else []
        for number in range(start, stop):
            current = upcoming.pop().result()
            upcoming = [pool.submit(draw, number + 1)] if number + 1 < stop else []
            yield current


# --- autoencoder


def autoencoder_loop(config: Config, out: Path, read_only: bool = False) -> Loop:
    from opensora.models.causalvideovae import CausalVAEModel

    torch.manual_seed(config.seed)
    model, steps = CausalVAEModel(), config.autoencoder_steps

    def rate_at(step: int) -> float:
        return learning_rate(config.autoencoder_rate, step, steps, steps // 20 + 1)

    return Loop(model, out / "autoencoder.pt", steps, rate_at, 0.995, config.autoencoder_bf16, read_only)


def train_autoencoder(config: Config, out: Path, stop_at: int = 0) -> nn.Module:
    loop = autoencoder_loop(config, out)
    deviation = loop.model.config.latent_deviation
    part = share(config.autoencoder_batch)
    source = batches(config.autoencoder_batch, loop.step, config.autoencoder_steps, part)

    def loss_at(model: Any, step: int) -> torch.Tensor:
        videos, _ = next(source)
        latents = model.encode(videos)
        draw = step_generator(config.seed, step)
        noise = torch.randn(config.autoencoder_batch, *latents.shape[1:], generator=draw)[part]
        # Noise of a random strength: clean latents must decode sharply, noisy ones sensibly.
        strength = torch.rand(config.autoencoder_batch, 1, 1, 1, 1, generator=draw)[part]
        error = model.decode(latents + 2 * config.latent_noise * deviation * strength * noise).float() - videos
        # Shapes cover few pixels and are what is judged, so vivid pixels count for more.
        weight = 1 + 2 * (videos.amax(1, keepdim=True) - videos.amin(1, keepdim=True))
        return (weight * (error.abs() + error.pow(2))).mean()

    if loop.step < loop.steps:
        loop.run(loss_at, config.save_every, stop_at)
    return loop.average


# --- latents


@torch.no_grad()
def encode_latents(config: Config, out: Path, autoencoder: Any) -> None:
    """Write DIR/latents/NNN.pt, `chunk` training videos each; existing chunks are kept."""
    (out / "latents").mkdir(parents=True, exist_ok=True)
    size = min(25, config.chunk)
    per_chunk = config.chunk // size
    mine = [number for number in range(rank(), config.chunks, workers()) if not _chunk(out, number).exists()]
    for number in tqdm(mine, desc="latents", disable=rank() > 0):
        stored, captions = [], []
        for videos, texts in batches(size, number * per_chunk, (number + 1) * per_chunk, slice(None)):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.autoencoder_bf16):
                stored.append(autoencoder.encode(videos).half())
            captions += texts
        temporary = _chunk(out, number).with_suffix(".tmp")
        torch.save({"latents": torch.cat(stored), "captions": captions}, temporary)
        temporary.replace(_chunk(out, number))


def _chunk(out: Path, number: int) -> Path:
    return out / "latents" / f"{number:03d}.pt"


def load_latents(config: Config, out: Path) -> Tuple[torch.Tensor, List[str]]:
    chunks = [torch.load(_chunk(out, number), weights_only=True) for number in range(config.chunks)]
    return torch.cat([chunk["latents"] for chunk in chunks]), [text for chunk in chunks for text in chunk["captions"]]


# --- transformer and text encoder


class Denoiser(nn.Module):
    """The two networks that are trained together, so that they share one optimiser and one average.

    In training, a third one reads from the hidden states after one block which frame, row and column each token is.
    """

    def __init__(self, config: Config, vocabulary: int):
        from opensora.models.diffusion.opensora.modeling_opensora import OpenSoraT2V
        from opensora.models.text_encoder import TextEncoder

        super().__init__()
        self.axes, width = (5, 4, 4), config.heads * config.head_dim
        self.places = nn.Linear(width, sum(self.axes))
        self.text_encoder = TextEncoder(vocab_size=vocabulary, dim=config.text_dim)
        self.transformer = OpenSoraT2V(
            num_attention_heads=config.heads, attention_head_dim=config.head_dim, num_layers=config.layers,
            in_channels=8, out_channels=8, cross_attention_dim=width,
            caption_channels=config.text_dim, sample_size=(8, 8), sample_size_t=5, patch_size=2, patch_size_t=1,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True,
            activation_fn="gelu-approximate", attention_mode="math", use_rope=True,
            interpolation_scale_t=1.0, interpolation_scale_h=1.0, interpolation_scale_w=1.0,
        )  # fmt: skip
        initialise(self.transformer)
        self.hidden: Optional[torch.Tensor] = None
        self.transformer.transformer_blocks[config.place_block].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.hidden = output

    def place_error(self) -> torch.Tensor:
        """Cross-entropy of reading frame, row and column of every token of the last forward, summed over the three."""
        hidden, self.hidden = self.hidden, None
        assert hidden is not None, "forward comes first"
        read = self.places(F.layer_norm(hidden.float(), hidden.shape[-1:])).float().flatten(0, 1)
        grids = torch.meshgrid(*(torch.arange(size) for size in self.axes), indexing="ij")
        copies = len(hidden)
        parts = zip(read.split(self.axes, dim=-1), grids)
        errors = (F.cross_entropy(part, grid.flatten().repeat(copies)) for part, grid in parts)
        return sum(errors, torch.zeros(()))

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        text = self.text_encoder(ids, attention_mask=mask)[0]
        return self.transformer(
            latents,
            timestep=timestep,
            encoder_hidden_states=text[:, None],
            encoder_attention_mask=mask[:, None],
            return_dict=False,
        )[0]


def initialise(transformer: Any) -> None:
    """Start with every branch half open, no cross-attention, and no dependence on the timestep.

    The usual tables, random and small, nearly close the branches; half open learns faster from the first step on.
    """
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    nn.init.zeros_(transformer.adaln_single.linear.weight)
    nn.init.zeros_(transformer.adaln_single.linear.bias)
    for block in transformer.transformer_blocks:
        with torch.no_grad():
            block.scale_shift_table.zero_()[[2, 5]] = 0.5  # the gates of self-attention and feed-forward
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)


def make_tokenizer() -> Any:
    from opensora.models.text_encoder import WordTokenizer

    words = sorted({word for scene in data.all_scenes() for word in scene.caption.split()})
    return WordTokenizer(words)


def tokenize(captions: Union[str, Sequence[str]]) -> Any:
    """Word ids and mask, (N, CAPTION_WORDS) each, of one caption or several."""
    return make_tokenizer()(captions, padding="max_length", max_length=data.CAPTION_WORDS, return_tensors="pt")


def alphas_cumprod() -> torch.Tensor:
    """The upstream's schedule: 1000 linear betas from 1e-4 to 0.02."""
    return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0).float()


def noise_weight(alphas: torch.Tensor, variance: float, floor: float) -> torch.Tensor:
    """Weight (1000,) of every timestep's error, mean 1: all noise levels count about the same.

    Plain noise errors are dominated by the fine detail of nearly clean latents, and leave scenes incoherent.
    1 / (share of the signal in the noisy latents' variance) is the error of the velocity (arXiv 2202.00512); the floor
    bounds it where nearly all is noise.
    """
    signal = alphas * variance / (alphas * variance + 1 - alphas)
    weight = 1 / (floor + signal)
    return weight / weight.mean()


def draw_timesteps(count: int, draw: torch.Generator) -> torch.Tensor:
    """Timesteps (count,), one from each of `count` equal parts of the schedule, for less variance."""
    parts = (torch.arange(count) + torch.rand(count, generator=draw)) / count
    return (parts.double() * 1000).long().clamp(max=999)


class Examples:
    """Noised batches of the stored latents; batch `step` is a pure function of (seed, step)."""

    def __init__(self, config: Any, latents: torch.Tensor, captions: List[str], tokenize: Callable = tokenize):
        tokens = tokenize(captions)
        self.config, self.latents, self.alphas = config, latents, alphas_cumprod()
        variance = latents.float().var().item()
        self.weights = noise_weight(self.alphas, variance, config.floor)
        self.ids, self.mask = tokens.input_ids, tokens.attention_mask
        self.empty = tokenize("")

    def batch(self, step: int) -> Tuple[torch.Tensor, ...]:
        """(noisy latents, timesteps, word ids, word mask, the noise to predict, the weight of its error)."""
        config, draw = self.config, step_generator(self.config.seed + 2, step)
        size = config.batch
        chosen = torch.randint(len(self.latents), (size,), generator=draw)
        timestep = draw_timesteps(size, draw)
        dropped = torch.rand(size, 1, generator=draw) < config.caption_dropout
        ids = torch.where(dropped, self.empty.input_ids, self.ids[chosen])
        mask = torch.where(dropped, self.empty.attention_mask, self.mask[chosen])
        clean = self.latents[chosen].float()
        noise = torch.randn(clean.shape, generator=draw)
        signal = self.alphas[timestep].view(-1, 1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        return noisy, timestep, ids, mask, noise, self.weights[timestep].view_as(signal)


def transformer_loop(config: Config, out: Path, read_only: bool = False) -> Loop:
    torch.manual_seed(config.seed + 1)
    model = Denoiser(config, len(make_tokenizer()))
    return Loop(model, out / "transformer.pt", config.steps, config.rate_at, config.decay, config.bf16, read_only)


def train_transformer(config: Config, out: Path, stop_at: int = 0) -> Denoiser:
    loop = transformer_loop(config, out)
    examples = Examples(config, *load_latents(config, out))
    blocks = loop.model.transformer.transformer_blocks if config.compiled else ()
    for number, block in enumerate(blocks):
        if number != config.place_block:  # its hook keeps a tensor
            block.compile(dynamic=False)

    def loss_at(model: Any, step: int) -> torch.Tensor:
        part = share(config.batch)
        noisy, timestep, ids, mask, noise, weight = (tensor[part] for tensor in examples.batch(step))
        loss = (weight * (model(noisy, timestep, ids, mask).float() - noise).pow(2)).mean()
        return loss + config.place_weight * model.place_error()

    if loop.step < loop.steps:
        loop.run(loss_at, config.save_every, stop_at)
    return loop.average


# --- command


def run(config: Config, out: Path, until: str = STAGES[-1]) -> None:
    """All stages up to `until`; finished ones are only loaded."""
    out.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(config, out)
    if until == "autoencoder":
        return
    encode_latents(config, out, autoencoder)
    if dist.is_initialized():
        dist.barrier()
    if until == "latents":
        return
    train_transformer(config, out)


def worker(index: int, count: int, config: Config, out: Path, until: str, meeting: str) -> None:
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=index, world_size=count)
    run(config, out, until)
    if count > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, latents and loss curves")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to see that everything works")
    args = parser.parse_args()
    config = tiny() if args.tiny else Config()
    with tempfile.TemporaryDirectory() as folder:
        settings = (args.workers, config, args.out, args.until, os.path.join(folder, "meeting"))
        torch.multiprocessing.start_processes(worker, settings, nprocs=args.workers, start_method="spawn")


if __name__ == "__main__":
    main()
