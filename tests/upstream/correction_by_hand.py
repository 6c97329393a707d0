# SPDX-License-Identifier: Apache-2.0
"""Run by test_correction_upstream.py in the upstream's environment: the correction against the same worked out by hand.

    python correction_by_hand.py TINY DTYPE FRAMES PLAN_JSON      (also under torchrun: then in sequence parallel)

Prints one JSON line: relative distances of the final latents, whether the random state ended where the plain run's did,
and a digest of the latents that every rank has in the end. What is worked out by hand knows nothing of osaccel.
"""

import json
import math
import sys

import torch
from plan_by_hand import DEVICE, STEPS, distance, pipeline_of, sample


class ByHand:
    """Patches `scheduler.step` of EulerAncestral: native correction, in plain numbers at every step."""

    def __init__(self, pipeline, predictor, corrector):
        self.scheduler, self.original = pipeline.scheduler, pipeline.scheduler.step
        self.predictor, self.corrector = predictor, corrector
        self.step, self.known, self.added = 0, [], 0.0

        def step(model_output, timestep, sample, generator=None, return_dict=True):
            return self.stepped(model_output, timestep, sample, generator=generator, return_dict=return_dict)

        pipeline.scheduler.step = step

    def strengths(self):
        """Of this step, less where the last two changes say that the prediction swings back."""
        factor = 1.0
        if len(self.known) > 2:
            last, first = self.known[-1] - self.known[-2], self.known[-2] - self.known[-3]
            r = float((last * first).sum() / (last.norm() * first.norm()))
            factor = min(1.0, max(0.0, 2 + 4 * r))
        return [factor * (value[self.step] if isinstance(value, list) else value)
                for value in (self.predictor, self.corrector)]  # fmt: skip

    def stepped(self, model_output, timestep, sample, **others):
        s, t = self.scheduler.sigmas[self.step].item(), self.scheduler.sigmas[self.step + 1].item()
        p = self.scheduler.sigmas[self.step - 1].item()
        denoised, x = sample.float() - s * model_output.float(), sample.float()
        self.known.append(denoised)
        if self.step == 0:
            self.step += 1
            return self.original(model_output, timestep, sample, **others)
        predictor, corrector = self.strengths()
        change, h = denoised - self.known[-2], math.log(p / s)
        share = (h * math.exp(2 * h) / (math.exp(2 * h) - 1) - 0.5) / h
        x = (x + corrector * (1 - s**2 / p**2) * (share * change - self.added)).to(sample.dtype)
        far = 0.0 if t == 0 else min(s * (s - t) / ((s + t) * (p - s)), s / (s + p))
        self.added = predictor * far * change
        self.step += 1
        output = ((x.float() - denoised - self.added) / s).to(model_output.dtype)
        return self.original(output, timestep, x, **others)


def random_state():
    return (torch if DEVICE == "cpu" else torch.cuda).get_rng_state()


def main():
    tiny, dtype, frames, plan = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    from osaccel.formats import parse_plan
    from osaccel.generation import Generation

    def generated(correction):
        content = {"format": "osaccel.plan/1", "steps": STEPS, "correction": correction}
        with Generation(pipeline, parse_plan(content, "plan")):
            return sample(pipeline, frames), random_state()

    pipeline = pipeline_of(tiny, dtype)
    plain, state = sample(pipeline, frames), random_state()
    zero, _ = generated({"predictor": [0] * STEPS, "corrector": 0})
    corrected, after = generated(plan)
    again = sample(pipeline, frames)
    ByHand(pipeline, plan["predictor"], plan["corrector"])
    expected = sample(pipeline, frames)
    found = {
        "zero": distance(zero, plain), "again": distance(again, plain), "changed": distance(corrected, plain),
        "off": distance(corrected, expected), "same state": torch.equal(state, after),
        "digest": float(corrected.double().sum()),
    }  # fmt: skip
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
