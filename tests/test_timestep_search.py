# SPDX-License-Identifier: Apache-2.0
"""The timestep search: exact programme, no extra forwards, calibration errors, msModelSlim's API, sums over ranks."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler
from test_search_script import finish, start
from torch import nn

from osaccel import formats, settings
from osaccel.adaptors.restep import ReStepAdaptor, ReStepSearchConfig
from osaccel.generation import Generation
from osaccel.interceptors import Interceptor
from osaccel.plan import Correction
from osaccel.report import timesteps as restep_plots
from osaccel.search.errors import SearchError
from osaccel.search.recording.replay import Call
from osaccel.search.team import Team
from osaccel.search.timesteps import calibration
from osaccel.search.timesteps import lists as timesteps
from osaccel.search.timesteps.denoised import DenoiserLog, cosine_matrix
from osaccel.search.timesteps.runner import RestepRunner, paths_of

SIZE = 32


class Network(nn.Module):
    """The exact noise prediction for Gaussian latents of variance 1; counts its calls."""

    def __init__(self, scheduler):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Identity()])
        self.scheduler, self.calls = [scheduler], 0

    def forward(self, x, timestep):
        self.calls += 1
        alpha = float(np.interp(float(timestep), np.arange(1000), self.scheduler[0].alphas_cumprod.numpy()))
        return x * math.sqrt(1 - alpha)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, video):
        assert -1 <= float(video.min()) and float(video.max()) <= 1 and float(video.min()) < -0.5
        return nn.functional.avg_pool3d(video, (1, 4, 4))


class Pipeline:
    """The upstream's loop on a few frames of 8 x 8 latents."""

    def __init__(self, scheduler=None, frames=3):
        self.scheduler, self.frames = scheduler or EulerAncestralDiscreteScheduler(), frames
        self.transformer, self.vae = Network(self.scheduler), Autoencoder()

    @torch.no_grad()
    def __call__(
        self, prompt=None, num_inference_steps=20, num_frames=3, height=SIZE, width=SIZE, output_type="pil", **_
    ):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 3, self.frames, 8, 8) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            noise = self.transformer(self.scheduler.scale_model_input(latents, t), t)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def call_of(pipeline, **kwargs):
    return Call(pipeline.__call__, pipeline, (), kwargs)


def statistics(size=12, seed=0, bands=2):
    generator = np.random.default_rng(seed)
    sigmas = np.geomspace(50, 0.05, size)
    steps = generator.random((bands, size, 40)).cumsum(1)
    distances = ((steps[:, :, None] - steps[:, None]) ** 2).mean(-1)
    return timesteps.Statistics(np.linspace(999, 0, size), sigmas, distances, np.full(bands, 1 / bands))


def write_videos(directory, count=5, frames=3, size=SIZE):
    imageio = pytest.importorskip("imageio")
    generator = np.random.default_rng(0)
    for number in range(count):
        video = generator.integers(0, 255, (frames, size, size, 3), dtype=np.uint8)
        imageio.mimwrite(str(directory / f"{number}.mp4"), list(video), fps=8, macro_block_size=1, codec="libx264")


# The programme ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_gap", [1.6, 3.0, 100.0])
@pytest.mark.parametrize("points", [2, 4, 6, 9])
def test_programme_equals_brute_force(points, max_gap):
    given = statistics(10)
    costs, allowed = timesteps.pair_costs(given, 1.0), timesteps.gap_mask(given.timesteps, points, max_gap)
    best = math.inf
    for inner in itertools.combinations(range(1, 9), points - 2):
        path = (0, *inner, 9)
        if all(allowed[i, j] for i, j in zip(path, path[1:])):
            best = min(best, timesteps.path_cost(costs, path))
    if best == math.inf:
        with pytest.raises(ValueError, match="no list of"):
            timesteps.shortest_paths(costs, [points], allowed)
        return
    found = timesteps.shortest_paths(costs, [points], allowed)
    assert found.costs[points] == pytest.approx(best)
    assert timesteps.path_cost(costs, found.indices[points]) == pytest.approx(best)


def test_every_length_at_once_equals_each_alone():
    costs = timesteps.pair_costs(statistics(14), 1.15)
    together = timesteps.shortest_paths(costs, [3, 5, 14])
    for points in (3, 5, 14):
        assert together.indices[points] == timesteps.shortest_paths(costs, [points]).indices[points]
    assert together.indices[14] == tuple(range(14))


