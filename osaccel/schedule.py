# SPDX-License-Identifier: Apache-2.0
"""What a scheduler's class and configuration say that derivations must know before they act; needs no torch."""

from typing import Any, List, Mapping, Optional, Union

# The q of `osaccel.sampling.standin`, by the samplers whose step freezes the denoised prediction.
ANCESTRAL, FLOW = 2.0, 1.0
POWERS = {
    "EulerAncestralDiscreteScheduler": ANCESTRAL,
    "DDPMScheduler": ANCESTRAL,
    "EulerDiscreteScheduler": FLOW,
    "DDIMScheduler": FLOW,
}
_TWICE = "it evaluates every interval twice, and one stand-in for two different points is none"
_HISTORY = "it already extrapolates along earlier predictions, which a stand-in would falsify"
_REFUSED = {
    "HeunDiscreteScheduler": _TWICE,
    "KDPM2DiscreteScheduler": _TWICE,
    "KDPM2AncestralDiscreteScheduler": _TWICE,
    "DPMSolverMultistepScheduler": _HISTORY,
    "DPMSolverSinglestepScheduler": _HISTORY,
    "DEISMultistepScheduler": _HISTORY,
    "PNDMScheduler": _HISTORY,
    "UniPCMultistepScheduler": _HISTORY,
}


def takes_more_steps(class_name: Any) -> bool:
    """Whether schedulers of this class have more timesteps than they are asked for."""
    return class_name == "PNDMScheduler" or _REFUSED.get(str(class_name)) == _TWICE


def refusal_by_name(class_name: str) -> Optional[str]:
    """Why schedulers of this class cannot skip or correct; None where their options decide, see `refusal`."""
    return _cannot_skip(class_name, _REFUSED[class_name]) if class_name in _REFUSED else None


def refusal(scheduler: Any) -> Optional[str]:
    """Why a scheduler's step does not freeze D as skipping and correcting need it; None where it does."""
    reason = _reason(scheduler)
    return _cannot_skip(type(scheduler).__name__, reason) if reason else None


def _cannot_skip(class_name: str, reason: str) -> str:
    return f"{class_name} cannot skip or correct steps: {reason}. Allowed: {', '.join(POWERS)}."


def _reason(scheduler: Any) -> Optional[str]:
    names = [base.__name__ for base in type(scheduler).__mro__]
    config = scheduler.config
    for name in names:
        if name in _REFUSED:
            return _REFUSED[name]
    if not any(name in POWERS for name in names):
        return "nothing is known of how it uses a prediction"
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            return f"with {option}=True it changes the prediction; {option}=False is allowed"
    if config.get("variance_type", "fixed_small") != "fixed_small":
        return f"with variance_type={config['variance_type']!r} its noise does not merge; 'fixed_small' is allowed"
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction", "sample"):
        return (
            f"prediction_type={config['prediction_type']!r} is unknown; 'epsilon', 'v_prediction', 'sample' are allowed"
        )
    return None


def unfamiliar(scheduler: Any) -> List[str]:
    """How a scheduler differs from Open-Sora-Plan v1.2's, in words; empty for one that predicts epsilon as v1.2 does.

    Open-Sora-Plan v1.3 has v1.2's module and class names, but predicts v with zero terminal SNR (the first sigma is
    4096) and trailing spacing. A list of timesteps and a DiT cache need none of this; what reads the network's output
    as noise, or places by sigma, must refuse what is named here.

    Args:
        scheduler: a diffusers scheduler, or its configuration as a mapping.
    """
    config: Union[Mapping[str, Any], Any] = scheduler if isinstance(scheduler, Mapping) else _config(scheduler)
    prediction = config.get("prediction_type", "epsilon")
    spacing = config.get("timestep_spacing", "linspace")
    return [
        reason
        for holds, reason in (
            (prediction != "epsilon", f"it predicts {prediction}, not epsilon"),
            (bool(config.get("rescale_betas_zero_snr")), "its terminal SNR is zero"),
            (spacing == "trailing", "its timesteps are spaced trailing"),
        )
        if holds
    ]


def is_open_sora_plan_1_3(scheduler: Any) -> bool:
    """Whether all three marks of v1.3 are there; fewer belong to another upstream or to a choice of the user."""
    return len(unfamiliar(scheduler)) == 3


def _config(scheduler: Any) -> Mapping[str, Any]:
    config = getattr(scheduler, "config", {})
    # diffusers' FrozenDict is a dict; a scheduler of another kind may have anything there.
    return config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
