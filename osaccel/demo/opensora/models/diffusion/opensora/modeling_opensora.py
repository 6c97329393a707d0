# SPDX-License-Identifier: Apache-2.0
"""OpenSoraT2V as of Open-Sora-Plan v1.2: same configuration keys, parameter names and forward call, own code.

Built is what v1.2 checkpoints use: norm_type "ada_norm_single", 3-D RoPE, patches 1 x p x p, no downsampler; every
other value of these keys is an error. The upstream's sequence-parallel branch has no counterpart here.
"""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from .modules import AdaLayerNormSingle, BasicTransformerBlock, PatchEmbed2D, TextProjection


class Transformer2DModelOutput(BaseOutput):
    """`sample`: the prediction, (B, C, T, H, W)."""

    sample: torch.Tensor


class OpenSoraT2V(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: Optional[int] = None,
        out_channels: Optional[int] = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: Optional[int] = None,
        attention_bias: bool = False,
        sample_size: Optional[Tuple[int, int]] = None,
        sample_size_t: Optional[int] = None,
        num_vector_embeds: Optional[int] = None,
        patch_size: Optional[int] = None,
        patch_size_t: Optional[int] = None,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: Optional[int] = None,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        attention_type: str = "default",
        caption_channels: Optional[int] = None,
        interpolation_scale_h: Optional[float] = None,
        interpolation_scale_w: Optional[float] = None,
        interpolation_scale_t: Optional[float] = None,
        use_additional_conditions: Optional[bool] = None,
        attention_mode: str = "xformers",
        downsampler: Optional[str] = None,
        use_rope: bool = True,
        use_stable_fp32: bool = False,
    ):
        super().__init__()
        self._check_supported()
        config = self.config
        self.inner_dim = config.num_attention_heads * config.attention_head_dim
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.patch_size = config.patch_size
        self.pos_embed = PatchEmbed2D(config.in_channels, self.inner_dim, self.patch_size)
        self.transformer_blocks = nn.ModuleList([self._block() for _ in range(config.num_layers)])
        self.norm_out = nn.LayerNorm(self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, self.inner_dim) / self.inner_dim**0.5)
        self.proj_out = nn.Linear(self.inner_dim, self.patch_size**2 * self.out_channels)
        self.adaln_single = AdaLayerNormSingle(self.inner_dim)
        self.caption_projection = TextProjection(config.caption_channels, self.inner_dim)

    def _check_supported(self) -> None:
        wanted = {
            "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "attention_type": "default",
            "patch_size_t": 1, "use_rope": True, "downsampler": None, "only_cross_attention": False,
            "double_self_attention": False,
        }  # fmt: skip
        for key, value in wanted.items():
            if self.config[key] != value:
                raise ValueError(f"the miniature builds {key}={value!r} only, the config says {self.config[key]!r}")

    def _block(self) -> BasicTransformerBlock:
        config = self.config
        return BasicTransformerBlock(
            self.inner_dim,
            config.num_attention_heads,
            config.attention_head_dim,
            config.cross_attention_dim,
            config.attention_bias,
            config.norm_elementwise_affine,
            config.norm_eps,
            config.dropout,
            self._rope_scale_thw(),
        )

    def _rope_scale_thw(self) -> Tuple[float, float, float]:
        config = self.config
        size = config.sample_size if isinstance(config.sample_size, (tuple, list)) else (config.sample_size,) * 2
        frames = config.sample_size_t
        defaults = ((frames - 1) // 16 + 1 if frames % 2 == 1 else frames / 16, size[0] / 30, size[1] / 40)
        given = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
        return tuple(default if value is None else value for value, default in zip(given, defaults))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: Optional[torch.Tensor] = None,
        encoder_hidden_states: Optional[torch.Tensor] = None,
        added_cond_kwargs: Optional[Dict[str, torch.Tensor]] = None,
        class_labels: Optional[torch.Tensor] = None,
        cross_attention_kwargs: Optional[Dict[str, Any]] = None,
        attention_mask: Optional[torch.Tensor] = None,
        encoder_attention_mask: Optional[torch.Tensor] = None,
        use_image_num: Optional[int] = 0,
        return_dict: bool = True,
    ):
        """Predict the noise in latents (B, C, T + use_image_num, H, W).

        `encoder_hidden_states` is (B, 1 + use_image_num, L, caption_channels) with a mask (B, 1 + use_image_num, L);
        `attention_mask` is (B, T + use_image_num, H, W), 1 where a latent counts.
        """
        frames = hidden_states.shape[2] - use_image_num
        height, width = (size // self.patch_size for size in hidden_states.shape[-2:])
        modulation, embedded = self.adaln_single(timestep, self.dtype)
        tokens = self.pos_embed(hidden_states.to(self.dtype))
        text = self.caption_projection(encoder_hidden_states)
        masks = self._latent_bias(attention_mask), self._text_bias(encoder_attention_mask)
        shape = {"height": height, "width": width}
        video, images = self._streams(tokens, text, masks, modulation, frames, use_image_num, shape)
        for block in self.transformer_blocks:
            if video:
                video["hidden_states"] = block(video.pop("hidden_states"), **video)
            if images:
                images["hidden_states"] = block(images.pop("hidden_states"), **images)
        outputs = []
        if video:
            outputs.append(self._output(video["hidden_states"], embedded, frames, height, width))
        if images:
            embedded = embedded.repeat_interleave(use_image_num, dim=0)
            picture = self._output(images["hidden_states"], embedded, 1, height, width)
            outputs.append(picture.unflatten(0, (-1, use_image_num)).squeeze(3).transpose(1, 2))
        output = torch.cat(outputs, dim=2)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _streams(self, tokens, text, masks, modulation, frames, images, shape):
        """Block arguments of the video and of the images trained beside it; an empty stream is None."""
        latent_bias, text_bias = masks
        common = {"cross_attention_kwargs": None, "class_labels": None, **shape}
        video = picture = None
        if frames:
            video = {
                "hidden_states": tokens[:, :frames].flatten(1, 2),
                "attention_mask": _visible(latent_bias, slice(0, frames)),
                "encoder_hidden_states": text[:, 0],
                "encoder_attention_mask": None if text_bias is None else text_bias[:, :1],
                "timestep": modulation,
                "frame": frames,
                **common,
            }
        if images:
            bias = None if latent_bias is None else latent_bias[:, frames:].flatten(0, 1).unsqueeze(1)
            picture = {
                "hidden_states": tokens[:, frames:].flatten(0, 1),
                "attention_mask": bias if bias is not None and bias.any() else None,
                "encoder_hidden_states": text[:, -images:].flatten(0, 1),
                "encoder_attention_mask": None
                if text_bias is None
                else text_bias[:, -images:].flatten(0, 1).unsqueeze(1),
                "timestep": modulation.repeat_interleave(images, dim=0),
                "frame": 1,
                **common,
            }
        return video, picture

    def _latent_bias(self, mask):
        """0 where any latent of a patch counts, -10000 elsewhere: (B, frames, patches)."""
        if mask is None or mask.ndim != 4:
            return None
        pooled = F.max_pool2d(mask.to(self.dtype), self.patch_size, self.patch_size)
        return ((1 - pooled.bool().to(self.dtype)) * -10000.0).flatten(2)

    def _text_bias(self, mask):
        if mask is None or mask.ndim != 3:
            return None
        return (1 - mask.to(self.dtype)) * -10000.0

    def _output(self, hidden_states, embedded, frames, height, width):
        """Tokens (B, frames * height * width, D) back to latents (B, C, frames, H, W)."""
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        patches = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        size = self.patch_size
        patches = patches.reshape(-1, frames, height, width, size, size, self.out_channels)
        latents = patches.permute(0, 6, 1, 2, 4, 3, 5)
        return latents.reshape(-1, self.out_channels, frames, height * size, width * size)


def _visible(bias, frames):
    """The bias of some frames as (B, 1, tokens), or None when nothing is hidden: attention is faster without."""
    if bias is None:
        return None
    chosen = bias[:, frames].flatten(1).unsqueeze(1)
    return chosen if chosen.any() else None
