# SPDX-License-Identifier: Apache-2.0
"""Run by test_plan_upstream.py in the upstream's environment: a plan against the same generation worked out by hand.

    python plan_by_hand.py TINY DTYPE FRAMES PLAN_JSON        (also under torchrun: then in sequence parallel)

Prints one JSON line: relative distances of the final latents. What is worked out by hand knows nothing of osaccel:
every branch of guidance runs through the transformer alone, blocks and `scheduler.step` get a few lines each.
"""

import json
import math
import os
import sys

import numpy
import torch
from diffusers.schedulers import EulerAncestralDiscreteScheduler
from transformers import MT5EncoderModel, T5Tokenizer

from opensora.models.causalvideovae import CausalVAEModelWrapper, ae_stride_config
from opensora.models.diffusion.opensora.modeling_opensora import OpenSoraT2V

STEPS, GUIDANCE = 8, 4.0
DEVICE = os.environ.get("UPSTREAM_DEVICE", "cpu")
# The two halves of guidance are compared one by one: a convolution must not round by the size of its batch.
torch.backends.cudnn.allow_tf32 = False
BATCH_FIRST = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep")


def in_sequence_parallel():
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def pipeline_of(tiny, dtype):
    if in_sequence_parallel():
        import torch.distributed as dist

        from opensora.sample.pipeline_opensora_sp import OpenSoraPipeline
        from opensora.utils.parallel_states import initialize_sequence_parallel_state

        if DEVICE != "cpu":
            torch.cuda.set_device(int(os.environ["RANK"]))
        dist.init_process_group(backend="gloo" if DEVICE == "cpu" else "nccl", init_method="env://")
        initialize_sequence_parallel_state(dist.get_world_size())
    else:
        from opensora.sample.pipeline_opensora import OpenSoraPipeline
    vae = CausalVAEModelWrapper(os.path.join(tiny, "vae"))
    vae.vae, vae.vae_scale_factor = vae.vae.to(DEVICE, dtype), ae_stride_config["CausalVAEModel_D4_4x8x8"]
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": False, "device_map": None}
    pipeline = OpenSoraPipeline(
        vae=vae.eval(),
        text_encoder=MT5EncoderModel.from_pretrained(os.path.join(tiny, "mt5"), torch_dtype=dtype).eval(),
        tokenizer=T5Tokenizer.from_pretrained(os.path.join(tiny, "mt5")),
        scheduler=EulerAncestralDiscreteScheduler(),
        transformer=OpenSoraT2V.from_pretrained(os.path.join(tiny, "model"), **options).eval(),
    ).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(pipeline, frames, guidance=GUIDANCE):
    torch.manual_seed(11 + int(os.environ.get("RANK", "0")))
    return pipeline(
        "a dog running on the beach", num_inference_steps=STEPS, guidance_scale=guidance, num_frames=frames, height=64,
        width=64, output_type="latent", max_sequence_length=32,
    ).images.float()  # fmt: skip


