# SPDX-License-Identifier: Apache-2.0
"""What candidates are measured against: the recorded plain generations, as sizes of their latents and as frames."""

from typing import Any, Dict, List, Sequence

import numpy as np
import torch

from osaccel.search.frames import frames_of, psnr
from osaccel.search.recording.replay import Replay
from osaccel.search.team import Team


class Reference:
    """The plain generations of some recorded calls; each is summed and decoded once, when it is first asked for.

    Args:
        replays: the calls.
        team: whose shards are summed, and whose leader's frames count.
    """

    def __init__(self, replays: Sequence[Replay], team: Team):
        self.replays, self.team = list(replays), team
        self._squares: List[float] = []
        self._frames: Dict[int, np.ndarray] = {}

    def squares(self) -> List[float]:
        """The sum of squares of each call's final latents, over the team's shards."""
        if not self._squares:
            finals = [replay.recording.latents[-1].double() for replay in self.replays]
            self._squares = self.team.sum(torch.stack([(final**2).sum() for final in finals])).tolist()
        return self._squares

    def psnr(self, number: int, output: Any) -> float:
        """Of the frames in a pipeline's output against those of call `number`, in dB, the same on every rank."""
        if number not in self._frames:
            self._frames[number] = frames_of(self.replays[number].decode())
        return self.team.share(psnr(self._frames[number], frames_of(output)))
