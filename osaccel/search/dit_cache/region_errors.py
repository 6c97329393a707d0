# SPDX-License-Identifier: Apache-2.0
"""What reusing any block region at any step would change in the hidden states, from one plain generation.

The change a reuse makes at a region's end is the region's delta now minus its delta at the step it was stored; a
region's delta is the sum of its blocks' deltas. So the inner products of the blocks' differences between two steps, a
blocks x blocks matrix per pair of steps, hold the error of every region. Kept are the deltas of the last `max_gap`
steps only, of so many rows of the hidden states as fit into `memory` bytes; the squared error is scaled up from them.
"""

from typing import Dict, List, Optional, Tuple

import torch

from osaccel.network.forwards import Streams

MEMORY = 512 * 2**20
# Guidance run as two forwards keeps two histories; more than two are not expected.
_BRANCHES = 2


class RegionErrors:
    """Squared delta errors of all regions of one generation, collected while it runs.

    Args:
        num_blocks: transformer blocks.
        max_gap: largest distance between a reuse and the step that stored, in steps.
        memory: bytes the kept deltas may take, on the device where the hidden states live.
    """

    def __init__(self, num_blocks: int, max_gap: int, memory: int = MEMORY):
        self.num_blocks, self.max_gap, self.memory = num_blocks, max_gap, memory
        self.grams: Dict[Tuple[int, int], torch.Tensor] = {}
        self.bytes_used = 0
        self._history: Dict[int, List[Tuple[int, torch.Tensor]]] = {}
        self._rows: Dict[Tuple[int, ...], Optional[torch.Tensor]] = {}
        self._deltas: Dict[int, List[torch.Tensor]] = {}
        self._step = -1

    @torch.no_grad()
    def observe(self, step: int, branch: int, index: int, before: Streams, after: Streams) -> None:
        """Called after every block; `branch` numbers the passes of a step, `index` the blocks."""
        if step < self._step:
            # The next generation: its first steps have nothing to reuse.
            self._history.clear()
            self._deltas.clear()
        self._step = step
        deltas = self._deltas.setdefault(branch, [])
        deltas.append(torch.cat([self._sample(b, a) for b, a in zip(before, after)]))
        if index == self.num_blocks - 1:
            self._finish_pass(branch, step, torch.stack(self._deltas.pop(branch)))

    def close(self) -> None:
        """The generation is over: let go of the kept deltas."""
        self._history.clear()

    def _sample(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """The chosen rows of after - before, flat, scaled so that squares sum to what all rows would."""
        shape = tuple(before.shape)
        if shape not in self._rows:
            self._rows[shape] = self._choose_rows(before)
        rows = self._rows[shape]
        before, after = before.reshape(-1, shape[-1]), after.reshape(-1, shape[-1])
        if rows is None:
            return (after.float() - before.float()).reshape(-1)
        delta = after[rows].float() - before[rows].float()
        return delta.reshape(-1) * (len(before) / len(rows)) ** 0.5

    def _choose_rows(self, hidden: torch.Tensor) -> Optional[torch.Tensor]:
        total = hidden.numel() // hidden.shape[-1]
        # Per branch: the history, the deltas under way, their stack, and one difference.
        copies = self.max_gap * _BRANCHES + 3
        most = max(1, self.memory // (copies * self.num_blocks * hidden.shape[-1] * 4))
        if most >= total:
            return None
        # Evenly spaced rows would beat against the frame size; a fixed random choice does not.
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(total, generator=generator)[:most].sort().values.to(hidden.device)

    def _finish_pass(self, branch: int, step: int, deltas: torch.Tensor) -> None:
        history = self._history.setdefault(branch, [])
        for stored_at, stored in history:
            difference = deltas - stored
            gram = (difference @ difference.T).double().cpu()
            key = (step, step - stored_at)
            self.grams[key] = self.grams[key] + gram if key in self.grams else gram
        del history[: max(0, len(history) + 1 - self.max_gap)]
        history.append((step, deltas))
        kept = sum(tensor.numel() * 4 for pairs in self._history.values() for _, tensor in pairs)
        self.bytes_used = max(self.bytes_used, kept + 3 * deltas.numel() * 4)

    def tensor(self, num_steps: int) -> torch.Tensor:
        """Gram matrices, shape (max_gap, steps, blocks, blocks); zero where a gap reaches before the first step."""
        found = torch.zeros(self.max_gap, num_steps, self.num_blocks, self.num_blocks, dtype=torch.float64)
        for (step, gap), gram in self.grams.items():
            if step < num_steps:
                found[gap - 1, step] = gram
        return found
