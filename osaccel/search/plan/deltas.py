# SPDX-License-Identifier: Apache-2.0
"""What the blocks behind the first add to the hidden states at every step of a plain generation, and how it changes.

A forecast step puts a combination of earlier steps' deltas in the place of its own. So the inner products of the deltas
of any two steps hold the error of every forecast there is. They are taken over a fixed random choice of tokens, as many
as fit into `MEMORY`, and scaled up.
"""

from typing import List, Optional

import torch

from osaccel.network.forwards import Streams
from osaccel.search.plan.actions import COMPUTED_BLOCKS

MEMORY = 512 * 2**20
# Of all steps' deltas that are multiplied at a time.
COLUMNS = 2**16


class DeltaLog:
    """Watches the blocks of one plain generation (`osaccel.search.recording.observe`).

    Args:
        num_blocks: transformer blocks.
        batch_dim: the batch's dimension in the hidden states.
        memory: bytes that the chosen tokens of all steps may take, on the host.

    Attributes:
        steps: of the generation; to be set before its first forward.
    """

    def __init__(self, num_blocks: int, batch_dim: int = 0, memory: int = MEMORY):
        self.num_blocks, self.batch_dim, self.memory, self.steps = num_blocks, batch_dim, memory, 1
        self._rows: List[torch.Tensor] = []
        self._before: Optional[torch.Tensor] = None
        self._tokens: Optional[torch.Tensor] = None
        self._scale = 1.0
        # Guidance run as two forwards has two deltas a step; guidance at some of the steps changes the batch. Of
        # neither anything is known here.
        self._is_uniform = num_blocks > COMPUTED_BLOCKS

    @torch.no_grad()
    def observe(self, step: int, forward: int, index: int, before: Streams, after: Streams) -> None:
        """Called after every block; `forward` numbers the passes of a step, `index` the blocks."""
        self._is_uniform = self._is_uniform and forward == 0
        if self._is_uniform and index == COMPUTED_BLOCKS:
            self._before = self._chosen(before[0])
            self._is_uniform = not self._rows or self._before.shape == self._rows[0].shape
        if not self._is_uniform:
            self._rows = []
        elif index == self.num_blocks - 1:
            assert self._before is not None
            self._rows.append((self._chosen(after[0]) - self._before).cpu())
            self._before = None

    def _chosen(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, numbers) of the chosen tokens, float32, where they are."""
        tokens = hidden.movedim(self.batch_dim, 0)
        tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
        if self._tokens is None:
            most = max(1, self.memory // (self.steps * len(tokens) * tokens.shape[-1] * 4))
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(tokens.shape[1], generator=generator)[:most].sort().values
            self._tokens, self._scale = chosen.to(hidden.device), tokens.shape[1] / len(chosen)
        return tokens[:, self._tokens].float().flatten(1)

    def gram(self, weight: Optional[float] = None) -> torch.Tensor:
        """(steps, steps), float64, of the deltas as guidance mixes the two halves of the batch.

        Args:
            weight: the guidance scale; None where the batch has no halves.

        Forecasts' coefficients sum to zero, so a mean over the steps is taken off before, for the sake of precision.
        Empty where the generation did not run as one forward a step, all of one batch.
        """
        if not self._rows:
            return torch.zeros(0)
        rows = torch.stack(self._rows)
        rows -= rows.mean(0)
        if weight is not None:
            unconditional, conditional = rows.chunk(2, 1)
            rows = torch.lerp(unconditional, conditional, weight)
        # What a forecast leaves of deltas that hardly change is far below float32's rounding of their products.
        parts = (part.double() for part in rows.flatten(1).split(COLUMNS, dim=1))
        return self._scale * sum((part @ part.T for part in parts), torch.zeros(len(rows), len(rows)).double())
