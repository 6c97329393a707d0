# SPDX-License-Identifier: Apache-2.0
"""TeaCache (arXiv 2411.19108), which no package offers: the rule, written from the paper."""

import contextlib
import functools
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch

from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor, tuned
from osaccel.network.regions import ReplacedForward

NAME = "TeaCache (rule)"


def relative_l1(now: torch.Tensor, before: torch.Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


class TeaCache:
    """The rule on the blocks of one generation.

    It accumulates a degree-4 polynomial of the relative L1 change of block 0's modulated input against the previous
    step. While the sum stays below the threshold no block runs and the residual of all blocks is added again; else the
    sum starts anew. The first `warmup` steps always run.
    """

    def __init__(self, blocks: List[torch.nn.Module], warmup: int, threshold: float, polynomial: Callable = float):
        self.blocks, self.warmup, self.threshold, self.polynomial = blocks, warmup, threshold, polynomial
        self.step, self.total, self.is_skipping = -1, 0.0, False
        self.previous: Optional[torch.Tensor] = None
        self.changes: List[float] = []
        self.residuals: List[torch.Tensor] = []
        self.keep = 1

    def make_forward(self, index: int, original: Callable) -> Callable:
        def forward(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            if index == 0:
                self.step += 1
                self.is_skipping = self._may_skip(hidden_states, arguments)
                self.entered = hidden_states
            if self.is_skipping:
                return hidden_states + self.residuals[-1] if index == 0 else hidden_states
            output = original(hidden_states, **arguments)
            if index == len(self.blocks) - 1:
                self.residuals = [*self.residuals, output - self.entered][-self.keep :]
            return output

        return forward

    def _may_skip(self, hidden: torch.Tensor, arguments: Dict[str, Any]) -> bool:
        block: Any = self.blocks[0]
        table = block.scale_shift_table[None] + arguments["timestep"].reshape(len(hidden), 6, -1)
        shift, scale = table.chunk(6, dim=1)[:2]
        now = block.norm1(hidden) * (1 + scale) + shift
        change = 0.0 if self.previous is None else relative_l1(now, self.previous)
        self.previous = now
        self.changes.append(change)
        self.total += max(float(self.polynomial(change)), 0.0)
        if self.step >= self.warmup and self.residuals and self.total < self.threshold:
            return True
        self.total = 0.0
        return False


@contextlib.contextmanager
def attach(pipeline: Any, *arguments: Any) -> Iterator[TeaCache]:
    """`TeaCache(blocks, *arguments)` attached to the pipeline's transformer."""
    blocks = list(pipeline.transformer.transformer_blocks)
    rule = TeaCache(blocks, *arguments)
    replaced = [
        ReplacedForward(block, functools.partial(rule.make_forward, index)) for index, block in enumerate(blocks)
    ]
    try:
        yield rule
    finally:
        for block in replaced:
            block.restore()


def fitted_polynomial(generate: Callable[[Callable], Any]) -> List[float]:
    """Coefficients, highest first, fitted as the paper does: from the change of the input to that of the residual, over
    one plain generation.

    `generate(attach)` runs one generation.
    """
    rules: List[TeaCache] = []

    @contextlib.contextmanager
    def watched(pipeline: Any) -> Iterator[None]:
        with attach(pipeline, 10**9, 0.0) as rule:
            rule.keep = 10**9
            rules.append(rule)
            yield

    generate(watched)
    residuals = rules[0].residuals
    outputs = [relative_l1(now, before) for before, now in zip(residuals, residuals[1:])]
    return np.polyfit(rules[0].changes[1:], outputs, 4).tolist()


def at(calibration: Calibration, work: float) -> Arm:
    coefficients: Sequence[float] = calibration.learned(NAME, lambda: fitted_polynomial(calibration.learn))
    polynomial = np.poly1d(coefficients)
    return tuned(calibration, NAME, lambda own, value: attach(own, calibration.warmup, value, polynomial), work)


COMPETITOR = Competitor(NAME, at)
