# SPDX-License-Identifier: Apache-2.0
"""Who searches together: the ranks of a sequence-parallel group are one worker, the groups are the workers.

Collectives run only inside a sequence-parallel group, whose ranks make the same calls; workers, which may have
different numbers of prompts, meet in files alone.
"""

import os
from typing import Any, Callable, Optional, TypeVar

import torch

from osaccel.search.errors import SearchError

T = TypeVar("T")


class Team:
    """The ranks that run every generation together, and this team's place among the workers.

    Args:
        group: the sequence-parallel process group, or None when each rank generates on its own.
    """

    def __init__(self, group: Optional[Any] = None):
        self.group = group
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.size = torch.distributed.get_world_size(group) if group is not None else 1
        self.member = torch.distributed.get_rank(group) if group is not None else 0
        self.worker, self.workers = rank // self.size, max(1, world // self.size)

    @property
    def is_leader(self) -> bool:
        return self.member == 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.is_leader and self.worker == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the team's ranks, float64 on the CPU, the same on every rank."""
        if self.group is None:
            return values.detach().cpu().double()
        # float32: not every accelerator's collectives take float64.
        summed = values.detach().to(self._device(values), torch.float32).clone()
        torch.distributed.all_reduce(summed, group=self.group)
        return summed.cpu().double()

    def share(self, value: Any) -> Any:
        """The leader's value, on every rank of the team."""
        if self.group is None:
            return value
        holder = [value]
        first = torch.distributed.get_process_group_ranks(self.group)[0]
        torch.distributed.broadcast_object_list(holder, src=first, group=self.group)
        return holder[0]

    def led(self, make: Callable[[], T]) -> Optional[T]:
        """What `make` gives on the leader, None on the others; its SearchError is raised on every rank."""
        made, problem = None, None
        if self.is_leader:
            try:
                made = make()
            except SearchError as error:
                problem = str(error)
        problem = self.share(problem)
        if problem is not None:
            raise SearchError(problem)
        return made

    def all_agree(self, value: bool) -> bool:
        """Whether `value` is true on every rank of the team."""
        return bool(self.sum(torch.tensor([float(value)])).item() > self.size - 0.5)

    def barrier(self) -> None:
        self.all_agree(True)

    def _device(self, values: torch.Tensor) -> torch.device:
        if torch.distributed.get_backend(self.group) in ("gloo", "mpi") or values.device.type != "cpu":
            return values.device
        for name in ("npu", "cuda", "xpu"):
            if getattr(getattr(torch, name, None), "is_available", lambda: False)():
                return torch.device(name)
        return values.device
