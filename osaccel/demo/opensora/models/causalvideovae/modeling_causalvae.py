# SPDX-License-Identifier: Apache-2.0
"""A causal video autoencoder, 4x in time and 4x4 in space: latent t depends on no frame after pixel frame 4t.

The scale of the latents (mean 0, one deviation for every channel) is part of `encode` and `decode`, because the
upstream's pipeline knows no scaling factor. The deviation is 3 and not 1: a small picture is drowned by less noise than
a large one, so this places the decisions of a 32 x 32 video where the upstream's noise schedule spends its steps.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


def space_to_depth(x, t, s):
    """(B, C, T*t, H*s, W*s) -> (B, C*t*s*s, T, H, W)."""
    b, c, frames, height, width = x.shape
    x = x.reshape(b, c, frames // t, t, height // s, s, width // s, s)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * t * s * s, frames // t, height // s, width // s)


def depth_to_space(x, t, s):
    """The inverse of `space_to_depth`."""
    b, c, frames, height, width = x.shape
    x = x.reshape(b, c // (t * s * s), t, s, s, frames, height, width)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // (t * s * s), frames * t, height * s, width * s)


class ResidualBlock(nn.Module):
    """A spatial convolution, then a causal one in time."""

    def __init__(self, channels):
        super().__init__()
        self.space = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(channels, channels, (3, 1, 1))

    def forward(self, x):
        h = F.pad(self.space(F.silu(x)), (0, 0, 0, 0, 2, 0))
        return x + self.time(F.silu(h))


def _spatial(inputs, outputs):
    return nn.Conv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1))


class CausalVAEModel(ModelMixin, ConfigMixin):
    """Videos (B, 3, 1 + 4n, H, W) in [-1, 1] to and from latents (B, latent_channels, 1 + n, H / 4, W / 4)."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        outer_channels: int = 48,
        inner_channels: int = 96,
        latent_deviation: float = 3.0,
    ):
        super().__init__()
        outer, inner = outer_channels, inner_channels
        self.encoder_in = nn.Conv3d(3 * 16, outer, 1)
        self.encoder_outer = ResidualBlock(outer)
        self.encoder_inner = nn.Sequential(nn.Conv3d(outer * 4, inner, 1), ResidualBlock(inner), ResidualBlock(inner))
        self.encoder_out = nn.Conv3d(inner, latent_channels, 1)
        self.scale = nn.BatchNorm3d(latent_channels, affine=False, momentum=0.02)
        self.decoder_in = _spatial(latent_channels, inner)
        self.decoder_inner = nn.Sequential(ResidualBlock(inner), ResidualBlock(inner), nn.Conv3d(inner, outer * 4, 1))
        self.decoder_outer = nn.Sequential(ResidualBlock(outer), ResidualBlock(outer))
        self.decoder_out = _spatial(outer, 3 * 16)

    def encode(self, video):
        # Three copies of the first frame make it a group of its own, so a single image has a latent too.
        x = torch.cat([video[:, :, :1]] * 3 + [video], dim=2)
        x = self.encoder_outer(self.encoder_in(space_to_depth(x, 4, 2)))
        latents = self.scale(self.encoder_out(self.encoder_inner(space_to_depth(x, 1, 2))))
        return latents * self.config.latent_deviation

    def decode(self, latents):
        x = self.decoder_in(latents / self.config.latent_deviation)
        x = depth_to_space(self.decoder_inner(x), 1, 2)
        return depth_to_space(self.decoder_out(self.decoder_outer(x)), 4, 2)[:, :, 3:]

    def forward(self, video):
        return self.decode(self.encode(video))


class CausalVAEModelWrapper(nn.Module):
    """What the pipeline holds: `vae` is the model, `vae_scale_factor` the strides, decoded frames come first."""

    def __init__(self, model_path, subfolder=None, cache_dir=None):
        super().__init__()
        self.vae = CausalVAEModel.from_pretrained(model_path, subfolder=subfolder, cache_dir=cache_dir).eval()
        self.vae_scale_factor = [4, 4, 4]

    @property
    def device(self):
        return self.vae.device

    @property
    def dtype(self):
        return self.vae.dtype

    @torch.no_grad()
    def encode(self, video):
        """(B, 3, T, H, W) in [-1, 1] -> latents."""
        return self.vae.encode(video)

    @torch.no_grad()
    def decode(self, latents):
        """Latents -> (B, T, 3, H, W) in about [-1, 1]."""
        return self.vae.decode(latents).transpose(1, 2)
