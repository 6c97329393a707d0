# SPDX-License-Identifier: Apache-2.0
"""Sequence-parallel ranks with different settings, under real torchrun with gloo: alike or one error, never a hang."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from osaccel import settings
from osaccel.formats import SettingsError
from osaccel.hooks import agreement

HERE = os.path.dirname(os.path.abspath(__file__))
GOOD = {"cache_block_start": 1, "cache_num_blocks": 4, "cache_step_start": 1, "cache_step_interval": 2}
# Two calls of 6 blocks at 6 steps; the cache reuses 4 blocks at steps 2 and 4.
PLAIN, CACHED = 2 * 6 * 6, 2 * (6 * 6 - 2 * 4)


@pytest.fixture
def cache_file(tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(GOOD))
    return str(path)


def torchrun(plan, limit=90, **environ):
    """Status, output and seconds of two ranks; fails when they hang."""
    path = os.pathsep.join([os.path.dirname(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = time.monotonic()
    result = subprocess.run(
        [*command, os.path.join(HERE, "ranks_script.py"), json.dumps(plan)],
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, **environ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit,
    )  # fmt: skip
    return result.returncode, result.stdout, time.monotonic() - started


def sampled(output):
    return sorted(re.findall(r"rank \d sampled (\S+), blocks (\d+)", output))


def alike(plan, blocks, **environ):
    status, output, _ = torchrun(plan, **environ)
    found = sampled(output)
    assert status == 0 and len(found) == 2 and found[0] == found[1], output[-3000:]
    assert found[0][1] == str(blocks)
    return output


def refused(plan, expected, ranks=2, **environ):
    status, output, seconds = torchrun(plan, **environ)
    assert status != 0 and not sampled(output), output[-3000:]
    errors = [line for line in output.splitlines() if "SettingsError: " in line]
    messages = {line.split("SettingsError: ", 1)[1] for line in errors}
    assert len(messages) == 1 and len(errors) == ranks, output[-3000:]
    assert expected in messages.pop()
    return seconds


def test_ranks_with_the_same_settings_sample(cache_file):
    alike({}, CACHED, OSACCEL_CACHE_CONFIG=cache_file)


def test_ranks_that_ask_for_nothing_sample_plainly():
    output = alike({}, PLAIN)
    assert "osaccel" not in output


@pytest.mark.parametrize("without", ["0", "1"])
def test_a_rank_without_variables_takes_the_settings_of_the_other(cache_file, without):
    output = alike({without: {"environ": {"OSACCEL_CACHE_CONFIG": None}}}, CACHED, OSACCEL_CACHE_CONFIG=cache_file)
    assert output.count(f"rank {without} has no osaccel settings and takes those of rank {1 - int(without)}") == 1


def test_other_contents_are_refused_on_both_ranks(cache_file, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(dict(GOOD, cache_num_blocks=0)))
    plan = {"1": {"environ": {"OSACCEL_CACHE_CONFIG": str(tmp_path / "other.json")}}}
    refused(plan, "different osaccel settings: cache: rank 0 has {", OSACCEL_CACHE_CONFIG=cache_file)


def test_what_is_wrong_on_one_rank_ends_both_with_its_message(cache_file):
    plan = {"1": {"environ": {"OSACCEL_CACHE_CONFIG": "no/such.json"}}}
    message = "Rank 1 of the sequence-parallel group cannot sample: no/such.json: cannot be read"
    assert refused(plan, message, OSACCEL_CACHE_CONFIG=cache_file) < 60


@pytest.mark.parametrize("absent", [{"active": False}, {"environ": {"OSACCEL_DISABLE": "1"}}])
def test_a_rank_in_which_osaccel_is_not_active_is_given_up_after_the_limit(cache_file, absent):
    """It waits in the model; the other says why and ends, and torchrun ends both."""
    refused({"1": absent, "limit": 2}, "Rank 1 of the sequence-parallel group did not compare its settings within 2 s",
            ranks=1, OSACCEL_CACHE_CONFIG=cache_file)  # fmt: skip


def test_where_nothing_is_asked_an_inactive_rank_stops_nothing():
    alike({"1": {"active": False}, "limit": 2}, PLAIN)


def test_a_rank_that_is_late_but_active_is_waited_for(cache_file):
    output = alike({"1": {"sleep": 8}, "limit": 2}, CACHED, OSACCEL_CACHE_CONFIG=cache_file)
    assert "waiting for rank 1 at its first pipeline call" in output


def decided(*environs):
    """What each rank samples with, or the one message with which all end."""
    said = {rank: settings.load(environ) for rank, environ in enumerate(environs)}
    outcomes = []
    for rank in said:
        try:
            outcomes.append(agreement.what_matters(agreement.decide(said, list(said), rank)))
        except SettingsError as error:
            outcomes.append(str(error))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]


def test_ranks_that_would_sample_alike_are_the_same(cache_file, tmp_path):
    path = tmp_path / "elsewhere.yaml"
    path.write_text("log: DEBUG\ncache:\n" + "\n".join(f"  {key}: {value}" for key, value in GOOD.items()))
    first = {"OSACCEL_CACHE_CONFIG": cache_file}
    for other in (
        {"OSACCEL_CONFIG": str(path)},
        {"OSACCEL_LOG": "ERROR"},
        {"OSACCEL_STRICT": "1"},
        {"OSACCEL_CACHE_RATIO": "1.7", **first},
        {"OSACCEL_SEARCH": "0", **first},
    ):
        assert decided(first, other)["cache"] == GOOD
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps(dict(GOOD, cache_num_blocks=0)))
    assert decided({"OSACCEL_CACHE_CONFIG": str(zero)}, {})["cache"] is None


def test_ranks_that_would_not_are_refused_with_what_differs(cache_file, tmp_path):
    first = {"OSACCEL_CACHE_CONFIG": cache_file}
    (tmp_path / "schedule.txt").write_text("[0.1, 0.9]")
    other = {"OSACCEL_TIMESTEPS": str(tmp_path / "schedule.txt"), **first}
    assert "timesteps: rank 0 has None, rank 1 has (900.0, 100.0)." in decided(first, other)
    searching = {"OSACCEL_SEARCH": "1", **first}
    assert "search: rank 0 has None, rank 1 has 'dit_cache'" in decided(first, searching)
    assert "cache_ratio: rank 0 has 1.3, rank 1 has 1.5." in decided(
        searching, {"OSACCEL_CACHE_RATIO": "1.5", **searching}
    )


def test_strict_on_one_rank_is_strict_on_all(cache_file):
    said = {0: settings.load({"OSACCEL_CACHE_CONFIG": cache_file}), 1: settings.load({"OSACCEL_STRICT": "1"})}
    assert all(agreement.decide(said, [0, 1], rank).strict for rank in said)


def test_a_process_group_without_a_store_is_not_compared_and_says_so(cache_file, caplog):
    own = settings.load({"OSACCEL_CACHE_CONFIG": cache_file})
    assert agreement._exchange(None, own, [0, 1], 1) == own and "are not compared" in caplog.text


def test_the_limit_is_a_minute():
    assert agreement.LIMIT == 60
