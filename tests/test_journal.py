# SPDX-License-Identifier: Apache-2.0
"""The search's memory on disk: what it gives back, what damage and a second search do to it, SIGKILL at any moment."""

import errno
import json
import os
import pickle
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from test_search_session import search

from osaccel import formats, settings
from osaccel.search import presence, stored
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation
from osaccel.search.journal import Journal
from osaccel.search.lock import Lock
from osaccel.search.presence import Owner
from osaccel.search.recording.replay import RandomState, Recording
from osaccel.search.session import Session
from osaccel.settings import Settings

KNOWN = {"steps": 20, "model": "a", "resolution": [9, 64, 64]}
# How many moments to kill a search at; a whole run has 40.
MOMENTS = int(os.environ.get("SIGKILL_MOMENTS", "3"))


def evaluation(number):
    return Evaluation({"number": number}, number / 7, number, curves=((None, number / 3),), details={"of": [number]})


def filled(path, count=4):
    """A journal with some evaluations and tensors, let go."""
    journal = Journal(str(path), KNOWN)
    for number in range(count):
        assert journal.add(evaluation(number))
    assert journal.save_tensors("recording", {"x": torch.arange(6.0)}, {"seconds": 1.5})
    journal.close()
    return path


# What is stored


def test_plain_values_and_tensors_come_back_as_they_were(tmp_path):
    shared, generator = torch.randn(3, 4), torch.Generator().manual_seed(3)
    content = {
        "types": [torch.randn(2, 3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)],
        "eight bits": torch.randn(4).to(torch.float8_e4m3fn), "whole": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16), "empty": torch.zeros(0, 3), "strided": shared.t()[::2],
        3: (1, None, "text", float("inf"), -0.0, 10**20, [True, ()]), "array": np.arange(3, dtype=np.uint32),
        "twice": [shared, shared], "device": torch.device("cpu"), "dtype": torch.bfloat16, "number": np.float32(0.1),
    }  # fmt: skip
    stored.write(str(tmp_path / "x.npz"), {**content, "generator": generator, "random": RandomState().to_dict()})
    found = stored.read(str(tmp_path / "x.npz"))
    drawn, again = torch.rand(2, generator=generator), torch.rand(2, generator=found.pop("generator"))
    assert torch.equal(drawn, again)
    state = RandomState()
    wanted = random.random(), np.random.rand(), torch.rand(2)
    state.load(found.pop("random"))
    state.restore()
    assert (random.random(), np.random.rand()) == wanted[:2] and torch.equal(torch.rand(2), wanted[2])
    assert_same(found, content)
    assert found["twice"][0] is found["twice"][1]


