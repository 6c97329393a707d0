# SPDX-License-Identifier: Apache-2.0
"""OpenSoraPipeline: text to video by guided denoising, with the upstream's call signature and loop, own code."""

import inspect
import math
from typing import Callable, List, Optional, Union

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


class VideoPipelineOutput(BaseOutput):
    """`images`: uint8 videos (B, T, H, W, 3) on the CPU, or latents (B, C, T, H, W)."""

    images: torch.Tensor


def retrieve_timesteps(scheduler, num_inference_steps=None, device=None, timesteps=None, **kwargs):
    """Set the scheduler's timesteps, evenly spaced or the given ones; returns them and the number of steps."""
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps, device=device, **kwargs)
        return scheduler.timesteps, num_inference_steps
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{type(scheduler).__name__}.set_timesteps takes no list of timesteps")
    scheduler.set_timesteps(timesteps=timesteps, device=device, **kwargs)
    return scheduler.timesteps, len(scheduler.timesteps)


class OpenSoraPipeline(DiffusionPipeline):
    def __init__(self, tokenizer, text_encoder, vae, transformer, scheduler):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    def encode_prompt(self, texts: List[str], copies: int, max_length: int, device):
        """Embeddings (B * copies, L, D) and word masks (B * copies, L)."""
        words = self.tokenizer(
            [text.lower().strip() for text in texts],
            padding="max_length",
            max_length=max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        mask = words.attention_mask.to(device)
        embeds = self.text_encoder(words.input_ids.to(device), attention_mask=mask)[0]
        return embeds.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)

    def check_inputs(self, prompt, num_frames, height, width, callback_steps, prompt_embeds, prompt_attention_mask):
        if num_frames <= 0:
            raise ValueError(f"`num_frames` has to be positive but is {num_frames}.")
        if height % 8 != 0 or width % 8 != 0:
            raise ValueError(f"`height` and `width` have to be divisible by 8 but are {height} and {width}.")
        if not isinstance(callback_steps, int) or callback_steps <= 0:
            raise ValueError(f"`callback_steps` has to be a positive integer but is {callback_steps!r}.")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Give either `prompt` or `prompt_embeds`.")
        if prompt_embeds is not None and prompt_attention_mask is None:
            raise ValueError("`prompt_embeds` needs `prompt_attention_mask`.")

    def prepare_extra_step_kwargs(self, generator, eta):
        """Schedulers differ in what their `step` takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def prepare_latents(self, batch, num_frames, height, width, dtype, device, generator, latents):
        stride_t, stride_h, stride_w = self.vae.vae_scale_factor
        odd = int(num_frames) % 2  # a causal autoencoder gives the first frame a latent of its own
        frames = math.ceil((int(num_frames) - odd) / stride_t) + odd
        shape = (batch, self.transformer.config.in_channels, frames, height // stride_h, width // stride_w)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators were given for a batch of {batch}.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        prompt: Union[str, List[str], None] = None,
        negative_prompt: str = "",
        num_inference_steps: int = 20,
        timesteps: Optional[List[int]] = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: Optional[int] = 1,
        num_frames: Optional[int] = None,
        height: Optional[int] = None,
        width: Optional[int] = None,
        eta: float = 0.0,
        generator: Union[torch.Generator, List[torch.Generator], None] = None,
        latents: Optional[torch.Tensor] = None,
        prompt_embeds: Optional[torch.Tensor] = None,
        prompt_attention_mask: Optional[torch.Tensor] = None,
        negative_prompt_embeds: Optional[torch.Tensor] = None,
        negative_prompt_attention_mask: Optional[torch.Tensor] = None,
        output_type: Optional[str] = "pil",
        return_dict: bool = True,
        callback: Optional[Callable[[int, int, torch.Tensor], None]] = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 300,
        **kwargs,
    ):
        """Sample one video per prompt and copy; `output_type="latent"` returns latents, anything else frames."""
        config, strides = self.transformer.config, self.vae.vae_scale_factor
        num_frames = num_frames or (config.sample_size_t - 1) * strides[0] + 1
        height = height or config.sample_size[0] * strides[1]
        width = width or config.sample_size[1] * strides[2]
        self.check_inputs(prompt, num_frames, height, width, callback_steps, prompt_embeds, prompt_attention_mask)
        device, guided = self._execution_device, guidance_scale > 1.0

        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            prompt_embeds, prompt_attention_mask = self.encode_prompt(
                prompts, num_images_per_prompt, max_sequence_length, device
            )
        if guided and negative_prompt_embeds is None:
            negative_prompt_embeds, negative_prompt_attention_mask = self.encode_prompt(
                [negative_prompt] * len(prompt_embeds), 1, prompt_embeds.shape[1], device
            )
        batch = len(prompt_embeds)
        if guided:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            prompt_attention_mask = torch.cat([negative_prompt_attention_mask, prompt_attention_mask])

        timesteps, num_inference_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps)
        latents = self.prepare_latents(
            batch, num_frames, height, width, prompt_embeds.dtype, device, generator, latents
        )
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        num_warmup_steps = max(len(timesteps) - num_inference_steps * self.scheduler.order, 0)

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                noise = self._predict_noise(latents, t, prompt_embeds, prompt_attention_mask, guidance_scale)
                latents = self.scheduler.step(noise, t, latents, **extra_step_kwargs, return_dict=False)[0]
                counted = (i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                if i == len(timesteps) - 1 or counted:
                    progress_bar.update()
                    if callback is not None and i % callback_steps == 0:
                        callback(i // self.scheduler.order, t, latents)

        if output_type == "latent":
            images = latents
        else:
            images = self.decode_latents(latents)[:, :num_frames, :height, :width]
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(images=images) if return_dict else (images,)

    def _predict_noise(self, latents, t, prompt_embeds, prompt_attention_mask, guidance_scale):
        guided = guidance_scale > 1.0
        doubled = torch.cat([latents] * 2) if guided else latents
        doubled = self.scheduler.scale_model_input(doubled, t)
        noise = self.transformer(
            doubled,
            attention_mask=torch.ones_like(doubled)[:, 0],
            encoder_hidden_states=prompt_embeds.unsqueeze(1),
            encoder_attention_mask=prompt_attention_mask.unsqueeze(1),
            timestep=torch.as_tensor(t, device=doubled.device).expand(len(doubled)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        if guided:
            without, with_text = noise.chunk(2)
            noise = without + guidance_scale * (with_text - without)
        if self.transformer.config.out_channels // 2 == latents.shape[1]:  # learned variance is not used
            noise = noise.chunk(2, dim=1)[0]
        return noise

    def decode_latents(self, latents):
        """Latents to uint8 frames (B, T, H, W, 3) on the CPU."""
        video = self.vae.decode(latents.to(self.vae.vae.dtype))
        video = (video / 2.0 + 0.5).clamp(0, 1) * 255
        return video.to(torch.uint8).cpu().permute(0, 1, 3, 4, 2).contiguous()
