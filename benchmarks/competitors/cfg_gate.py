# SPDX-License-Identifier: Apache-2.0
"""The guidance gate of FastVideo and SGLang: from a hand-set step on, only the conditional half is computed.

The unconditional prediction is then the conditional one minus the difference of the two at the last step before the
gate, which stays frozen (their FASTVIDEO_CFG_GATE_STEP and SGLANG_DIFFUSION_CFG_GATE_STEP; there the two halves are two
forwards, here they are one batch [unconditional, conditional]).
"""

import contextlib
from typing import Any, Iterator

import torch

from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor

NAME = "CFG gate"


@contextlib.contextmanager
def attach(pipeline: Any, gate: int) -> Iterator[None]:
    """gate: how many transformer calls compute both halves, one at least."""
    net = pipeline.transformer
    original, calls, difference = net.forward, 0, torch.zeros(0)

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal calls, difference
        calls += 1
        if calls <= gate:
            output = original(hidden_states, **kwargs)
            unconditional, conditional = output[0].chunk(2)
            difference = conditional - unconditional
            return output
        rows = len(hidden_states)
        conditional = original(conditional_half(hidden_states, rows), **conditional_half(kwargs, rows))[0]
        return (torch.cat([conditional - difference, conditional]),)

    net.forward = forward
    yield


def conditional_half(value: Any, rows: int) -> Any:
    """The second half of every tensor of `rows` rows, in dicts and sequences too."""
    if torch.is_tensor(value):
        return value[rows // 2 :] if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {name: conditional_half(part, rows) for name, part in value.items()}
    return type(value)(conditional_half(part, rows) for part in value) if isinstance(value, (list, tuple)) else value


def at(calibration: Calibration, work: float) -> Arm:
    """The gate as early as this work allows: a step after it costs half of one before it."""
    if calibration.bench.model.guidance <= 1:
        raise ValueError("without guidance there is no half to leave out")
    steps = calibration.steps
    gate = int((2 * work - 1) * steps + 1e-6)
    if gate < 1:
        raise ValueError(f"the gate saves less than half of the work, {work:g} is out of its reach")
    gate = min(gate, steps)
    return Arm(
        lambda own: attach(own, gate), name=f"{NAME} at step {gate}", family=NAME,
        work=(1 + gate / steps) / 2, key=f"{NAME}, {gate}",
    )  # fmt: skip


COMPETITOR = Competitor(NAME, at)
