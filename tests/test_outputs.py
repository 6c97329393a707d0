# SPDX-License-Identifier: Apache-2.0
"""What a search writes and reads beside its settings: found wrong by the launcher, written whole or not at all."""

import json
import logging
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from osaccel import binding, formats
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.plan import Plan
from osaccel.search import frames, outputs

CONFIG = DitCacheConfig(4, 2, 2, 3)


def launch(tmp_path, limit=None, **environ):
    """The launcher's message, or None where it started the command."""
    command = [sys.executable, "-m", "osaccel.run", "touch", str(tmp_path / "started")]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=dict(os.environ, **environ), preexec_fn=limit
    )
    started = (tmp_path / "started").exists()
    assert result.returncode == (0 if started else 2) and result.stderr.count("\n") == (0 if started else 1), result
    return None if started else result.stderr


def searching(tmp_path, path, **environ):
    return launch(tmp_path, OSACCEL_SEARCH="1", OSACCEL_CACHE_CONFIG=str(path), **environ)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), "found.json cannot be written: Is a directory."),
        (lambda path: path.symlink_to("/dev/null"), "it is not a regular file"),
        (lambda path: os.mkfifo(path), "it is not a regular file"),
        (lambda path: path.symlink_to(path.name), "it is not a regular file"),
        (lambda path: path.with_name("found.json.report.json").mkdir(), "found.json.report.json cannot be written"),
        (lambda path: path.parent.rmdir() or path.parent.write_text(""), "Not a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_by_the_launcher(tmp_path, make, expected):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / "found.json")
    assert expected in searching(tmp_path, tmp_path / "out" / "found.json")


@pytest.mark.parametrize("path", ["/proc/found.json", "/proc/no/such/found.json", "out/" + "x" * 250 + ".json"])
def test_folders_that_take_no_file_and_names_that_are_too_long(tmp_path, path):
    assert "cannot be written" in searching(tmp_path, tmp_path / path if path[0] != "/" else path)


def test_a_missing_folder_is_made_when_there_is_something_to_write(tmp_path):
    assert searching(tmp_path, tmp_path / "new" / "deep" / "found.json") is None
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_found(tmp_path):
    """A file system that takes no more bytes, played by the limit on the size of files."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # noqa: E731
    message = launch(tmp_path, limit, OSACCEL_SEARCH="1", OSACCEL_CACHE_CONFIG=str(tmp_path / "found.json"))
    assert "cannot be written: File too large" in message
    assert not list(tmp_path.glob("*found*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_found(tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    assert "Permission denied" in searching(tmp_path, tmp_path / "out" / "found.json")


def test_two_outputs_in_one_file_and_an_output_over_the_settings_are_refused(tmp_path):
    path, config = str(tmp_path / "found.json"), tmp_path / "all.yaml"
    both = {"OSACCEL_SEARCH": "all", "OSACCEL_CACHE_CONFIG": path, "OSACCEL_TIMESTEPS": path}
    assert "is the file of OSACCEL_TIMESTEPS too" in launch(tmp_path, **both)
    config.write_text("search: {mode: 1}\ncache: all.yaml\n")
    assert "is the file of OSACCEL_CONFIG too" in launch(tmp_path, OSACCEL_CONFIG=str(config))
    assert config.read_text().startswith("search")


def test_only_rank_0_must_be_able_to_write(tmp_path):
    assert searching(tmp_path, "/proc/found.json", RANK="1") is None


@pytest.mark.parametrize("write", [formats.write_cache_config, formats.write_timesteps, formats.write_plan])
def test_a_result_that_cannot_be_written_stands_in_the_log_once(tmp_path, caplog, monkeypatch, write):
    monkeypatch.setattr(logging.getLogger("osaccel"), "propagate", True)
    path = str(tmp_path / "found.json")
    os.mkdir(path)
    found = {"write_cache_config": CONFIG, "write_timesteps": [999.0, 0.0], "write_plan": Plan(steps=2)}[write.__name__]
    assert outputs.deliver(path, "what it is", lambda: write(path, found)) is False
    assert [record.getMessage() for record in caplog.records] == [
        f'{path} cannot be written: Is a directory. This is what was found: "what it is"'
    ]
    assert os.listdir(tmp_path) == ["found.json"], "no temporary file stays behind"
    os.rmdir(path)
    assert outputs.deliver(path, "what it is", lambda: write(path, found)) is True


def test_a_written_file_follows_a_link_and_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order = []

    def noting(name):
        real = getattr(os, name)
        return lambda *arguments: (order.append(name), real(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name))
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "found.json")
    formats.write_cache_config(str(tmp_path / "link.json"), CONFIG)
    assert order == ["fsync", "replace", "fsync"]
    assert (tmp_path / "link.json").is_symlink() and formats.read_cache_config(str(tmp_path / "link.json")) == CONFIG


@pytest.mark.parametrize(
    "damage",
    ["", "{", '{"fingerprint": [1]}', "[1]", '{"fingerprint": {"steps": [[[]]]}}', b"\xff\x00", "[" * 90000, None],
)
def test_a_damaged_report_is_a_difference_not_an_error(tmp_path, damage):
    path = tmp_path / "cache.json.report.json"
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    found = binding.mismatches(str(tmp_path / "cache.json"), {"steps": 50, "blocks": 32})
    assert len(found) == 1 and len(found[0]) < 400


GOOD = {"cache_block_start": 1, "cache_num_blocks": 4, "cache_step_start": 1, "cache_step_interval": 2}
SAMPLE = """
import sys, types, tiny
class OpenSoraPipeline(tiny.UnseededPipeline):
    def __call__(self, **arguments):
        return super().__call__(**arguments)
module = types.ModuleType("opensora.sample.pipeline_opensora")
module.OpenSoraPipeline = OpenSoraPipeline
sys.modules[module.__name__] = module
import osaccel.auto
OpenSoraPipeline()(num_inference_steps=6)
print("sampled")
"""


def test_a_damaged_report_warns_and_samples_and_strict_refuses(tmp_path):
    (tmp_path / "cache.json").write_text(json.dumps(GOOD))
    (tmp_path / "cache.json.report.json").write_text('{"finger')
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environ = dict(os.environ, PYTHONPATH=path, OSACCEL_CACHE_CONFIG=str(tmp_path / "cache.json"))
    command = [sys.executable, "-c", SAMPLE]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert result.stdout == "sampled\n" and "its report is damaged" in result.stderr, result.stderr
    assert "generation: 6 steps" in result.stderr
    environ["OSACCEL_STRICT"] = "1"
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == "" and "OSACCEL_STRICT refuses it" in result.stderr


# Calibration videos ---------------------------------------------------------------------------------------------------


def write_video(path, frames=3, size=32):
    import imageio

    with imageio.get_writer(str(path), fps=8, macro_block_size=1, format="FFMPEG") as writer:
        for number in range(frames):
            writer.append_data(np.full((size, size, 3), number, np.uint8))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write_video(folder / f"{number}.mp4")
    return folder


def calibrating(tmp_path, folder):
    output = str(tmp_path / "schedule.txt")
    return launch(tmp_path, OSACCEL_SEARCH="restep", OSACCEL_TIMESTEPS=output, OSACCEL_CALIBRATION_VIDEOS=str(folder))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "0.mp4").unlink(), "found 4 mp4 files"),
        (lambda folder: (folder / "0.mp4").write_bytes(b""), "0.mp4: cannot be read: the file is empty"),
        (lambda folder: (folder / "9.mp4").symlink_to("nothing"), "9.mp4: cannot be read: No such file"),
        (lambda folder: (folder / "9.mp4").mkdir(), "9.mp4: cannot be read: Is a directory"),
        (lambda folder: os.mkfifo(folder / "9.mp4"), "a FIFO or pipe"),
        (lambda folder: None, None),
        (lambda folder: (folder / "0.mp4").rename(folder / "0.MP4"), None),
    ],
)
def test_the_launcher_finds_what_is_wrong_with_the_folder(tmp_path, videos, spoil, expected):
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in videos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    message = calibrating(tmp_path, folder)
    assert message is None if expected is None else expected in message


def test_the_launcher_finds_a_folder_that_is_none(tmp_path):
    assert "no directory of mp4 files: No such file" in calibrating(tmp_path, tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "no directory of mp4 files: Not a directory" in calibrating(tmp_path, tmp_path / "file")


MEASURE = """
import resource, sys
from osaccel.search.timesteps.calibration import read_video
from osaccel.search.dit_cache.candidates import SearchError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(read_video(sys.argv[1], eval(sys.argv[2])).shape)
except SearchError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_a_video_is_measured_before_it_is_decoded(tmp_path):
    """60 frames of 1024 x 1024 are 180 MiB decoded; the run makes other ones, or fewer."""
    write_video(tmp_path / "big.mp4", frames=60, size=1024)
    for arguments, expected, most in (
        (
            {"num_frames": 5, "height": 64, "width": 64},
            "is 1024 x 1024 (height x width), but the run makes 64 x 64",
            80,
        ),
        ({"num_frames": 61, "height": 1024, "width": 1024}, "has 60 frames, but the run makes 61", 450),
        ({"num_frames": 5, "height": 1024, "width": 1024}, "(5, 1024, 1024, 3)", 110),
    ):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "big.mp4"), repr(arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        message, spent = result.stdout.strip().rsplit("\n", 1)
        assert expected in message and int(spent) < most, (result.stdout, result.stderr[-2000:])


def test_without_the_launcher_an_output_that_cannot_be_written_is_found_before_the_first_forward(tmp_path):
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environ = dict(os.environ, PYTHONPATH=path, OSACCEL_SEARCH="1", OSACCEL_CACHE_CONFIG=str(tmp_path))
    code = SAMPLE + "assert False, 'not refused'"
    code = code.replace("class OpenSora", "tiny.Pipeline.predict = lambda *_: 1 / 0\nclass OpenSora", 1)
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    assert result.stderr.splitlines()[-1].endswith(f"{tmp_path} cannot be written: Is a directory."), result.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs modes of files")
@pytest.mark.parametrize("umask", (0o022, 0o027))
def test_what_a_search_leaves_is_as_readable_as_the_user_s_other_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        formats.write_json(str(tmp_path / "plan.json"), {})
        frames.replace_frames(str(tmp_path / "plan.json.report.npz"), {"plain": np.zeros((2, 4, 4, 3), np.uint8)})
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {oct(0o666 & ~umask)}
    with np.load(tmp_path / "plan.json.report.npz") as content:
        assert content["plain"].shape == (2, 4, 4, 3)
