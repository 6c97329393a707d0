# SPDX-License-Identifier: Apache-2.0
"""Open-Sora-Plan v1.3 is told from v1.2 by its scheduler, since its pipeline has the same name."""

import json

import diffusers
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from test_threads import CACHE, LIST, STEPS, hooked

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


def test_under_1_3_a_cache_is_right_with_a_warning_and_a_list_is_refused_before_the_first_step(
    monkeypatch, tmp_path, caplog
):
    path, call = tmp_path / "file.json", {"num_inference_steps": STEPS, "seed": 1}
    path.write_text(json.dumps(dict(CACHE)))
    pipeline = hooked(monkeypatch, OSACCEL_CACHE_CONFIG=path)(scheduler=DDIMScheduler(**V1_3))
    cached = pipeline(**call)
    assert "this is not Open-Sora-Plan v1.2's schedule (it predicts v_prediction" in caplog.text
    monkeypatch.delenv("OSACCEL_CACHE_CONFIG")
    plain = hooked(monkeypatch)(scheduler=DDIMScheduler(**V1_3))
    torch.testing.assert_close(cached, tiny.reference_loop(plain, dict(CACHE), **call))

    path.write_text(json.dumps(LIST))
    refused = hooked(monkeypatch, OSACCEL_TIMESTEPS=path)(scheduler=DDIMScheduler(**V1_3))
    with pytest.raises(ValueError, match="sigma is infinite"):
        refused(**call)
    assert sum(refused.block_calls()) == 0
