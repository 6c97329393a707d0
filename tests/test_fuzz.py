# SPDX-License-Identifier: Apache-2.0
"""Every file and variable that is read, against mutated inputs: a result or a SettingsError, within a second, always.

2,000 examples by default; `FUZZ_EXAMPLES=100000 python -m pytest tests/test_fuzz.py` for a night.
"""

import json
import os
import re
import time

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given  # noqa: E402
from hypothesis import settings as budget  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from osaccel import binding, settings  # noqa: E402
from osaccel.messages import LONGEST_MESSAGE, SettingsError  # noqa: E402

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2000"))
CACHE = {"cache_block_start": 2, "cache_num_blocks": 3, "cache_step_start": 4, "cache_step_interval": 2}
TIMESTEPS = [0.0, 0.0712, 0.2, 0.45, 0.8, 0.999]
PLAN = """{"format": "osaccel.plan/1", "steps": 12, "skip": [4, 8], "conditional_only": [2, 3, 6],
"regions": [{"start": 0, "stop": 2, "reuse": [3, 5, 10], "order": 1}, {"start": 3, "stop": 6, "reuse": [5, 6, 7]}],
"correction": {"predictor": 0.0, "corrector": [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}}"""
YAML = """
cache: {cache_block_start: 2, cache_num_blocks: 3, cache_step_start: 4, cache_step_interval: 2}
sampling:
  timesteps: [0.0, 0.25, 0.5, 0.999]
search: {prompts: 2, then: exit, cache_ratio: 1.5, target_steps: [20, 30]}
strict: false
log: INFO
"""
SEEDS = {
    "cache.json": json.dumps(CACHE),
    "cache.yaml": "\n".join(f"{key}: {value}" for key, value in CACHE.items()),
    "schedule.txt": json.dumps(TIMESTEPS),
    "plan.json": PLAN,
    "all.yaml": YAML,
    "report.json": json.dumps({"fingerprint": {"steps": 100, "blocks": 32, "sampler": "X", "resolution": [9, 64, 64]}}),
}
# Each was seen to end in something else than a message, in this project or in its parsers.
PIECES = [
    "[" * 3000, "{" * 3000, '{"a":' * 3000, "- " * 3000, "? " * 3000, "9" * 5000, "1" + "0" * 399, "9" * 20, "-1e999",
    "NaN", "-Infinity", "1e400", "010", "1:30", "0x1F", "1_000", "0o7", "!!int abc",
    "!!python/object/apply:os.system [true]", "!!timestamp 2024-99-99", "2024-99-99", "2024-02-30 25:61:61",
    "&a [*a]", "&a x", "*a", "<<: {a: 1}", "\0", "\ud800", "\\ud800", '"\\UFFFFFFFF"', "%YAML 1.1\n---\n",
    "%YAML " + "9" * 5000 + ".1\n---\n", "%TAG ! tag:x,2000:\n---\n", "---\n", "...\n", "~", "null", "true", "Yes",
    "on", '"', "'", "|\n  x", ">\n", "#", ": ", "\t", "\r", "\u2028", "\x85", "\ufeff", "a" * 40000, "1," * 9000,
    '{"a": 1, "a": 2}', "cache_block_start: 1\n", "-0.0", "5e-324", "0.9999999999", "\u0663", "\U0001f600",
    "\x1b[31m", "{}", "[]", ",",
]  # fmt: skip


WORDS = re.compile(r'"[^"]*"|[\w.+-]+|\s+|.')


@st.composite
def mutated(draw, seed):
    """`seed` with words exchanged for pieces, and with pieces put in, cut out or repeated anywhere."""
    words = WORDS.findall(seed)
    for place in draw(st.lists(st.integers(0, len(words) - 1), max_size=2)):
        words[place] = draw(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)))
    text = "".join(words)
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.sampled_from([0, 0, 1, 2, 5, 20, 1000]))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.text(max_size=8), st.just(text[start:stop] * 2)))
        text = text[:start] + piece + text[stop:]
    return text.encode("utf-8", "surrogatepass" if draw(st.booleans()) else "ignore")


paths = st.one_of(
    st.sampled_from(["", ".", "/", "/dev/zero", "/dev/null", "/dev/tty", "~", "~x/y", "a\0b", "\ud800", "\udcff",
                     "x" * 5000, "x/" * 3000]),
    st.text(max_size=10),
)  # fmt: skip
values = st.one_of(
    st.text(max_size=12), st.sampled_from(PIECES), paths, st.sampled_from(["1", "0", "50", "1.5", "all"])
)


def checked(function, *arguments):
    """The call's result or None; fails on any exception but SettingsError, on long messages, and after a second."""
    before = time.thread_time()
    try:
        return function(*arguments)
    except SettingsError as error:
        message = str(error)
        assert message.isprintable() and len(message) < LONGEST_MESSAGE + 100, len(message)
        return None
    finally:
        spent = time.thread_time() - before
        assert spent < 1, f"{spent:.2f} s"


def fuzz(share):
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return budget(
        max_examples=int(EXAMPLES * share),
        deadline=None,
        suppress_health_check=health,
        database=None,
        # Explaining traces every line, which would count as time.
        phases=[Phase.generate, Phase.shrink],
    )


VARIABLES = {"all.yaml": "OSACCEL_CONFIG", "schedule.txt": "OSACCEL_TIMESTEPS", "plan.json": "OSACCEL_PLAN"}
SHARES = {
    "cache.json": 0.15,
    "cache.yaml": 0.15,
    "schedule.txt": 0.15,
    "plan.json": 0.1,
    "all.yaml": 0.15,
    "report.json": 0.1,
}


@pytest.mark.parametrize("name", list(SEEDS))
def test_files(name, tmp_path):
    path = str(tmp_path / name)

    @fuzz(SHARES[name])
    @given(mutated(SEEDS[name]))
    def check(content):
        with open(path, "wb") as file:
            file.write(content)
        if name == "report.json":
            checked(binding.mismatches, path[: -len(".report.json")] or path, {"steps": 50, "blocks": 32})
        else:
            checked(settings.load, {VARIABLES.get(name, "OSACCEL_CACHE_CONFIG"): path})

    check()


@fuzz(0.1)
@given(
    st.dictionaries(st.sampled_from([s.variable for s in settings.TABLE] + ["OSACCEL_X", "PATH"]), values, max_size=4)
)
def test_variables(environ):
    checked(settings.load, environ)


@fuzz(0.1)
@given(st.dictionaries(st.sampled_from([s.name for s in settings.TABLE]), values, max_size=4))
def test_options(options):
    if checked(settings.load, {}, options) is not None:
        checked(settings.exported, options, {})
