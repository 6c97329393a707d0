# SPDX-License-Identifier: Apache-2.0
"""Sample videos for a list of prompts: `python -m opensora.sample.sample_t2v`, with the upstream script's options."""

import argparse
import os
import time

import diffusers
import imageio
import numpy as np
import torch

from opensora.models.causalvideovae import CausalVAEModelWrapper, ae_stride_config
from opensora.models.diffusion.opensora.modeling_opensora import OpenSoraT2V
from opensora.models.text_encoder import TextEncoder, WordTokenizer
from opensora.sample.pipeline_opensora import OpenSoraPipeline

SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "EulerDiscrete": ("EulerDiscreteScheduler", {}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "DPMSolverMultistep": ("DPMSolverMultistepScheduler", {}),
    "DPMSolverSinglestep": ("DPMSolverSinglestepScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "HeunDiscrete": ("HeunDiscreteScheduler", {}),
    "EulerAncestralDiscrete": ("EulerAncestralDiscreteScheduler", {}),
    "DEISMultistep": ("DEISMultistepScheduler", {}),
    "KDPM2AncestralDiscrete": ("KDPM2AncestralDiscreteScheduler", {}),
}


def make_scheduler(sample_method):
    """The scheduler of one sample method, with the library's own defaults as in the upstream."""
    name, options = SCHEDULERS[sample_method]
    return getattr(diffusers, name)(**options)


def load_pipeline(args):
    device = torch.device(args.device)
    vae = CausalVAEModelWrapper(args.ae_path, cache_dir=args.cache_dir).to(device)
    vae.vae_scale_factor = ae_stride_config[args.ae]
    transformer = OpenSoraT2V.from_pretrained(args.model_path, cache_dir=args.cache_dir).eval()
    text_encoder = TextEncoder.from_pretrained(args.text_encoder_name, cache_dir=args.cache_dir).eval()
    tokenizer = WordTokenizer.from_pretrained(args.text_encoder_name)
    pipeline = OpenSoraPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(args.sample_method),
        transformer=transformer,
    )
    return pipeline.to(device)


def read_prompts(text_prompt):
    if len(text_prompt) == 1 and text_prompt[0].endswith("txt"):
        with open(text_prompt[0]) as file:
            return [line.strip() for line in file if line.strip()]
    return text_prompt


def main(args):
    if args.seed is not None:
        torch.manual_seed(args.seed)
    pipeline = load_pipeline(args)
    os.makedirs(args.save_img_path, exist_ok=True)
    for index, prompt in enumerate(read_prompts(args.text_prompt)):
        started, processor = time.perf_counter(), time.process_time()
        videos = pipeline(
            prompt,
            negative_prompt="",
            num_frames=args.num_frames,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_sampling_steps,
            guidance_scale=args.guidance_scale,
            num_images_per_prompt=1,
            max_sequence_length=args.max_sequence_length,
        ).images
        took = time.perf_counter() - started, time.process_time() - processor
        print(f"video {index}: {took[0]:.3f} s, {took[1]:.3f} s CPU")
        stem = os.path.join(args.save_img_path, str(index))
        save(videos[0].numpy(), stem, args.fps)
        if args.save_frames:
            np.save(stem + ".npy", videos[0].numpy())
    print(f"save path {args.save_img_path}")


def save(frames, stem, fps):
    """A picture for one frame, else an mp4; small frames are enlarged so that players show them."""
    factor = max(1, 256 // frames.shape[2])
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    if len(frames) == 1:
        imageio.imwrite(stem + ".png", frames[0])
    else:
        imageio.mimwrite(stem + ".mp4", frames, fps=fps, quality=8)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--ae", default="CausalVAEModel_D8_4x4x4", choices=sorted(ae_stride_config))
    parser.add_argument("--ae_path", required=True)
    parser.add_argument("--text_encoder_name", required=True)
    parser.add_argument("--text_prompt", nargs="+", required=True)
    parser.add_argument("--save_img_path", default="./sample_videos/t2v")
    parser.add_argument("--cache_dir", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--num_sampling_steps", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--sample_method", default="EulerAncestralDiscrete", choices=list(SCHEDULERS))
    parser.add_argument("--max_sequence_length", type=int, default=16)
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--model_type", default="dit", choices=["dit"])
    parser.add_argument("--save_frames", action="store_true", help="also save the frames before encoding, as .npy")
    parser.add_argument("--seed", type=int, default=os.environ.get("UPSTREAM_SEED"), help="default: not seeded")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
