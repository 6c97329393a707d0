# SPDX-License-Identifier: Apache-2.0
"""Ranks of one sequence-parallel group must hold the same settings, or one skips a block while another waits for it."""

from dataclasses import asdict

from osaccel.formats import SettingsError
from osaccel.settings import Settings
from osaccel.targets import Target

_checked = False


def check(settings: Settings, target: Target) -> None:
    """Compare the settings of all ranks once, before the first accelerated generation.

    Raises:
        SettingsError: on every rank, when they differ. Scripts that split prompts over ranks are not compared: their
            ranks run different numbers of generations and never wait for each other inside one.
    """
    global _checked
    group = target.sequence_parallel_group()
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