@pytest.mark.parametrize("method", timesteps.METHODS)
def test_lists_descend_on_the_schedule_and_keep_its_ends(method):
    given = statistics(40)
    for points, found in timesteps.search(given, [8, 20], method).items():
        assert len(found) == points and (np.diff(found) < 0).all()
        assert found[0] == pytest.approx(999) and found[-1] == pytest.approx(0)
    if method == "wdp":
        assert set(found) <= set(given.timesteps)
        assert -np.diff(found).min() <= timesteps.DEFAULTS.max_gap * 999 / 19 + 1e-6
    with pytest.raises(ValueError, match="method must be one of wdp, klub, arctan"):
        timesteps.search(given, [8], "ays")


def test_weight_is_the_formula_for_a_gaussian_band():
    lam, variance = np.geomspace(1e-3, 1e3, 400), 0.7
    # D is a martingale; its increments have the variance by which the remaining one falls.
    remaining = 1 / (lam + 1 / variance)
    distances = np.abs(remaining[:, None] - remaining[None])[None]
    given = timesteps.Statistics(np.linspace(999, 0, 400), lam**-0.5, distances, np.ones(1))
    assert timesteps.remaining_variances(given)[0, :250] == pytest.approx(remaining[:250], rel=0.02)


def test_guidance_does_not_hide_what_a_video_has_not_decided():
    """Guided predictions overshoot at high noise: larger than the final ones, and turned away from them."""
    generator = np.random.default_rng(0)
    sigmas = np.geomspace(30, 0.05, 40)
    final = generator.normal(size=4000)
    strength = (1.5 * sigmas / (1 + sigmas))[:, None]
    rows = final * (1 - strength) + 1.5 * strength * generator.normal(size=4000)
    powers, products = (rows**2).mean(1), rows @ rows.T / 4000
    distances = np.maximum(powers[:, None] + powers[None] - 2 * products, 0)[None]
    given = timesteps.Statistics(np.linspace(999, 0, 40), sigmas, distances, np.ones(1), powers[None])
    undecided, remaining = timesteps.undecided_variances(given)[0], timesteps.remaining_variances(given)[0]
    assert undecided[0] == pytest.approx(distances[0, 0, -1], rel=0.05) and undecided[0] > 2 * remaining[0]
    assert (np.diff(undecided) <= 0).all() and (undecided <= sigmas**2).all()


def test_a_networks_own_error_at_high_noise_does_not_count_as_undecided_video():
    """D is the exact martingale plus an error that grows with the noise, as a network's does."""
    generator = np.random.default_rng(0)
    sigmas = np.geomspace(100, 0.05, 60)
    remaining = 1 / (sigmas**-2.0 + 1)
    clean = generator.normal(size=4000)
    steps = np.sqrt(np.diff(sigmas**-2.0, prepend=0.0))[:, None]
    motion = (steps * generator.normal(size=(60, 4000))).cumsum(0)
    exact = remaining[:, None] * ((sigmas**-2.0)[:, None] * clean + motion)
    rows = exact + 0.03 * sigmas[:, None] * generator.normal(size=exact.shape)
    powers, products = (rows**2).mean(1), rows @ rows.T / 4000
    distances = np.maximum(powers[:, None] + powers[None] - 2 * products, 0)[None]
    given = timesteps.Statistics(np.linspace(999, 0, 60), sigmas, distances, np.ones(1), powers[None])
    assert timesteps.remaining_variances(given._replace(powers=None))[0, 0] > 5
    assert timesteps.remaining_variances(given)[0, :40] == pytest.approx(remaining[:40], abs=0.15)


