# SPDX-License-Identifier: Apache-2.0
"""Files that are no files, or bombs, in real launchers with a gigabyte of memory: one message, nothing started."""

import json
import os
import random
import resource
import subprocess
import sys

import numpy as np
import pytest

from osaccel import formats, reading
from osaccel.formats import SettingsError
from osaccel.sampling.levels import checked_timesteps

GOOD = {"cache_block_start": 0, "cache_num_blocks": 2, "cache_step_start": 0, "cache_step_interval": 2}
GIGABYTE = 1 << 30


def launch(tmp_path, **environ):
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (GIGABYTE, GIGABYTE))  # noqa: E731
    command = [sys.executable, "-m", "osaccel.run", "touch", str(tmp_path / "started")]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=20, preexec_fn=limit, env=dict(os.environ, **environ)
    )
    assert (result.returncode == 0) == (tmp_path / "started").exists(), result.stderr
    return result


def refused(tmp_path, **environ):
    result = launch(tmp_path, **environ)
    assert result.returncode == 2 and result.stderr.startswith("osaccel: error: "), result.stderr
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 2500
    return result.stderr


def fifo(path):
    os.mkfifo(path)


def sparse(path):
    path.write_text("[")
    os.truncate(path, 1 << 40)


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (fifo, "a FIFO or pipe, not a regular file"),
        (sparse, "it is larger than"),
        (loop, "symbolic link"),
        (dangling, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "a character device, not a regular file"),
        (lambda path: path.write_bytes(b"\xff\xfe["), "it is not a text file (UTF-8)"),
        (lambda path: path.write_text(""), "not valid"),
    ],
)
@pytest.mark.parametrize("variable", ["OSACCEL_CACHE_CONFIG", "OSACCEL_TIMESTEPS"])
def test_what_is_no_file_is_refused_before_it_is_read(tmp_path, variable, make, expected):
    make(tmp_path / "file.json")
    assert expected in refused(tmp_path, **{variable: str(tmp_path / "file.json")})


BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n" for before, after in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BILLION_LAUGHS, "alias *a is not allowed"),
        ("cache: &a\n  cache: *a\n", "alias *a is not allowed"),
        ("[" * 30000, "nested more than 20 levels deep"),
        ("? " * 15000, "nested more than 20 levels deep"),
        ("log: INFO\nlog: DEBUG\n", "line 2: the key 'log' stands there twice"),
        ("log: !!int abc\n", "the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("log: !!timestamp 2024-99-99\n", "is not allowed"),
        ("log: 2024-99-99\n", "unknown log level '2024-99-99'"),
        ("%YAML " + "9" * 300 + ".1\n---\n", "not valid YAML"),
        ("cache: " + "1" * 5000, "a number of more than 400 digits"),
        ("cache: 'a\0b'\n", "not valid YAML"),
        ('cache: "a\\0b"\n', "cache: expected a path, got 'a\\x00b'"),
        ('cache: "\\ud800"\n', "cache: expected a path, got '\\ud800'"),
        ('cache: "\\Uffffffff"\n', "not valid YAML"),
        ("search: {prompts: 010}\n", "expected a whole number of at least 1, got '010'"),
        ("search: {cache_ratio: 1:30}\n", "expected a number in (1, 2], got '1:30'"),
        ("search: {cache_ratio: 1_0}\n", "got '1_0'"),
        ("search: {min_psnr: true}\n", "expected a number in (0, 200], got True"),
        (f"search: {{min_psnr: 1{'0' * 399}}}\n", "expected a number in (0, 200]"),
        ("log: " + "x" * 32000, "unknown log level 'xxx"),
        ("? " + "x" * 30000, "unknown key 'xxx"),
        ("#" * 40000, "it is larger than 32768 bytes"),
        ("sampling: {timesteps: [0.1, 0.9, 0.9999, 1.0]}\n", "2 and 3, 0.9999 and 1.0, are both the timestep 999"),
    ],
)  # fmt: skip
def test_yaml_surprises_and_bombs(tmp_path, content, expected):
    (tmp_path / "all.yaml").write_text(content)
    assert expected in refused(tmp_path, OSACCEL_CONFIG=str(tmp_path / "all.yaml"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 200000, "nested too deeply"),
        ('{"a":' * 200000, "nested too deeply"),
        ("[0, " + "9" * 5000 + "]", "a number of more than 400 digits"),
        ("[0, 1" + "0" * 399 + "]", "entry 1 must be in [0, 1], got 100000"),
        ("[0, 1e400]", "entry 1 must be in [0, 1], got inf"),
        ("{" + ", ".join(f'"{i}": 1' for i in range(100000)) + ', "7": 1}', "the key '7' stands there twice"),
        ("[" + "0.1, " * 300000 + "1]", "a list of at most 10000 timesteps is needed, got 300001"),
        (json.dumps([0.5, 0.5 + 1e-12]), "are both the timestep 500 for a sampler"),
        ('"' + "x" * 1000000 + '"', "expected a list of numbers"),
    ],
    ids=range(9),
)
def test_json_bombs(tmp_path, content, expected):
    (tmp_path / "list.txt").write_text(content)
    assert expected in refused(tmp_path, OSACCEL_TIMESTEPS=str(tmp_path / "list.txt"))


def test_a_cache_value_beyond_every_model_is_refused(tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(dict(GOOD, cache_block_start=10**400 - 1)))
    assert "cache_block_start must be at most 1000000, got 999" in refused(tmp_path, OSACCEL_CACHE_CONFIG=str(path))


def test_words_are_still_words_and_numbers_numbers(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text("\ufeffstrict: yes\nsearch: {mode: off, cache_ratio: 1.5e0, prompts: 3}\nlog: 'info'\n")
    assert launch(tmp_path, OSACCEL_CONFIG=str(path)).returncode == 0


def test_a_file_that_becomes_a_fifo_does_not_keep_us_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "late")
    monkeypatch.setattr(reading, "check_regular", lambda path: None)
    with pytest.raises(SettingsError, match="not valid JSON"):
        reading.read_file(str(tmp_path / "late"))


def test_the_launcher_accepts_exactly_the_lists_that_samplers_accept():
    chance = random.Random(5)
    near = [0.0, 1e-46, 1e-44, 0.5, 0.5 + 3e-8, 0.5 + 1e-7, 0.999, 0.99900001, 0.9991, 1.0]
    verdicts = []
    for _ in range(500):
        content = sorted({chance.choice(near + [chance.random()]) for _ in range(chance.randint(2, 5))})
        if len(content) < 2:
            continue
        try:
            checked_timesteps(1000 * np.array(content[::-1]), 1000)
            accepted = True
        except ValueError:
            accepted = False
        try:
            formats.parse_timesteps(content, "here")
            assert accepted, content
        except SettingsError:
            assert not accepted, content
        verdicts.append(accepted)
    assert {True, False} == set(verdicts)
