# SPDX-License-Identifier: Apache-2.0
"""Open-Sora-Plan v1.3 is told from v1.2 by its scheduler, since its pipeline has the same name."""

import diffusers
import pytest
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from osaccel.schedule import is_open_sora_plan_1_3, unfamiliar

V1_3 = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# Every sampler of v1.2's scripts, as they make it.
SAMPLERS = [
    "DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DEISMultistepScheduler", "KDPM2AncestralDiscreteScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_samplers_of_1_2_are_familiar(name):
    scheduler = getattr(diffusers, name)()
    assert unfamiliar(scheduler) == [] and not is_open_sora_plan_1_3(scheduler)


@pytest.mark.parametrize("scheduler_class", [EulerAncestralDiscreteScheduler, DDIMScheduler])
def test_1_3_is_recognised_by_all_three_marks(scheduler_class):
    scheduler = scheduler_class(**V1_3)
    assert is_open_sora_plan_1_3(scheduler) and is_open_sora_plan_1_3(scheduler.config)
    assert unfamiliar(scheduler) == [
        "it predicts v_prediction, not epsilon",
        "its terminal SNR is zero",
        "its timesteps are spaced trailing",
    ]
    for name in V1_3:
        one = scheduler_class(**{name: V1_3[name]})
        assert len(unfamiliar(one)) == 1 and not is_open_sora_plan_1_3(one)


def test_what_has_no_configuration_is_familiar():
    assert unfamiliar(object()) == [] and unfamiliar(type("S", (), {"config": 3})()) == []