def assert_same(left, right):
    assert type(left) is type(right) or isinstance(right, np.generic)
    if isinstance(right, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left.double(), right.double())
    elif isinstance(right, np.ndarray):
        assert left.dtype == right.dtype and (left == right).all()
    elif isinstance(right, dict):
        assert list(left) == list(right)
        for key in right:
            assert_same(left[key], right[key])
    elif isinstance(right, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_same(one, other)
    else:
        assert left == right


def test_a_recording_of_a_transformer_that_returns_an_object_comes_back(tmp_path):
    """Nothing of the object's class is stored, so nothing is imported to read it; what stands for it has its sample."""
    recording, again = Recording(), Recording()
    recording.stand_in = SimpleNamespace(sample=torch.ones(2, dtype=torch.bfloat16))
    recording.latents, recording.forwards = [torch.zeros(3)], 4
    stored.write(str(tmp_path / "x.npz"), recording.content())
    again.load(stored.read(str(tmp_path / "x.npz")))
    output = again.stand_in_on(torch.device("cpu"))
    assert torch.equal(output.sample, recording.stand_in.sample) and output[0] is output["sample"]
    assert again.forwards == 4 and torch.equal(again.latents[0], torch.zeros(3))


def test_what_has_no_plain_form_is_refused_and_the_search_goes_on(tmp_path, caplog):
    with pytest.raises(TypeError, match="a pathlib.* has no plain form"):
        stored.write(str(tmp_path / "x.npz"), {"path": tmp_path})
    journal = Journal(str(tmp_path / "j"), KNOWN)
    assert journal.save("x", {"path": tmp_path}) is False and "cannot be written" in caplog.text
    assert journal.load("x") is None


class Planted:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (Path("planted").write_text, ("ran",))


def test_nothing_in_a_file_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    path = filled(tmp_path / "j")
    (path / "pickled.npz").write_bytes(pickle.dumps(Planted()))
    np.savez(path / "inside.npz", content=np.array([Planted()], dtype=object))
    torch.save(Planted(), path / "zipped.npz")
    (path / "journal.json").write_bytes(pickle.dumps(Planted()))
    journal = Journal(str(path), KNOWN)
    for name in ("pickled", "inside", "zipped"):
        (path / f"{name}.npz").write_bytes(next(tmp_path.glob(f"j.set-aside-*/{name}.npz")).read_bytes())
        assert journal.load(name) is None
    assert not Path("planted").exists()
    assert caplog.text.count("set aside as") == 4


def test_evaluations_are_typed_and_say_which_key_is_wrong():
    assert Evaluation.from_json(json.loads(json.dumps(evaluation(2).to_json()))) == evaluation(2)
    for change, message in (
        ({"error": "small"}, "error of an evaluation cannot be 'small'"), ({"worker": True}, "worker of an evaluation"),
        ({"colour": 1}, "no key 'colour'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Evaluation.from_json({**evaluation(2).to_json(), **change})
    with pytest.raises(ValueError, match="needs the key 'config'"):
        Evaluation.from_json({"error": 1.0, "block_forwards": 2})


# Damage


def test_a_flipped_or_missing_byte_never_gives_other_tensors(tmp_path):
    path, content = tmp_path / "x.npz", {"x": torch.randn(20), "n": [1, (2, "three")]}
    stored.write(str(path), content)
    whole = path.read_bytes()
    picked = random.Random(0)
    for place in picked.sample(range(len(whole)), 250):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << picked.randrange(8)]) + whole[place + 1 :])
        try:
            assert_same(stored.read(str(path)), content)
        except stored.Damaged:
            pass
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.raises(stored.Damaged):
            stored.read(str(path))


def test_damaged_tensors_are_set_aside_with_a_message(tmp_path, caplog):
    path = filled(tmp_path / "j")
    (path / "recording.npz").write_bytes((path / "recording.npz").read_bytes()[:-30])
    journal = Journal(str(path), KNOWN)
    assert journal.load_tensors("recording") is None and journal.load_tensors("recording") is None
    assert caplog.text.count("is computed again") == 1 and (path / "damaged" / "recording.npz-1").exists()
    assert journal.save_tensors("recording", {}, 3) and journal.load_tensors("recording") == ({}, 3)
    journal.remove()
    assert not path.exists() and list(tmp_path.iterdir()) == []


def test_a_flipped_bit_in_the_records_loses_that_record_alone(tmp_path, caplog):
    path = filled(tmp_path / "j") / "evaluations-0.jsonl"
    whole, picked = path.read_bytes(), random.Random(0)
    for place in picked.sample(range(len(whole)), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << picked.randrange(8)]) + whole[place + 1 :])
        journal = Journal(str(path.parent), KNOWN)
        found = journal.evaluations()
        assert all(one in [evaluation(number) for number in range(4)] for one in found) and len(found) >= 2
        assert journal.add(evaluation(9)) and journal.evaluations()[-1] == evaluation(9)
        journal.close()
    assert "of its lines are not what was written" in caplog.text


