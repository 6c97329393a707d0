# SPDX-License-Identifier: Apache-2.0
"""q of a scheduler's step that freezes the denoised prediction, see `osaccel.sampling.standin`."""

from typing import Any, Optional

from osaccel.interceptors import StepCall
from osaccel.sampling.lists import UnsupportedScheduler
from osaccel.schedule import ANCESTRAL, FLOW, POWERS, refusal


def check_scheduler(scheduler: Any) -> None:
    """Raise UnsupportedScheduler, with the reason, unless the scheduler's step freezes D as skipping needs it."""
    reason = refusal(scheduler)
    if reason:
        raise UnsupportedScheduler(reason)


def usual_power(scheduler: Any) -> float:
    """q of a scheduler's step with its usual options; that of the probability flow where nothing is known of it."""
    return next((POWERS[base.__name__] for base in type(scheduler).__mro__ if base.__name__ in POWERS), FLOW)


def known_power(scheduler: Any, call: StepCall) -> Optional[float]:
    """q of a step that freezes D; None for others."""
    try:
        check_scheduler(scheduler)
        return power_of(scheduler, call)
    except UnsupportedScheduler:
        return None


def power_of(scheduler: Any, call: StepCall) -> float:
    """q of a known scheduler's step, by its class and the options of this call; UnsupportedScheduler for others."""
    power = usual_power(scheduler)
    args, kwargs = call.others
    if any(base.__name__ == "DDIMScheduler" for base in type(scheduler).__mro__):
        eta = args[0] if args else kwargs.get("eta", 0.0)
        if eta not in (0, 1):
            raise UnsupportedScheduler(f"DDIM cannot skip or correct steps at eta={eta!r}: 0 and 1 are allowed.")
        return ANCESTRAL if eta == 1 else FLOW
    if kwargs.get("s_churn") or (args and power == FLOW and args[0]):
        raise UnsupportedScheduler("EulerDiscreteScheduler cannot skip or correct steps with s_churn; 0 is allowed.")
    return power
