# SPDX-License-Identifier: Apache-2.0
"""What a scheduler's configuration says that derivations for epsilon and linspace must know before they act."""

from typing import Any, List, Mapping, Union


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