@pytest.mark.parametrize("spoil", (b"", b"\xff\x00foreign", b"{}\n", b"[[[[" * 50_000))
def test_a_damaged_header_sets_everything_aside_and_starts_anew(tmp_path, caplog, spoil):
    path = filled(tmp_path / "j")
    (path / "journal.json").write_bytes(spoil)
    assert Journal(str(path), KNOWN).evaluations() == []
    assert "has a damaged journal.json; it was set aside as" in caplog.text
    assert (tmp_path / "j.set-aside-1" / "evaluations-0.jsonl").exists()


def test_an_older_journal_is_set_aside_and_a_newer_one_refused(tmp_path, caplog):
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "fingerprint.json").write_text(json.dumps(KNOWN))
    (tmp_path / "j" / "evaluations-0.jsonl").write_text('{"error": 1.0}\n')
    assert Journal(str(tmp_path / "j"), KNOWN).evaluations() == []
    assert "was written by an older osaccel; it was set aside" in caplog.text
    path = filled(tmp_path / "k")
    Journal(str(path), KNOWN)._write_json(str(path / "journal.json"), {"format": "x/9", "fingerprint": KNOWN}, "")
    with pytest.raises(SearchError, match="is of the format x/9, and this osaccel writes osaccel.journal/3"):
        Journal(str(path), KNOWN)
    assert (path / "evaluations-0.jsonl").exists()


