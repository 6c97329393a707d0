# SPDX-License-Identifier: Apache-2.0
"""What a generation spends outside the plan, made faster without changing its bits: VAE tiles and attention.

Invariant: nothing here decides what is computed, only where and by which kernel; all of it ends with the generation.
"""

import contextlib
from typing import Any, Iterator, Optional

from osaccel.settings import Settings


@contextlib.contextmanager
def attached(pipeline: Any, group: Optional[Any], settings: Settings) -> Iterator[None]:
    """Context manager around one pipeline call, entered when everything else is attached to the pipeline.

    Args:
        pipeline: the upstream's pipeline, with `vae` and `transformer`.
        group: the sequence-parallel process group, or None.
        settings: `parallel_vae` and `attention` are read.

    Raises:
        SettingsError: on entering, when a kernel is asked for by name that this generation cannot use.
    """
    from osaccel.wall import attention, tiles

    with contextlib.ExitStack() as stack:
        place = settings.sources.get("attention", "OSACCEL_ATTENTION")
        # One by one: what is attached already is detached when the next one fails.
        for attach in (
            lambda: attention.attach(pipeline, settings.attention, place),
            lambda: tiles.attach(pipeline, group, settings.parallel_vae),
        ):
            undo = attach()
            if undo is not None:
                stack.callback(undo)
        yield
