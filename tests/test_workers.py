# SPDX-License-Identifier: Apache-2.0
"""Ranks that split prompts and meet in files alone, as srun and mpirun start them: shared work, and what deaths do."""

import json
import os
import signal
import time
import traceback

import pytest
import tiny
from test_journal import ended, in_child
from test_search_session import search

from osaccel.search import presence, workers
from osaccel.search.measure import Measure


class SlowPipeline(tiny.UnseededPipeline):
    """Slow enough for the ranks to meet."""

    def predict(self, *args):
        time.sleep(0.02)
        return super().predict(*args)


def start(folder, rank, stuck=False, elsewhere=False):
    """A rank of two, in a process of its own; `stuck` in its first evaluation, or on a machine of its own."""

    def run():
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        presence.BEAT, workers.JOIN_SECONDS, workers.CHECK_SECONDS = 0.05, 20.0, 0.1
        if elsewhere:
            presence.LIMIT = 1.0
            presence._machine = lambda: f"machine {rank}"
        if stuck:
            Measure.__call__ = lambda *_: (folder / f"stuck-{rank}").touch() or time.sleep(60)
        try:
            search(folder, SlowPipeline())
        except BaseException:
            (folder / f"log-{rank}").write_text(traceback.format_exc())
            raise

    return in_child(run)


def kill_when_stuck(folder, rank, pid):
    until = time.time() + 30
    while not (folder / f"stuck-{rank}").exists():
        assert time.time() < until, [path.read_text() for path in folder.glob("log-*")]
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    ended(pid)


def evaluations(folder):
    report = json.loads((folder / "found.json.report.json").read_text())
    assert not (folder / "found.json.search").exists() and not (folder / "found.json.search.lock").exists()
    return {json.dumps(e["config"]): (e["error"], e["worker"]) for e in report["evaluations"] if e["error"]}


def test_ranks_that_meet_in_files_alone_find_what_one_measures(tmp_path):
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    search(tmp_path / "alone")
    ranks = [start(tmp_path / "together", rank) for rank in (0, 1)]
    assert [ended(pid) for pid in ranks] == [0, 0]
    alone, together = evaluations(tmp_path / "alone"), evaluations(tmp_path / "together")
    assert {worker for _, worker in together.values()} == {0, 1}
    shared = set(alone) & set(together)
    assert len(shared) > 2 and all(alone[key][0] == together[key][0] for key in shared), "with rank 0's noise"


@pytest.mark.parametrize("elsewhere", (False, True), ids=("this machine", "another machine"))
def test_what_a_dead_helper_claimed_is_done_by_rank_0(tmp_path, elsewhere):
    leader = start(tmp_path, 0, elsewhere=elsewhere)
    helper = start(tmp_path, 1, stuck=True, elsewhere=elsewhere)
    kill_when_stuck(tmp_path, 1, helper)
    begun = time.time()
    assert ended(leader) == 0, (tmp_path / "log-0").read_text()
    assert time.time() - begun < 30
    assert {worker for _, worker in evaluations(tmp_path).values()} == {0}


@pytest.mark.parametrize("elsewhere", (False, True), ids=("this machine", "another machine"))
def test_helpers_of_a_dead_rank_0_end_with_a_message(tmp_path, elsewhere):
    leader = start(tmp_path, 0, stuck=True, elsewhere=elsewhere)
    helper = start(tmp_path, 1, elsewhere=elsewhere)
    kill_when_stuck(tmp_path, 0, leader)
    begun = time.time()
    assert ended(helper) != 0 and time.time() - begun < 30
    log = (tmp_path / "log-1").read_text()
    assert f"Rank 0 has ended without a result: process {leader} on" in log and "goes on where it stopped" in log
    again = start(tmp_path, 0, elsewhere=elsewhere)
    assert ended(again) == 0, (tmp_path / "log-0").read_text()


def test_helpers_learn_why_rank_0_found_nothing(tmp_path):
    def fail(rank):
        def run():
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            presence.BEAT = 0.05
            try:
                search(tmp_path, SlowPipeline(), min_psnr=190.0)
            except BaseException:
                (tmp_path / f"log-{rank}").write_text(traceback.format_exc())
                raise

        return in_child(run)

    ranks = [fail(0), fail(1)]
    assert all(ended(pid) for pid in ranks)
    for rank in (0, 1):
        assert "keeps a PSNR of 190 dB; the best one has" in (tmp_path / f"log-{rank}").read_text()