def test_what_each_parameter_does():
    given = statistics(100)
    even = 999 / 19

    def found(**chosen):
        return timesteps.wdp(given, [20], timesteps.Parameters(**chosen))[20]

    assert -np.diff(found(max_gap=1.5)).min() <= 1.5 * even + 1e-6
    spread = [np.std(np.diff(found(evenness=weight, detail=-99.0))) for weight in (0.0, 0.5, 1.0)]
    assert spread[0] > spread[1] > spread[2] and spread[2] < 5.1, "the teacher's own gap is 10"
    decided = [found(decisions=weight, evenness=0.0, detail=-99.0) for weight in (0.0, 1.0)]
    exponent = timesteps.DEFAULTS.exponent
    objectives = [timesteps.pair_costs(given, exponent, against_teacher=True), timesteps.pair_costs(given, 1.0)]
    places = [[int(np.abs(given.timesteps - value).argmin()) for value in values] for values in decided]
    assert timesteps.path_cost(objectives[0], places[1]) <= timesteps.path_cost(objectives[0], places[0])
    assert timesteps.path_cost(objectives[1], places[0]) <= timesteps.path_cost(objectives[1], places[1])


def test_decisions_give_way_until_no_detail_is_lost():
    levels = DenoiserLog(EulerAncestralDiscreteScheduler()).levels
    times = np.linspace(999, 0, 100)
    sigmas = np.array([levels.sigma(time) for time in times])
    # Two Gaussian bands, one coarse and one fine.
    remaining = 1 / (sigmas**-2.0 + 1 / np.array([[9.0], [0.05]]))
    distances = np.abs(remaining[:, :, None] - remaining[:, None])
    given = timesteps.Statistics(times, sigmas, distances, np.array([0.2, 0.8]))
    for points in (20, 50):
        gained = []
        for least in (-99.0, 0.1):
            objective = timesteps.Objective(given, timesteps.Parameters(decisions=1.0, detail=least))
            gained.append(objective.detail_gained(objective.best(points)))
        assert gained[0] < 0.1 <= gained[1]


def test_without_a_correction_lists_are_what_they_were():
    """Places on the teacher's grid, from before a search knew of corrections."""
    even = [0, 3, *range(5, 40, 2)]
    before = {(0, 8): [0, 6, 12, 18, 23, 29, 34, 39], (1, 8): [0, 6, 11, 16, 22, 27, 33, 39],
              (0, 20): even, (1, 20): even}  # fmt: skip
    for (seed, points), places in before.items():
        given = statistics(40, seed)
        assert timesteps.wdp(given, [points])[points].tolist() == given.timesteps[places].tolist()