def test_what_is_not_a_searchs_is_refused_and_stays_as_it_was(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "evaluations-0.jsonl").write_text("mine")
    with pytest.raises(SearchError, match="this directory is not a search's"):
        Journal(str(tmp_path / "photos"), KNOWN)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert (tmp_path / "photos" / "evaluations-0.jsonl").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SearchError, match="cannot be used: File exists"):
        Journal(str(tmp_path / "file"), KNOWN)
    path = filled(tmp_path / "j")
    (path / "notes.txt").write_text("mine")
    for journal in (Journal(str(path), dict(KNOWN, steps=30)), Journal(str(path), KNOWN)):
        assert journal.evaluations() == []
    journal.remove()
    assert [path.name for path in path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_a_warning_and_what_was_there_stays(tmp_path, monkeypatch, caplog):
    journal = Journal(str(filled(tmp_path / "j")), KNOWN)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not journal.add(evaluation(8)) and not journal.save_tensors("recording", {"x": torch.ones(3)})
    assert caplog.text.count("No space left on device; the search goes on") == 1
    monkeypatch.undo()
    assert journal.load_tensors("recording")[1] == {"seconds": 1.5} and not list((tmp_path / "j").glob("*.part"))


# One search at a time


def in_child(action):
    """`action` in a process of its own, forked: importing everything again takes longer than all tests together."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid):
    return os.waitpid(pid, 0)[1]


def test_a_second_search_is_refused_with_the_owners_name_and_a_dead_one_taken_over(tmp_path, caplog):
    caplog.set_level("INFO", "osaccel")
    path = tmp_path / "j"

    def hold():
        filled_journal = Journal(str(path), KNOWN)
        filled_journal.add(evaluation(1))
        (tmp_path / "ready").touch()
        time.sleep(60)

    pid = in_child(hold)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(SearchError, match=rf"another search has this output: process {pid} on .*, since \d+ s"):
        Journal(str(path), dict(KNOWN, steps=30))
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert Journal(str(path), KNOWN).evaluations() == [evaluation(1)]
    assert f"process {pid} on" in caplog.text and "this one takes over" in caplog.text


def test_a_search_on_another_machine_is_judged_by_its_pulse(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BEAT", 0.05)
    lock = Lock.take(str(tmp_path / "lock"))
    here = Owner.here()
    monkeypatch.setattr(presence, "_machine", lambda: "another machine")
    with pytest.raises(SearchError, match=f"process {here.pid} on .*, heard from 0 s ago"):
        Lock.take(str(tmp_path / "lock"))
    monkeypatch.setattr(presence, "LIMIT", 0.5)
    lock._heart.stop()
    other = Lock.take(str(tmp_path / "lock"))
    with pytest.raises(SearchError, match="has taken this search over; it ends here"):
        lock.check()
    lock.release()
    other.check()
    assert other.is_held()


def test_the_owner_touches_its_lock_and_a_search_of_the_same_process_takes_over(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BEAT", 0.02)
    first = Journal(str(tmp_path / "j"), KNOWN)
    first.add(evaluation(1))
    os.utime(tmp_path / "j.lock", (1, 1))
    time.sleep(0.2)
    assert presence.silence(str(tmp_path / "j.lock")) < 1
    second = Journal(str(tmp_path / "j"), KNOWN)
    with pytest.raises(SearchError, match="has taken this search over"):
        first.add(evaluation(2))
    first.close()
    assert second.add(evaluation(3)) and second.evaluations() == [evaluation(1), evaluation(3)]


def test_a_lock_that_cannot_be_read_is_somebodys_until_its_pulse_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BEAT", 0.05)
    (tmp_path / "lock").write_bytes(b"\x00\xff")
    heart = presence.Heart(str(tmp_path / "lock"))
    with pytest.raises(SearchError, match="whose name cannot be read"):
        Lock.take(str(tmp_path / "lock"))
    heart.stop()
    monkeypatch.setattr(presence, "LIMIT", 0.5)
    Lock.take(str(tmp_path / "lock")).release()
    assert list(tmp_path.iterdir()) == []


# What was found is not lost


def test_a_result_that_cannot_be_written_is_in_the_log_and_written_by_the_next_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats, "write_cache_config", full)
    pipeline, report = search(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "This is what was found" in record.getMessage()]
    assert json.loads(line.split("This is what was found: ")[1]) == report["chosen"]
    monkeypatch.undo()
    pipeline, again = search(tmp_path)
    assert sum(pipeline.block_calls()) == 0 and again["chosen"] == report["chosen"]
    assert json.loads((tmp_path / "found.json").read_text()) == report["chosen"]


# SIGKILL


KINDS = ("dit_cache", "plan", "restep", "all")
# Clocks differ from run to run; everything else must not.
CLOCKS = ("seconds", "plain_seconds", "measured_speed_up")


class Filming(tiny.UnseededPipeline):
    """Smooth in the step, and what it returns has the shape of frames, which go into the reports."""

    def predict(self, latents, t, scale):
        return 0.2 * super().predict(latents, t, scale) + latents

    def __call__(self, prompt="", num_inference_steps=12, guidance_scale=4.0, num_frames=5, height=8, width=8):
        latents = super().__call__(prompt, num_inference_steps, guidance_scale, num_frames, height, width)
        return (100 + 20 * latents).view(1, 5, 2, 4, 1)


def script(folder, kind, said):
    """A script under OSACCEL_SEARCH=`kind`; what its calls return, and which number is drawn next, is in `said`."""
    outputs = {name: str(folder / f"{name}.json") for name in ("cache_output", "plan_output", "timesteps_output")}
    goals = settings.load({"OSACCEL_TARGET": "1.5x,psnr:30"}).target
    session = Session(
        Settings(search=kind, search_prompts=2, search_probed=1, search_then="continue", cache_ratio=1.3, target=goals,
                 target_steps=(8, 6), **outputs),
        tiny.TARGET,
    )  # fmt: skip
    pipeline = Filming(num_blocks=4)
    torch.manual_seed(5)
    returned = [session.on_call(Filming.__call__, pipeline, (pipeline,), {"prompt": f"prompt {n}"}) for n in range(2)]
    assert session.is_over
    np.savez(str(said), *returned, torch.rand(1))


def files(folder):
    """What stands in every file but the clocks' values; a kill may leave a file that was not renamed yet, no more."""
    found = {path.name: path for path in folder.iterdir() if path.suffix != ".part"}
    return {name: array_lists(path) if path.suffix == ".npz" else without_clocks(path) for name, path in found.items()}


def array_lists(path):
    with np.load(str(path)) as arrays:
        return {name: arrays[name].tolist() for name in arrays.files}


def without_clocks(path):
    def kept(pairs):
        return {key: value for key, value in pairs if key not in CLOCKS}

    return json.loads(path.read_text(), object_pairs_hook=kept)


class Searching:
    """Runs of one kind of search, each in a folder of its own and in a process of its own."""

    def __init__(self, kind, root):
        self.kind, self.root = kind, root
        begun = time.time()
        self.wanted = self.outcome_in("whole")
        self.seconds = time.time() - begun
        counted = self.start("counted", 10**9, root / "count")
        assert ended(counted) == 0 and files(root / "counted") == self.wanted[0]
        self.operations = int((root / "count").read_text())

    def start(self, name, operation=None, count=None):
        """Begin in this folder, or go on, in a process that is killed at its n-th file operation; its id."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)

        def run():
            if operation is not None:
                kill_at(folder, operation, count)
            script(folder, self.kind, self.root / f"{name}-said.npz")

        return in_child(run)

    def outcome_in(self, name):
        """What a search that ends in this folder leaves there, and what its script saw."""
        assert ended(self.start(name)) == 0
        return files(self.root / name), array_lists(self.root / f"{name}-said.npz")

    def assert_ends_as_undisturbed(self, name):
        left, said = self.outcome_in(name)
        assert sorted(left) == sorted(self.wanted[0])
        for file, content in self.wanted[0].items():
            assert left[file] == content, file
        assert said == self.wanted[1]


@pytest.fixture(scope="module", params=KINDS)
def searching(request, tmp_path_factory):
    return Searching(request.param, tmp_path_factory.mktemp(request.param))


# Not os.utime, by which the owner of a lock shows that it lives: at which operation depends on the clock.
CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")


def kill_at(folder, operation, count=None):
    """SIGKILL this process when it is about to make its n-th change in the folder.

    Where that is to make lasting what was written, half of the last line is there: as when a write was interrupted.
    """
    made, sync = [0], os.fsync

    def change(spoil=lambda: None):
        made[0] += 1
        if made[0] == operation:
            spoil()
            os.kill(os.getpid(), signal.SIGKILL)
        if count is not None:
            with open(str(count), "w") as file:
                file.write(str(made[0]))

    def hook(event, arguments):
        is_writing = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (is_writing or event in CHANGES) and str(arguments[0]).startswith(str(folder) + os.sep):
            change()

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isfile(path) and path.startswith(str(folder) + os.sep):
            change(lambda: halve_the_last_line(path))
        sync(handle)

    sys.addaudithook(hook)
    os.fsync = fsync


def halve_the_last_line(path):
    with open(path, "r+b") as file:
        whole = file.read()
        begin = whole[:-1].rfind(b"\n") + 1
        file.truncate((begin + len(whole)) // 2)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="file operations are counted with /proc")


@needs_proc
def test_a_search_killed_at_any_file_operation_resumes_to_the_same_result(searching):
    assert searching.operations > 15
    every = range(1, searching.operations + 1)
    for operation in every if MOMENTS >= 40 else sorted(random.Random().sample(every, MOMENTS)):
        name = f"operation-{operation}"
        assert ended(searching.start(name, operation)) == signal.SIGKILL, operation
        searching.assert_ends_as_undisturbed(name)


@needs_proc
def test_a_search_that_is_killed_again_and_again_gets_to_the_same_result(searching):
    """Its first run at the first operation, its second at the second, and so on, until one run gets through."""
    operation, stride = 0, 1 if MOMENTS >= 40 else random.randrange(5, 10)
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        operation += stride
        assert operation <= searching.operations + stride
        status = ended(searching.start("again", operation))
    assert status == 0 and files(searching.root / "again") == searching.wanted[0]
    assert array_lists(searching.root / "again-said.npz") == searching.wanted[1]


def test_a_search_killed_at_any_moment_resumes_to_the_same_result(searching):
    for moment in range(MOMENTS):
        pid = searching.start(f"moment-{moment}")
        time.sleep(random.random() * searching.seconds)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        searching.assert_ends_as_undisturbed(f"moment-{moment}")
