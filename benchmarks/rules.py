# SPDX-License-Identifier: Apache-2.0
"""Published cache rules, written from their papers, on the miniature: each skips all blocks, or all but the first.

All share one mechanism: blocks `first ..` run, and their residual (output minus input) is kept; or none of them runs
and the kept residual is added. They differ in when they skip. Warm-up steps always run.
"""

from typing import Any, Callable, Dict, List, Optional

import numpy as np
import torch

from osaccel.cache.executor import ReplacedForward


def relative_l1(now: torch.Tensor, before: torch.Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


class Rule:
    """Skip blocks `first ..` whenever `may_skip` says so; a context manager around generations of one pipeline."""

    first = 0

    def __init__(self, pipeline: Any, threshold: float, warmup: int):
        self.pipeline, self.threshold, self.warmup = pipeline, threshold, warmup
        self.blocks = list(pipeline.transformer.transformer_blocks)
        self.undo: List[Callable[[], None]] = []
        self.reset()

    def reset(self) -> None:
        """Before every generation."""
        self.step, self.computed, self.skipping = -1, 0, False
        self.residual: Optional[torch.Tensor] = None

    def may_skip(self, hidden: torch.Tensor, timestep: torch.Tensor) -> bool:
        """At the input of block `first`: the rule itself; called at every step."""
        raise NotImplementedError

    def on_computed(self, residual: torch.Tensor) -> None:
        """The region has run."""

    def __enter__(self) -> "Rule":
        for index, block in enumerate(self.blocks):
            self.undo.append(ReplacedForward(block, self._maker(index)).restore)
        return self

    def __exit__(self, *_: Any) -> None:
        while self.undo:
            self.undo.pop()()

    def _maker(self, index: int) -> Callable[[Callable], Callable]:
        def make(original: Callable) -> Callable:
            return lambda hidden_states, **kwargs: self._forward(index, original, hidden_states, kwargs)

        return make

    def _forward(self, index: int, original: Callable, hidden: torch.Tensor, kwargs: Dict[str, Any]) -> torch.Tensor:
        if index == 0:
            self.step += 1
        if index == self.first:
            wants = self.may_skip(hidden, kwargs["timestep"])
            self.skipping = wants and self.residual is not None and self.step >= self.warmup
            self.entered = hidden
        if index >= self.first and self.skipping:
            return hidden + self.residual if index == self.first else hidden
        self.computed += 1
        output = original(hidden, **kwargs)
        if index == len(self.blocks) - 1:
            residual = output - self.entered
            self.on_computed(residual)
            self.residual = residual
        return output


class FirstBlockCache(Rule):
    """ParaAttention's First-Block-Cache (also cache-dit's DBCache F1B0): block 0 always runs; skip while its residual
    differs from that of the last computed step by less than the threshold (relative L1)."""

    first = 1

    def reset(self) -> None:
        super().reset()
        self.reference: Optional[torch.Tensor] = None

    def _forward(self, index, original, hidden, kwargs):
        if index == 0:
            self.before = hidden
        return super()._forward(index, original, hidden, kwargs)

    def may_skip(self, hidden, timestep):
        self.probe = hidden - self.before
        return self.reference is not None and relative_l1(self.probe, self.reference) < self.threshold

    def on_computed(self, residual):
        self.reference = self.probe


class TeaCache(Rule):
    """TeaCache (arXiv 2411.19108): accumulate a degree-4 polynomial of the relative L1 change of block 0's modulated
    input against the previous step; skip while the sum is below the threshold, reset it on compute."""

    polynomial = np.poly1d([1.0, 0.0])

    def reset(self) -> None:
        super().reset()
        self.previous: Optional[torch.Tensor] = None
        self.total = 0.0
        self.changes: List[float] = []

    def may_skip(self, hidden, timestep):
        block = self.blocks[0]
        shift, scale = (block.scale_shift_table[None] + timestep.reshape(len(hidden), 6, -1)).chunk(6, dim=1)[:2]
        now = block.norm1(hidden) * (1 + scale) + shift
        change = 0.0 if self.previous is None else relative_l1(now, self.previous)
        self.previous = now
        self.changes.append(change)
        self.total += max(float(self.polynomial(change)), 0.0)
        if self.total < self.threshold and self.step >= self.warmup:
            return True
        self.total = 0.0
        return False

    @classmethod
    def calibrate(cls, pipeline: Any, generate: Callable[[], Any]) -> None:
        """Fit the polynomial from input change to residual change on one plain generation, as the paper does."""
        rule, residuals = cls(pipeline, -1.0, 0), []
        rule.on_computed = residuals.append  # type: ignore[method-assign]
        with rule:
            generate()
        outputs = [relative_l1(now, before) for before, now in zip(residuals, residuals[1:])]
        cls.polynomial = np.poly1d(np.polyfit(rule.changes[1:], outputs, 4))


class MagCache(Rule):
    """MagCache (arXiv 2506.09045): calibrated magnitude ratios of consecutive residuals; skip while the accumulated
    |1 - product of the skipped ratios| is below the threshold, at most `most` times in a row."""

    ratios: List[float] = []
    most = 4

    def reset(self) -> None:
        super().reset()
        self.product, self.error, self.in_a_row = 1.0, 0.0, 0

    def may_skip(self, hidden, timestep):
        if self.step < self.warmup or self.step >= len(self.ratios):
            return False
        self.product *= self.ratios[self.step]
        self.error += abs(1 - self.product)
        self.in_a_row += 1
        if self.error < self.threshold and self.in_a_row <= self.most:
            return True
        self.product, self.error, self.in_a_row = 1.0, 0.0, 0
        return False

    @classmethod
    def calibrate(cls, pipeline: Any, generate: Callable[[], Any]) -> None:
        rule, norms = cls(pipeline, -1.0, 10**9), []
        rule.on_computed = lambda residual: norms.append(residual.norm(dim=-1).mean())  # type: ignore[method-assign]
        with rule:
            generate()
        cls.ratios = [1.0] + [float(now / before) for before, now in zip(norms, norms[1:])]


class TaylorSeer(Rule):
    """TaylorSeer (arXiv 2503.06923), order 1 on the region's residual: every `interval`-th step computes, the others
    extrapolate linearly in the step index. The threshold is the interval."""

    def reset(self) -> None:
        super().reset()
        self.newest: Optional[torch.Tensor] = None
        self.slope: Optional[torch.Tensor] = None
        self.computed_at = 0

    def may_skip(self, hidden, timestep):
        if self.step < self.warmup or (self.step - self.warmup) % int(self.threshold) == 0:
            return False
        assert self.newest is not None
        ahead = self.step - self.computed_at
        self.residual = self.newest if self.slope is None else self.newest + ahead * self.slope
        return True

    def on_computed(self, residual):
        if self.newest is not None:
            self.slope = (residual - self.newest) / (self.step - self.computed_at)
        self.newest, self.computed_at = residual, self.step
