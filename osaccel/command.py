# SPDX-License-Identifier: Apache-2.0
"""What a command's own words say of its generations, and what these would end with; nothing heavy is imported."""

import os
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence

from osaccel.plan import Plan
from osaccel.schedule import refusal_by_name, takes_more_steps
from osaccel.search import limits
from osaccel.settings import Settings

_WHOLE, _NUMBER = re.compile("[0-9]{1,9}"), re.compile(r"[0-9]{0,9}\.?[0-9]{1,9}")
_TEXTS = ("sample_method", "model_path")
_NUMBERS = ("num_sampling_steps", "num_frames", "height", "width")


def asked_for(words: Sequence[str]) -> Dict[str, Any]:
    """What the sample script's own options say of a generation; where one is given twice, the last."""
    found: Dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], ""]):
        option, _, value = word.partition("=")
        name = _whole_name(option[2:]) if option.startswith("--") else None
        value = value or following
        if name in _NUMBERS and _WHOLE.fullmatch(value):
            found[name] = int(value)
        elif name in _TEXTS:
            found[name] = value
        elif name == "guidance_scale" and _NUMBER.fullmatch(value):
            found[name] = float(value)
    return found


def _whole_name(option: str) -> Optional[str]:
    """What argparse takes an option for, which may be cut short; None for another one."""
    names = [name for name in (*_NUMBERS, *_TEXTS, "guidance_scale") if option and name.startswith(option)]
    return option if option in names else names[0] if len(names) == 1 else None


def is_script(command: Sequence[str]) -> bool:
    """Whether a command's options are those of one Python script; a shell or a wrapper may hold several."""
    program = os.path.basename(command[0]) if command else ""
    return program in ("-m", "torchrun", "accelerate") or program.startswith("python") or program.endswith(".py")


def sampler_of(asked: Mapping[str, Any]) -> Optional[str]:
    """The scheduler's class that --sample_method stands for."""
    return f"{asked['sample_method']}Scheduler" if "sample_method" in asked else None


def steps_of(asked: Mapping[str, Any], plan: Plan) -> Optional[int]:
    """The steps of a generation, as a plan counts them; None where that is not known."""
    if plan.timesteps:
        return len(plan.timesteps)
    sampler = sampler_of(asked) or plan.made_for.get("sampler")
    return None if takes_more_steps(sampler) else asked.get("num_sampling_steps")


def refusals(given: Settings, asked: Mapping[str, Any]) -> List[str]:
    """The messages with which a generation, or a search, would end under these settings; see `asked_for`."""
    if given.search:
        return _refusals_of_search(given, asked)
    return _refusals_of_plan(given, asked) if given.accelerates else []


def _refusals_of_search(given: Settings, asked: Mapping[str, Any]) -> List[str]:
    found: List[Optional[str]] = []
    if given.search == "plan":
        steps = steps_of(asked, given.generation_plan())
        found.append(limits.too_short(steps) if steps else None)
    if given.search in ("restep", "all"):
        steps, sampler = asked.get("num_sampling_steps"), sampler_of(asked)
        found.append(limits.too_many_asked(given.target_steps, steps) if steps else None)
        found.append(refusal_by_name(sampler) if sampler and given.correction else None)
    return [reason for reason in found if reason]


def _refusals_of_plan(given: Settings, asked: Mapping[str, Any]) -> List[str]:
    plan, found = given.generation_plan(), []
    steps, sampler = steps_of(asked, plan), sampler_of(asked)
    try:
        if steps:
            plan.check_steps(steps)
    except ValueError as error:
        found.append(f"{given.plan_source}: {error}")
    if sampler and (plan.skip or plan.correction.is_used):
        found.append(refusal_by_name(sampler) or "")
    return [reason for reason in found if reason]
