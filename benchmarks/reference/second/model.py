# SPDX-License-Identifier: Apache-2.0
"""The second model's networks: a linear autoencoder, and OpenSoraT2V with an additive position embedding.

The transformer is the upstream's layout with `use_rope` off: fixed sines and cosines of row, column and frame are added
to the tokens once, as v1.2's PatchEmbed does then, and no attention is turned.
"""

import functools
from typing import Tuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from benchmarks.reference.paths import DEMO  # noqa: F401  (makes the pipeline importable as `opensora`)
from opensora.models.diffusion.opensora.modeling_opensora import OpenSoraT2V

STRIDES = (4, 4, 4)  # pixels of a latent along frames, rows and columns


def waves(places: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines and cosines (N, dim) of places (N,), from one turn in 6 places to one in 600: there are few places."""
    frequency = 100.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = places.float()[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@functools.lru_cache(maxsize=4)
def place_table(frames: int, rows: int, columns: int, dim: int) -> torch.Tensor:
    """Where every token is, (frames, rows * columns, dim): half the width tells the column, half the row, and on top
    of both the frame."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    place = torch.cat([waves(x, dim // 2), waves(y, dim // 2)], dim=1)
    return waves(torch.arange(frames), dim)[:, None] + place


class PlacedOpenSoraT2V(OpenSoraT2V):
    """OpenSoraT2V with the position in the tokens instead of in the attention."""

    def _check_supported(self) -> None:
        if self.config.use_rope:
            raise ValueError("this model adds its positions: use_rope must be False")

    def _rope_scale_thw(self) -> None:
        return None

    def _streams(self, tokens, text, masks, modulation, frames, images, shape):
        """As the base's, of tokens (B, T, H * W, D) that carry their places."""
        table = place_table(tokens.shape[1], shape["height"], shape["width"], tokens.shape[-1])
        return super()._streams(tokens + table.to(tokens), text, masks, modulation, frames, images, shape)


class LinearAutoencoder(ModelMixin, ConfigMixin):
    """Blocks of 4 x 4 x 4 pixels to and from their first principal components, scaled to unit deviation over all.

    The components' variances are brought half-way (by a square root) towards each other: as in a trained autoencoder's
    latents no channel is negligible, yet what fills the picture stands out of the noise first.

    Videos (B, 3, T, H, W) in [-1, 1], latents (B, channels, T / 4, H / 4, W / 4).
    """

    @register_to_config
    def __init__(self, channels: int = 10):
        super().__init__()
        t, h, w = STRIDES
        self.register_buffer("mean", torch.zeros(3 * t * h * w))
        self.register_buffer("basis", torch.zeros(channels, 3 * t * h * w))
        self.register_buffer("divisor", torch.ones(channels))

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        latents = (blocks(video) - self.mean) @ self.basis.t() / self.divisor
        return latents.movedim(-1, 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return unblocks((latents.movedim(1, -1) * self.divisor) @ self.basis + self.mean)

    @torch.no_grad()
    def fit(self, videos: torch.Tensor) -> None:
        """Take mean, components and deviations from the blocks of `videos`; a component's largest entry is positive."""
        rows = blocks(videos).flatten(0, -2).double()
        centred = rows - rows.mean(0)
        values, vectors = torch.linalg.eigh(centred.t() @ centred / len(rows))
        kept = vectors.flip(1).t()[: len(self.divisor)]
        largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
        self.mean.copy_(rows.mean(0))
        self.basis.copy_(kept * largest.sign())
        deviations = values.flip(0)[: len(self.divisor)].sqrt()
        self.divisor.copy_((deviations * deviations.mean()).sqrt())


def blocks(video: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) -> (B, T / 4, H / 4, W / 4, 192)."""
    batch, channels, *size = video.shape
    (t, h, w), (frames, rows, columns) = STRIDES, (length // stride for length, stride in zip(size, STRIDES))
    parts = video.reshape(batch, channels, frames, t, rows, h, columns, w)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def unblocks(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `blocks`."""
    batch, frames, height, width, _ = rows.shape
    parts = rows.unflatten(-1, (3, *STRIDES)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return parts.reshape(batch, 3, frames * STRIDES[0], height * STRIDES[1], width * STRIDES[2])


class AutoencoderWrapper(nn.Module):
    """What the pipeline holds: `vae` is the model, `vae_scale_factor` the strides, decoded frames come first."""

    def __init__(self, vae: LinearAutoencoder):
        super().__init__()
        self.vae, self.vae_scale_factor = vae.eval(), list(STRIDES)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> latents."""
        return self.vae.encode(video)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents -> (B, T, 3, H, W) in about [-1, 1]."""
        return self.vae.decode(latents).transpose(1, 2)


def make_transformer(layers: int, heads: int, head_dim: int, text_dim: int, channels: int, size: Tuple[int, int, int]):
    """A transformer for latents of `size` (frames, rows, columns), with patches of 1 x 2 x 2."""
    return PlacedOpenSoraT2V(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, in_channels=channels,
        out_channels=channels, cross_attention_dim=heads * head_dim, caption_channels=text_dim, sample_size=size[1:],
        sample_size_t=size[0], patch_size=2, patch_size_t=1, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True, activation_fn="gelu-approximate",
        attention_mode="math", use_rope=False,
    )  # fmt: skip