class ByHand:
    """Patches a pipeline so that it does what a plan's mapping says; `calls`: block calls x share of the batch."""

    def __init__(self, pipeline, plan):
        self.pipeline, self.plan = pipeline, plan
        self.step, self.branch, self.calls = 0, "", 0.0
        self.forward, self.scheduler_step = pipeline.transformer.forward, pipeline.scheduler.step
        self.stored, self.differences, self.denoised = {}, [], None
        self.drift, self.group, self.mean, self.known, self.slope = 0.0, [], None, None, None
        self.full, self.taken = [], {}
        pipeline.transformer.forward = self.network

        def step(model_output, timestep, sample, generator=None, return_dict=True):
            return self.sampled(model_output, timestep, sample, generator=generator, return_dict=return_dict)

        pipeline.scheduler.step = step
        for index, block in enumerate(pipeline.transformer.transformer_blocks):
            block.forward = self.block(index, block.forward)

    def block(self, index, original):
        region = next((r for r in self.plan.get("regions", []) if r["start"] <= index < r["stop"]), None)

        def forward(hidden, **others):
            if region and self.step in region["reuse"]:
                return hidden + self.delta(region) if index == region["start"] else hidden
            if region and index == region["start"]:
                self.entered = hidden
            output = original(hidden, **others)
            self.calls += 0.5
            if region and index == region["stop"] - 1:
                self.stored.setdefault((region["start"], self.branch), []).append((self.step, output - self.entered))
            return output

        return forward

    def delta(self, region):
        stored = self.stored[region["start"], self.branch]
        newest, delta = stored[-1]
        if not region.get("order") or len(stored) < 2:
            return delta
        before, older = stored[-2]
        return delta + (self.step - newest) / (newest - before) * (delta - older)

    def network(self, hidden_states, **others):
        if self.step in self.plan.get("skip", []):
            return (torch.zeros_like(hidden_states),)
        shown, at_mean = hidden_states, self.group and self.pipeline.scheduler.sigmas[self.step + 1] > 0
        if at_mean:
            shown, time = self.shown_mean(hidden_states)
            others["timestep"] = torch.full_like(others["timestep"], time, dtype=torch.float32)
        conditional = self.half(1, shown, others)
        if self.step in self.plan.get("conditional_only", []):
            unconditional = (conditional.float() - self.ahead()).to(conditional.dtype)
        else:
            unconditional = self.half(0, shown, others)
            self.differences.append((self.step, conditional.float() - unconditional.float()))
        halves = [unconditional, conditional]
        if at_mean:
            halves = [self.said_here(half, hidden_states.shape[1]) for half in halves]
        self.conditional = halves[1].float()
        return (torch.cat(halves),)

    def shown_mean(self, hidden_states):
        """What the network gets for this step and the skipped ones before it, and the time it is told."""
        sigmas = self.pipeline.scheduler.sigmas.double().tolist()
        s, t = sigmas[self.step : self.step + 2]
        x = hidden_states.chunk(2)[1].float() * math.sqrt(1 + s**2)
        points = [*self.group, (t**-2 - s**-2, s**-2, x, None, x / s**2 - self.drift)]
        total = sum(mass for mass, *_ in points)
        lam = sum(mass * place for mass, place, *_ in points) / total
        variance = sum(m * n * min(a, b) for m, a, *_ in points for n, b, *_ in points) / total**2
        at = sum(mass * place * there for mass, place, there, *_ in points) / total / lam
        at = self.denoised + (at - self.denoised) * math.sqrt(lam / variance)
        self.mean = at, lam**-0.5, sum(mass * noise for mass, _, _, _, noise in points) / total, x
        abar = self.pipeline.scheduler.alphas_cumprod.double()
        time = float(numpy.interp(lam**-0.5, (((1 - abar) / abar) ** 0.5).numpy(), numpy.arange(1000)))
        return torch.cat([(at / math.sqrt(1 + 1 / lam)).to(hidden_states.dtype)] * 2), time

    def said_here(self, output, channels):
        """An answer at the mean as if it had been given at the sample."""
        at, level, _, x = self.mean
        denoised = at - level * output[:, :channels].float()
        told = (x - denoised) / self.pipeline.scheduler.sigmas[self.step].item()
        return torch.cat([told.to(output.dtype), output[:, channels:]], 1)

    def half(self, number, hidden_states, others):
        self.branch = "unconditional conditional".split()[number]
        mine = {name: value.chunk(2)[number] if name in BATCH_FIRST else value for name, value in others.items()}
        return self.forward(hidden_states.chunk(2)[number], **mine)[0]

    def ahead(self):
        """On by its last move as far as that agrees with the one before it; one video."""
        if len(self.differences) < 3:
            return self.differences[-1][1]
        (first, oldest), (before, older), (newest, difference) = self.differences[-3:]
        earlier, move = (older - oldest) / (before - first), (difference - older) / (newest - before)
        slope = min(1.0, max(0.0, float((earlier * move).sum() / (earlier * earlier).sum())))
        return difference + (self.step - newest) * slope * move

    def put_right(self, output, x):
        """What x lacks at a full step as guidance added something else at the conditional-only steps before it."""
        sigmas, e = self.pipeline.scheduler.sigmas.double().tolist(), self.step
        level = sigmas[e] if self.mean is None else self.mean[1]
        # As the network gave it where it was asked.
        added = sigmas[e] / level * (output - self.conditional[:, : output.shape[1]])
        denoised = x - sigmas[e] * output
        if e in self.plan.get("conditional_only", []):
            self.taken[e] = added, level
            return 0.0
        taken, self.taken = self.taken, {}
        self.full.append((e, added, denoised))
        if not taken:
            return 0.0
        (p, first, last), called = self.full[-2], [k for k in range(e + 1) if k not in self.plan.get("skip", [])]
        lost = dict.fromkeys(called, 0.0)
        for k, (forecast, level) in taken.items():
            share = math.log(sigmas[p] / sigmas[k]) / math.log(sigmas[p] / sigmas[e])
            lost[k] = -level * ((1 - share) * first + share * added - forecast)
        total, strength = 0.0, self.plan.get("correction", {}).get("corrector", 0.0)
        for k in range(p, e):
            i, j = max(step for step in called if step <= k), min(step for step in called if step > k)
            moved = strength * float(k > i)
            if sigmas[j + 1] == 0:
                moved = strength * math.log(sigmas[i] / sigmas[k]) / math.log(sigmas[i] / sigmas[j])
            total = total + (sigmas[k + 1] ** -2 - sigmas[k] ** -2) * ((1 - moved) * lost[i] + moved * lost[j])
        r = 0.0
        if len(self.full) > 2:
            change, before = denoised - last, last - self.full[-3][2]
            r = float((change * before).sum() / (change.norm() * before.norm()))
        return min(1.0, max(0.0, 2 + 4 * r)) * sigmas[e] ** 2 * total

    def sampled(self, model_output, timestep, sample, **others):
        sigma = self.pipeline.scheduler.sigmas[self.step].item()
        if self.step not in self.plan.get("skip", []):
            denoised = sample.float() - sigma * model_output.float()
            moved = (sample.float() + self.put_right(model_output.float(), sample.float())).to(sample.dtype)
            model_output = ((moved.float() - denoised) / sigma).to(model_output.dtype)
            sample = moved
        if "correction" in self.plan:
            output, x = self.corrected(model_output.float(), sample.float())
            model_output, sample = output.to(model_output.dtype), x.to(sample.dtype)
        elif self.step in self.plan.get("skip", []):
            model_output = ((sample.float() - self.denoised) / sigma).to(model_output.dtype)
        else:
            self.denoised = sample.float() - sigma * model_output.float()
        self.step += 1
        return self.scheduler_step(model_output, timestep, sample, **others)

    def corrected(self, output, x):
        """Corrector and response at full strength: the model output and the sample that the scheduler gets."""
        sigmas, step = self.pipeline.scheduler.sigmas.double().tolist(), self.step
        s, t = sigmas[step : step + 2]
        noise, assumed = x / s**2 - self.drift, self.denoised
        if step in self.plan.get("skip", []):
            assumed = assumed + self.answer(s, noise)
            self.group.append((t**-2 - s**-2, s**-2, x, assumed, noise))
        else:
            assumed = denoised = x - s * output
            change = None if self.known is None else denoised - self.denoised
            if self.group:
                lost = self.lost(s, noise, denoised, change)
                x, self.drift = x + s**2 * lost, self.drift + lost
            level, then = (s, noise) if self.mean is None else self.mean[1:3]
            if self.known is not None:
                start, before, _ = self.known
                added, kept = level**2 * (then - before), (level / start) ** 2
                made = (near(change * added) / near(added**2)).clamp(0, 1)
                made = kept * made / (1 - (1 - kept) * made)
                self.slope = made / (made + (1 - made) * kept)
            self.known, self.denoised, self.group, self.mean = (level, then, change), denoised, [], None
        if t > 0:
            self.drift = self.drift + assumed * (t**-2 - s**-2)
        return (x - assumed) / s, x

    def answer(self, s, noise):
        """What the noise since D was known has done to it."""
        if self.slope is None:
            return 0.0
        level, then, _ = self.known
        kept = (s / level) ** 2
        return self.slope / (kept + (1 - kept) * self.slope) * s**2 * (noise - then)

    def lost(self, s, noise, denoised, change):
        """What x / s^2 lacks after skipped steps."""
        level, _, before = self.known
        r = 0.0 if before is None else float((change * before).sum() / (change.norm() * before.norm()))
        if self.mean is not None:
            return min(1.0, max(0.0, 2 + 2 * r)) * sum(mass * (denoised - told) for mass, _, _, told, _ in self.group)
        unforeseen = change - self.answer(s, noise)
        shares = [math.log(level * place**0.5) / math.log(level / s) for _, place, *_ in self.group]
        moved = sum(mass * share for (mass, *_), share in zip(self.group, shares))
        return min(1.0, max(0.0, 2 + 4 * r)) * moved * unforeseen