@pytest.mark.parametrize("against_teacher", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_with_a_correction_an_interval_costs_what_is_left(strength, against_teacher):
    """The predictions themselves, a plain loop over every interval and every step in it."""
    generator, size = np.random.default_rng(0), 9
    rows, sigmas = generator.normal(size=(size, 50)).cumsum(0), np.geomspace(30, 0.1, size)
    distances = ((rows[:, None] - rows[None]) ** 2).mean(-1)[None]
    given = timesteps.Statistics(np.linspace(999, 0, size), sigmas, distances, np.ones(1))
    found = timesteps.pair_costs(given, 1.5, against_teacher, strength)
    variances = (timesteps.undecided_variances if against_teacher else timesteps.remaining_variances)(given)[0]

    def left(i, j, k):
        share = strength * math.log(sigmas[i] / sigmas[k]) / math.log(sigmas[i] / sigmas[j])
        return ((rows[k] - (1 - share) * rows[i] - share * rows[j]) ** 2).mean()

    for i, j in itertools.combinations(range(size), 2):
        cost = 0.0
        for k in range(i, j):
            missed = left(i, j, k) if against_teacher else (left(i, j, k) + left(i, j, k + 1)) / 2
            weight = ((variances[k] + variances[k + 1]) / 2) ** 1.5
            cost += weight * (sigmas[k + 1] ** -2.0 - sigmas[k] ** -2.0) * missed
        assert found[i, j] == pytest.approx(cost, rel=1e-9)
    assert np.isinf(found[np.tril_indices(size)]).all()


def test_a_search_with_a_correction_says_so_and_refuses_what_cannot_be_corrected(tmp_path):
    pipeline, output = Pipeline(), tmp_path / "s.txt"
    session = session_of(output, pipeline, target_steps=(6,), correction=Correction(1.0, 0.5))
    runner = RestepRunner(session)
    session.calls.append(call_of(pipeline, num_inference_steps=20))
    runner.record(session.calls[-1])
    runner.search()
    assert formats.read_file(str(output) + ".report.json")["parameters"]["corrector"] == 0.5
    with pytest.raises(SearchError, match="HeunDiscreteScheduler cannot skip or correct steps"):
        RestepRunner(session).record(call_of(Pipeline(HeunDiscreteScheduler()), num_inference_steps=20))


def test_all_of_the_teachers_steps_is_a_list_too():
    given = statistics(12)
    assert timesteps.wdp(given, [12])[12] == pytest.approx(given.timesteps)


# The log ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDIMScheduler, HeunDiscreteScheduler])
def test_logged_prediction_is_the_exact_denoiser(scheduler):
    made = scheduler() if scheduler is not HeunDiscreteScheduler else scheduler(beta_start=1e-4, beta_end=0.02)
    pipeline, seen = Pipeline(made), []
    log = DenoiserLog(made)

    class Watch(Interceptor):
        def step(self, proceed, call):
            sigma = log.levels.sigma(call.timestep)
            x = call.sample * log.levels.scale(sigma)
            denoised = log.levels.denoised(call.model_output, sigma, call.sample)
            seen.append((denoised - x / (1 + sigma**2)).abs().max() / x.abs().max())
            return proceed(call)

    torch.manual_seed(0)
    with Generation(pipeline, interceptors=[Watch(), log]):
        pipeline(num_inference_steps=12)
    log.end_generation()
    assert max(seen) < 1e-3
    found = log.statistics()
    assert len(found.timesteps) == 12 and (np.diff(found.timesteps) < 0).all()
    assert found.shares.sum() == pytest.approx(1)


def test_subsampled_distances_are_those_of_all_entries():
    torch.manual_seed(0)
    full, part = (DenoiserLog(EulerAncestralDiscreteScheduler(), entries=entries) for entries in (10**6, 1500))
    latents = torch.randn(1, 4, 3, 32, 32).cumsum(-1)
    for time in (900.0, 500.0, 100.0):
        output = torch.randn_like(latents)
        for log in (full, part):
            log.observe(output, torch.tensor(time), latents)
    for log in (full, part):
        log.end_generation()
    one, two = (log.statistics() for log in (full, part))
    assert part._coefficients.chosen.numel() <= 1500 and full._coefficients.chosen.numel() == latents.numel()
    assert two.shares @ two.distances[:, 0, 2] == pytest.approx(one.shares @ one.distances[:, 0, 2], rel=0.2)
    # Rings of an orthonormal transform: nothing is lost in all entries together.
    assert cosine_matrix(7) @ cosine_matrix(7).T == pytest.approx(torch.eye(7).numpy(), abs=1e-5)


# The search in a script ---------------------------------------------------------------------------------------------


def session_of(output, pipeline, **chosen):
    given = settings.Settings(search="restep", timesteps_output=str(output), **chosen)
    return SimpleNamespace(settings=given, team=Team(), calls=[], deliver=lambda path, content, write: write())


def test_search_costs_no_extra_forward_and_writes_every_list(tmp_path):
    pipeline, output = Pipeline(), tmp_path / "searched_schedule.txt"
    session = session_of(output, pipeline, target_steps=(10, 6))
    runner = RestepRunner(session)
    for _ in range(2):
        session.calls.append(call_of(pipeline, num_inference_steps=20))
        torch.manual_seed(3)
        observed = runner.record(session.calls[-1])
        torch.manual_seed(3)
        before = pipeline.transformer.calls
        assert torch.equal(observed, pipeline(num_inference_steps=20))
        pipeline.transformer.calls = before
    found = runner.search()
    assert pipeline.transformer.calls == 2 * 20
    for path, count in zip(paths_of(str(output), (10, 6)), (10, 6)):
        assert len(formats.read_timesteps(path)) == count
    assert found["timesteps"] == pytest.approx(formats.read_timesteps(str(output)))
    report = formats.read_file(str(output) + ".report.json")
    assert report["forwards"] == {"script": 40, "search": 0, "extra": 0}
    assert report["fingerprint"]["steps"] == 10 and report["fingerprint"]["timesteps"]
    assert report["decisions_curve"]["10"] <= report["decisions_curve_even"]["10"]
    assert report["cost_curve_even"]["10"] > report["cost_curve_even"]["20"] > 0 == report["decisions_curve"]["20"]
    assert {figure.name for figure in restep_plots.figures(report)} == {"timesteps", "costs", "gaps"}
    assert all(gap <= 1 for gap in restep_plots.predicted_gaps(report, "cost_curve").values())


def test_more_steps_than_the_script_has_is_an_error_before_any_forward(tmp_path):
    pipeline = Pipeline()
    runner = RestepRunner(session_of(tmp_path / "s.txt", pipeline, target_steps=(20,)))
    with pytest.raises(SearchError, match="asks for 20 steps, but the script samples 20"):
        runner.record(call_of(pipeline, num_inference_steps=20))
    assert pipeline.transformer.calls == 0


def test_calibration_videos_stay_within_the_budget(tmp_path):
    write_videos(tmp_path)
    pipeline = Pipeline()
    session = session_of(tmp_path / "s.txt", pipeline, target_steps=(8,), calibration_videos=str(tmp_path))
    runner = RestepRunner(session)
    session.calls.append(call_of(pipeline, num_inference_steps=16))
    torch.manual_seed(5)
    plain = pipeline(num_inference_steps=16)
    torch.manual_seed(5)
    session.calls[-1] = call_of(pipeline, num_inference_steps=16)
    pipeline.transformer.calls = 0
    assert torch.equal(runner.record(session.calls[-1]), plain)
    assert pipeline.transformer.calls == 5 * 4 * 16 + 16
    assert len(runner.search()["timesteps"]) == 8
    assert [calibration.number_of_paths(5, 100), calibration.number_of_paths(20, 100)] == [4, 1]
    with pytest.raises(SearchError, match="more than 2000 evaluations"):
        calibration.number_of_paths(20, 101)


def test_noised_points_have_the_right_spread(tmp_path):
    write_videos(tmp_path)
    pipeline, seen = Pipeline(), []
    log = DenoiserLog(pipeline.scheduler)
    log.observe = lambda output, time, sample: seen.append((log.levels.sigma(time), sample))
    log.end_generation = lambda: None
    call = call_of(pipeline, num_inference_steps=16)
    videos = calibration.Videos(str(tmp_path), call.arguments)
    torch.manual_seed(0)
    calibration.evaluate(call, videos, log, Team())
    clean = videos.encoded(videos.paths[0], pipeline.vae)
    for sigma, sample in seen[:16]:
        assert float((sample - clean).std()) == pytest.approx(sigma, rel=0.15)


# Calibration files that cannot be used ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(b""), "2.mp4: cannot be read: the file is empty"),
        (lambda path: path.write_bytes(b"no video at all" * 50), "2.mp4: cannot be read as a video"),
        (lambda path: path.unlink(), "found 4 mp4 files, but 5 to 20 are needed"),
    ],
)
def test_unusable_file_is_named_before_any_model_work(tmp_path, spoil, message):
    write_videos(tmp_path)
    spoil(tmp_path / "2.mp4")
    pipeline = Pipeline()
    runner = RestepRunner(session_of(tmp_path / "s.txt", pipeline, target_steps=(8,), calibration_videos=str(tmp_path)))
    with pytest.raises(SearchError, match=message):
        runner.record(call_of(pipeline, num_inference_steps=16))
    assert pipeline.transformer.calls == 0


