# SPDX-License-Identifier: Apache-2.0
"""OSACCEL_SEARCH in whole processes: exit status, files, SIGKILL and resume, fingerprints, two ranks of both kinds."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "search_script.py")
KEYS = ["cache_step_start", "cache_step_interval", "cache_block_start", "cache_num_blocks"]


def start(tmp_path, mode="one", prompts=3, steps=10, slow=0.0, ranks=1, **environ):
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    path = os.pathsep.join([os.path.dirname(HERE), os.environ.get("PYTHONPATH", "")])
    full = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, OSACCEL_SEARCH="1")
    output = "OSACCEL_PLAN" if environ.get("OSACCEL_SEARCH") == "plan" else "OSACCEL_CACHE_CONFIG"
    full.update({output: str(tmp_path / "found.json")}, **environ)
    return subprocess.Popen(
        [*command, SCRIPT, mode, str(prompts), str(steps), str(slow)],
        env=full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process, status=0):
    log, _ = process.communicate(timeout=100)
    assert process.returncode == status, log[-3000:]
    return log


def report(tmp_path):
    return json.loads((tmp_path / "found.json.report.json").read_text())


def finished_lines(tmp_path):
    path = tmp_path / "found.json.search" / "evaluations-0.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_after(process, tmp_path, evaluations, ranks=()):
    """SIGKILL the process group, or some ranks (torchrun gives its ranks groups of their own and ends the others)."""
    until = time.time() + 90
    while finished_lines(tmp_path) < evaluations:
        assert time.time() < until and process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    if not ranks:
        os.killpg(process.pid, signal.SIGKILL)
    for rank in ranks:
        os.kill(int((tmp_path / f"rank-{rank}.pid").read_text()), signal.SIGKILL)
    process.communicate()


def test_the_script_ends_after_the_search_with_both_files_and_status_0(tmp_path):
    log = finish(start(tmp_path))
    config = json.loads((tmp_path / "found.json").read_text())
    assert list(config) == KEYS and all(isinstance(value, int) for value in config.values())
    assert "reached its end" not in log and "found {" in log
    found = report(tmp_path)
    assert found["chosen"] == config and found["speed_up"] >= 1.3
    assert found["cost"]["plain_generations"] <= 6
    assert found["fingerprint"]["steps"] == 10 and found["fingerprint"]["blocks"] == 6
    assert not (tmp_path / "found.json.search").exists()


def test_then_continue_samples_on_with_what_was_found(tmp_path):
    log = finish(start(tmp_path, OSACCEL_SEARCH_THEN="continue", OSACCEL_SEARCH_PROMPTS="2"))
    assert "rank 0 sampled 2" in log and "reached its end" in log
    assert log.count("generation: 10 steps") == 1, "two calls were calibration, one ran with the cache"


def test_too_few_calls_are_an_error(tmp_path):
    log = finish(start(tmp_path, prompts=2, OSACCEL_SEARCH_PROMPTS="3"), status=1)
    assert "ended after 2 pipeline calls, OSACCEL_SEARCH_PROMPTS asks for 3" in log


def test_an_unreachable_ratio_stops_before_the_first_generation(tmp_path):
    log = finish(start(tmp_path, steps=1), status=1)
    assert "SearchError" in log and "is reachable" in log and "sampled" not in log


def test_a_killed_search_resumes_without_repeating_anything(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(start(whole))
    kill_after(start(tmp_path, slow=0.01), tmp_path, 2)
    done = finished_lines(tmp_path)
    log = finish(start(tmp_path))
    assert f"resuming: {done} evaluations are finished" in log
    assert "call 1 was recorded before" in log
    again = report(tmp_path)
    configs = [json.dumps(e["config"]) for e in again["evaluations"]]
    assert len(configs) == len(set(configs))
    assert again["chosen"] == report(whole)["chosen"]
    assert [e["error"] for e in again["evaluations"]] == [e["error"] for e in report(whole)["evaluations"]]


@pytest.mark.parametrize("change", ({"PROMPT": "other"}, {"steps": 12}))
def test_another_prompt_or_step_count_starts_anew_and_says_so(tmp_path, change):
    kill_after(start(tmp_path, slow=0.01), tmp_path, 1)
    log = finish(start(tmp_path, **change))
    assert "starting anew" in log and "resuming" not in log


def test_sequence_parallel_ranks_decide_as_one_and_all_end(tmp_path):
    log = finish(start(tmp_path, mode="sp", ranks=2))
    assert log.count("found {") == 1 and report(tmp_path)["fingerprint"]["ranks"] == 2


def test_sequence_parallel_ranks_search_timesteps_and_then_the_cache(tmp_path):
    environ = {"OSACCEL_SEARCH": "all", "OSACCEL_TARGET_STEPS": "8", "OSACCEL_TIMESTEPS": str(tmp_path / "list.txt")}
    log = finish(start(tmp_path, mode="sp", ranks=2, steps=16, **environ))
    assert log.count("found {") == 1 and report(tmp_path)["fingerprint"]["steps"] == 8
    assert not list(tmp_path.glob("found.json.search*"))


def test_a_helper_follows_the_list_that_rank_0_found(tmp_path):
    environ = {"OSACCEL_SEARCH": "all", "OSACCEL_TARGET_STEPS": "8", "OSACCEL_TIMESTEPS": str(tmp_path / "list.txt")}
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    finish(start(alone, mode="dp", steps=16, **environ))
    finish(start(together, mode="dp", steps=16, ranks=2, slow=0.05, **environ))
    errors = [
        {json.dumps(e["config"]): e["error"] for e in report(folder)["evaluations"]} for folder in (alone, together)
    ]
    assert {e["worker"] for e in report(together)["evaluations"]} == {0, 1}
    shared = [config for config in errors[0] if errors[0][config] and errors[1].get(config)]
    assert shared and all(errors[0][config] == errors[1][config] for config in shared)


def test_sequence_parallel_ranks_go_on_with_the_same_config(tmp_path):
    log = finish(start(tmp_path, mode="sp", ranks=2, prompts=2, OSACCEL_SEARCH_THEN="continue"))
    ends = [line.split("after")[1] for line in log.splitlines() if "reached its end" in line]
    assert len(ends) == 2 and ends[0] == ends[1]
    assert log.count("generation: 10 steps") == 1


@pytest.mark.parametrize("ranks", ((1,), (0, 1)), ids=("one rank", "all ranks"))
def test_a_killed_sequence_parallel_search_resumes_without_repeating_anything(tmp_path, ranks):
    kill_after(start(tmp_path, mode="sp", ranks=2, slow=0.03, PID_DIR=str(tmp_path)), tmp_path, 1, ranks)
    done = finished_lines(tmp_path)
    assert f"resuming: {done} evaluations are finished" in finish(start(tmp_path, mode="sp", ranks=2))
    configs = [json.dumps(e["config"]) for e in report(tmp_path)["evaluations"]]
    assert len(configs) == len(set(configs)) > done


def test_ranks_that_split_prompts_share_the_work_whatever_their_number_of_prompts(tmp_path):
    log = finish(start(tmp_path, mode="dp", ranks=2, prompts=3, slow=0.03, OSACCEL_SEARCH_PROMPTS="2"))
    assert log.count("found {") == 1 and "sampled 1" not in log
    found = report(tmp_path)
    assert {evaluation["worker"] for evaluation in found["evaluations"]} == {0, 1}
    assert found["cost"]["plain_generations"] <= 6


def test_ranks_that_split_prompts_probe_the_same_call_and_find_the_plan_of_one_rank(tmp_path):
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        environ = {"OSACCEL_SEARCH": "plan", "OSACCEL_SEARCH_PROMPTS": "3", "OSACCEL_SEARCH_PROBED": "1"}
        finish(start(folder, mode="dp", ranks=ranks, prompts=3 * ranks, steps=20, slow=0.01, **environ))
        found[ranks] = report(folder)
    alone, together = found[1], found[2]
    assert {row["worker"] for row in together["evaluations"]} == {0, 1}
    assert together["plan"] == alone["plan"] and together["error"] == alone["error"]
    for row in together["evaluations"]:
        assert len(row["details"]["errors"]) == len(row.get("calls", range(3)))
    assert any("calls" in row for row in together["evaluations"])


def start_without_torchrun(tmp_path, rank, port, **environ):
    """One of two ranks as srun starts them: nobody ends the one when the other dies."""
    where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start(tmp_path, mode="dp", slow=0.03, PID_DIR=str(tmp_path), **where, **environ)


def test_without_torchrun_a_helper_ends_when_rank_0_dies_and_takes_the_rendezvous_with_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    leader, helper = (start_without_torchrun(tmp_path, rank, port) for rank in (0, 1))
    kill_after(leader, tmp_path, 1)
    begun = time.time()
    log = finish(helper, status=1)
    assert time.time() - begun < 60 and "SearchError: Rank 0" in log
    assert "resuming: " in finish(start(tmp_path))


@pytest.mark.parametrize(
    "environ, difference",
    [
        ({"GUIDANCE": "3"}, "guidance_scale was 7.5 when it was searched, is now 3.0"),
        ({"OTHER_WEIGHTS": "1"}, "the model's weights, or their dtype, are not those that it was searched for"),
    ],
)
def test_a_config_searched_at_another_guidance_or_for_other_weights_is_reported(tmp_path, environ, difference):
    finish(start(tmp_path))
    assert "when it was searched" not in finish(start(tmp_path, prompts=1, OSACCEL_SEARCH="0"))
    assert difference in finish(start(tmp_path, prompts=1, OSACCEL_SEARCH="0", **environ))


def test_strict_refuses_a_config_searched_for_other_steps(tmp_path):
    finish(start(tmp_path))
    environ = {"OSACCEL_SEARCH": "0"}
    warned = finish(start(tmp_path, steps=12, **environ))
    assert "steps was 10 when it was searched, is now 12" in warned
    refused = finish(start(tmp_path, steps=12, OSACCEL_STRICT="1", **environ), status=1)
    assert "OSACCEL_STRICT refuses it" in refused
    os.unlink(tmp_path / "found.json.report.json")
    assert "when it was searched" not in finish(start(tmp_path, steps=12, **environ))