def near(values):
    """Sums over channels and 3 x 3 places of a frame."""
    frames = values.sum(1).flatten(0, -3).unsqueeze(1)
    summed = torch.nn.functional.conv2d(frames, torch.ones(1, 1, 3, 3), padding=1)
    return summed.reshape(values.sum(1, keepdim=True).shape)


def distance(one, other):
    return float((one - other).norm() / other.norm())


def main():
    tiny, dtype, frames, plan = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    from osaccel.formats import parse_plan
    from osaccel.generation import Generation

    pipeline = pipeline_of(tiny, dtype)
    plain = sample(pipeline, frames)
    with Generation(pipeline, parse_plan({"format": plan["format"], "steps": STEPS}, "empty")):
        empty = sample(pipeline, frames)
    with Generation(pipeline, parse_plan(plan, "plan")) as generation:
        planned = sample(pipeline, frames)
        work = generation.computed_blocks
    again = sample(pipeline, frames)
    by_hand = ByHand(pipeline, plan)
    expected = sample(pipeline, frames)
    found = {
        "empty": distance(empty, plain), "again": distance(again, plain), "changed": distance(planned, plain),
        "off": distance(planned, expected), "work": work, "by hand": by_hand.calls,
        "digest": float(planned.double().sum()),
    }  # fmt: skip
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