def test_short_and_wrongly_sized_videos_are_named(tmp_path):
    write_videos(tmp_path)
    with pytest.raises(SearchError, match=r"0.mp4: has 3 frames, but the run makes 9"):
        calibration.Videos(str(tmp_path), {"num_frames": 9, "height": SIZE, "width": SIZE})
    with pytest.raises(SearchError, match=r"0.mp4: is 32 x 32 \(height x width\), but the run makes 64 x 32"):
        calibration.Videos(str(tmp_path), {"num_frames": 3, "height": 64, "width": SIZE})
    with pytest.raises(SearchError, match="is no directory of mp4 files: No such file"):
        calibration.find_videos(str(tmp_path / "none"))


# msModelSlim's API --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", timesteps.METHODS)
def test_adaptor_returns_and_writes_an_ascending_list(tmp_path, method):
    write_videos(tmp_path)
    config = ReStepSearchConfig(str(tmp_path), str(tmp_path / "out"), num_sampling_steps=8)
    found = ReStepAdaptor(Pipeline(), config, method=method).search()
    assert len(found) == 8 and sorted(found) == found and 0 <= found[0] and found[-1] <= 1
    assert formats.read_file(str(tmp_path / "out" / "searched_schedule.txt")) == pytest.approx(found)


def test_adaptor_returns_and_logs_a_list_that_cannot_be_written(tmp_path, caplog):
    write_videos(tmp_path)
    (tmp_path / "out").write_text("")
    config = ReStepSearchConfig(str(tmp_path), str(tmp_path / "out"), num_sampling_steps=8)
    found = ReStepAdaptor(Pipeline(), config, method="arctan").search()
    (line,) = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert [time / 1000 for time in reversed(json.loads(line.split("found: ")[1]))] == pytest.approx(found)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"videos_path": None}, "config.videos_path must be an existing directory"),
        ({"save_dir": None}, "config.save_dir must be a directory"),
        ({"num_sampling_steps": 0}, "config.num_sampling_steps must be an integer and >= 1"),
        ({"num_sampling_steps": 5.0}, "config.num_sampling_steps must be an integer and >= 1"),
        ({"neighbour_type": "near"}, "config.neighbour_type must be either 'uniform' or 'random'"),
        ({"monte_carlo_iters": 6}, "config.monte_carlo_iters must be an integer greater than 0"),
    ],
)
def test_adaptor_checks_its_arguments(tmp_path, changed, message):
    for number in range(5):
        (tmp_path / f"{number}.mp4").touch()
    arguments = {"videos_path": str(tmp_path), "save_dir": str(tmp_path), **changed}
    with pytest.raises(ValueError, match=message):
        ReStepAdaptor(Pipeline(), ReStepSearchConfig(**arguments))


