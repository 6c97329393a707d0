# SPDX-License-Identifier: Apache-2.0
"""The ranks of one process group: objects for all, tensors from one to all, and an alarm that nobody waits for.

Invariant: the methods of `Ranks` are collectives, so all ranks call them in the same order; an alarm's are not.
"""

import itertools
from typing import Any, List

import torch
import torch.distributed as dist

_alarms = itertools.count()


class Ranks:
    """The ranks of a process group, numbered within it from 0.

    Args:
        group: an initialised process group that this process belongs to; any backend.
    """

    def __init__(self, group: Any):
        self.group = group
        self.members: List[int] = dist.get_process_group_ranks(group)
        self.size, self.number = len(self.members), dist.get_rank(group)

    def gather(self, value: Any) -> List[Any]:
        """Every rank's value (anything that pickles), in the order of the ranks."""
        values: List[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def hand_out(self, tensor: torch.Tensor, owner: int) -> None:
        """Fill `tensor` on every rank with the owner's; contiguous, of equal shape, type and kind of device on all."""
        # As bytes: not every backend moves bfloat16.
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=self.members[owner], group=self.group)

    def new_alarm(self) -> "Alarm":
        """An alarm that these ranks share and that has never rung."""
        # A rank may have had other alarms with other groups, so all ranks' numbers together make the name.
        numbers = self.gather(next(_alarms))
        return Alarm("osaccel/alarm/" + "/".join(f"{rank}.{number}" for rank, number in zip(self.members, numbers)))


class Alarm:
    """Lets a rank that has failed tell the others while they compute; without it they would learn it when they meet.

    Best effort: where the process group's store cannot be reached nobody hears it early.
    """

    def __init__(self, key: str):
        # A private name, but there is no other way to the store that init_process_group made.
        find_store = getattr(dist.distributed_c10d, "_get_default_store", None)
        self._key, self._store = key, find_store() if find_store else None

    def ring(self) -> None:
        if self._store is not None:
            self._store.add(self._key, 1)

    def rings(self) -> bool:
        """Whether any rank has rung; one round trip to the store."""
        return self._store is not None and self._store.add(self._key, 0) > 0
