# SPDX-License-Identifier: Apache-2.0
"""Parts of a command in processes of their own."""

import multiprocessing
from typing import Any, Callable, List, Sequence, Tuple

import torch


def in_processes(run: Callable[..., Any], calls: Sequence[Tuple], jobs: int, threads: int = 1) -> List[Any]:
    """`run(*call)` of every call, `jobs` at a time, with this many threads each.

    In processes, for two samplings in one would share its random state.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(calls)), torch.set_num_threads, (threads,)) as pool:
        return pool.starmap(run, calls, chunksize=1)
