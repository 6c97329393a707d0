# SPDX-License-Identifier: Apache-2.0
"""Ranks of one sequence-parallel group must hold the same settings, or one skips a block while another waits for it."""

import sys
from dataclasses import asdict
from typing import Any, Optional, Tuple

from osaccel.formats import SettingsError
from osaccel.settings import Settings

_checked = False


def sequence_parallel_group(state_modules: Tuple[str, ...]) -> Optional[Any]:
    """The upstream's process group when sequence parallelism is on, else None."""
    for name in state_modules:
        state = sys.modules.get(name)
        if state is not None and state.get_sequence_parallel_state():
            info = getattr(state, "hccl_info", None) or getattr(state, "nccl_info", None)
            return getattr(info, "group", None)
    return None


def check(settings: Settings, state_modules: Tuple[str, ...]) -> None:
    """Compare the settings of all ranks once, before the first accelerated generation.

    Raises:
        SettingsError: on every rank, when they differ. Scripts that split prompts over ranks are not compared: their
            ranks run different numbers of generations and never wait for each other inside one.
    """
    global _checked
    group = sequence_parallel_group(state_modules)
    if _checked or group is None:
        return
    import torch.distributed as dist

    mine = asdict(settings)
    mine.pop("sources")
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise SettingsError(
                f"The ranks of one sequence-parallel group have different osaccel settings: rank 0 has {everyone[0]}, "
                f"rank {rank} has {theirs}. Give every node the same variables and files."
            )
    _checked = True