def test_adaptor_checks_pipeline_config_and_videos(tmp_path):
    with pytest.raises(ValueError, match="pipeline must be OpenSoraPipeline"):
        ReStepAdaptor(None, ReStepSearchConfig())
    with pytest.raises(ValueError, match="config must be ReStepSearchConfig"):
        ReStepAdaptor(Pipeline(), {})
    with pytest.raises(ValueError, match="videos_path must contain between 5 and 20 .mp4 videos"):
        ReStepAdaptor(Pipeline(), ReStepSearchConfig(str(tmp_path), str(tmp_path)))


# Two ranks ----------------------------------------------------------------------------------------------------------


def _rank(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    log = DenoiserLog(EulerAncestralDiscreteScheduler())
    torch.save(_logged(log, [rank]).statistics(Team(torch.distributed.group.WORLD))._asdict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _logged(log, halves):
    """A generation of which each rank sees one half of the frames."""
    for time in (900.0, 500.0, 100.0):
        both = [torch.randn(1, 2, 2, 8, 8, generator=torch.Generator().manual_seed(int(time) + h)) for h in (0, 1)]
        shard = torch.cat([both[half] for half in halves], dim=2)
        log.observe(shard, torch.tensor(time), shard)
    log.end_generation()
    return log


def _calibrating_rank(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    pipeline, seen = Pipeline(frames=2), []
    log, team = DenoiserLog(pipeline.scheduler), Team(torch.distributed.group.WORLD)
    observe = log.observe
    log.observe = lambda *given: (seen.append(given[2]), observe(*given))
    call = call_of(pipeline, num_inference_steps=8, num_frames=4)
    videos = calibration.Videos(folder, {"num_frames": 4, "height": SIZE, "width": SIZE})
    torch.manual_seed(rank)
    evaluations = calibration.evaluate(call, videos, log, team)
    whole = videos.encoded(videos.paths[-1], pipeline.vae)
    found = {"distances": log.statistics(team).distances, "last": seen[-1], "whole": whole, "evaluations": evaluations}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_calibrate_on_their_own_frames_of_each_video(tmp_path):
    write_videos(tmp_path, frames=4)
    port = 29500 + torch.randint(0, 2000, ()).item()
    multiprocessing.start_processes(_calibrating_rank, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(str(tmp_path / f"{rank}.pt"), weights_only=False) for rank in (0, 1)]
    assert np.array_equal(ranks[0]["distances"], ranks[1]["distances"])
    for rank, found in enumerate(ranks):
        assert found["evaluations"] == 5 * 4 * 8
        # The last point has the noise s(0) = 0.01.
        mine = found["whole"][:, :, 2 * rank : 2 * rank + 2]
        assert float((found["last"] - mine).std()) == pytest.approx(0.01, rel=0.2)


def test_two_ranks_have_the_costs_of_the_whole_video(tmp_path):
    port = 29500 + torch.randint(0, 2000, ()).item()
    # Forked: importing everything again in each rank takes longer than all other tests together.
    multiprocessing.start_processes(_rank, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(str(tmp_path / f"{rank}.pt"), weights_only=False) for rank in (0, 1)]
    assert np.array_equal(ranks[0]["distances"], ranks[1]["distances"])
    whole = _logged(DenoiserLog(EulerAncestralDiscreteScheduler()), [0, 1]).statistics()
    assert ranks[0]["distances"] == pytest.approx(whole.distances, rel=1e-4)


# The two files of OSACCEL_SEARCH=all --------------------------------------------------------------------------------


def test_lists_and_caches_of_two_searches_are_not_mixed(tmp_path):
    schedule = str(tmp_path / "schedule.txt")
    common = {"OSACCEL_TIMESTEPS": schedule, "OSACCEL_TARGET_STEPS": "6"}
    finish(start(tmp_path, OSACCEL_SEARCH="all", **common))
    assert len(formats.read_timesteps(schedule)) == 6
    reports = [formats.read_file(path + ".report.json") for path in (schedule, str(tmp_path / "found.json"))]
    assert reports[0]["fingerprint"]["timesteps"] == reports[1]["fingerprint"]["timesteps"]
    assert "when it was searched" not in finish(start(tmp_path, prompts=1, OSACCEL_SEARCH="0", **common))
    # As many steps, elsewhere.
    formats.write_timesteps(schedule, [999.0, 800.0, 600.0, 400.0, 200.0, 0.0])
    assert "timesteps was" in finish(start(tmp_path, prompts=1, OSACCEL_SEARCH="0", **common))
    refused = finish(start(tmp_path, prompts=1, OSACCEL_SEARCH="0", OSACCEL_STRICT="1", **common), status=1)
    assert "timesteps was" in refused and "OSACCEL_STRICT refuses it" in refused


# The benchmark's measures -------------------------------------------------------------------------------------------


def test_measures_see_what_they_should_and_nothing_else():
    pytest.importorskip("benchmarks.lib.measures")
    from benchmarks.lib import measures

    generator = torch.Generator().manual_seed(0)
    means = 5 * torch.randn(16, 1, 2, 2, 4, 4, generator=generator)

    def draw(each, scale=1.0):
        return (means + scale * torch.randn(16, each, 2, 2, 4, 4, generator=generator)).flatten(0, 1)

    teacher, data = draw(4), [draw(12), draw(4)]
    results = {"plain 100": teacher, "plain 50": teacher * 0.9, "wdp 50": teacher * 0.95}
    report = measures.compare(results, data, [50], groups=16, draws=100)
    arms = report["arms"]
    for measure in ("energy distance", "mmd"):
        for same in (arms["plain 100"][measure], report["floor"][measure]):
            assert same[1] < 0 < same[2], "no difference between samples of the same prompts"
        assert arms["plain 50"][measure][0] > arms["wdp 50"][measure][0]
        assert report["against plain"]["wdp 50"][measure][2] < 0
    assert report["gap closed"]["wdp 50"]["coupled error"][0] == pytest.approx(0.5)
    assert arms["plain 50"]["high band"][0] == pytest.approx(0.9 * arms["plain 100"]["high band"][0])
    alike = [torch.randn(count, 2, 2, 4, 4, generator=generator) for count in (64, 192, 64)]
    results["plain 100"], results["plain 50"], results["wdp 50"] = alike[0], 0.6 * alike[0], 0.8 * alike[0]
    pooled = measures.compare(results, alike[1:], [50], draws=100)
    distances = [pooled["arms"][name]["energy distance"][0] for name in ("plain 100", "wdp 50", "plain 50")]
    assert distances == sorted(distances) and distances[2] > 0.3 > abs(pooled["floor"]["energy distance"][0])
    assert pooled["arms"]["plain 50"]["mmd"][1] > 0
    with pytest.raises(ValueError, match="192 videos are not 15 groups"):
        measures.compare(results, data, [50], groups=15)
