# SPDX-License-Identifier: Apache-2.0
"""What a search refuses for the number of steps alone, in its own words; needs no torch."""

from typing import Optional, Sequence

# Of the plan search, see `osaccel.search.plan.actions`.
SHORTEST_WINDOW = 6


def too_short(steps: int) -> Optional[str]:
    """Why a generation of so few steps has no plan to be searched: one window behind the first step is needed."""
    fewest = 1 + SHORTEST_WINDOW
    if steps >= fewest:
        return None
    return f"A generation of {steps} steps is too short for a plan search; sample at least {fewest}."


def too_many_asked(counts: Sequence[int], steps: int) -> Optional[str]:
    """Why lists of so many timesteps are not found among a script's `steps` of its own."""
    if max(counts) < steps:
        return None
    return (
        f"OSACCEL_TARGET_STEPS asks for {max(counts)} steps, but the script samples {steps}; a search chooses among "
        f"the script's own steps, so at most {steps - 1} are allowed."
    )
