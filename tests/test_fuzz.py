# SPDX-License-Identifier: Apache-2.0
"""Every file and variable that is read, against mutated inputs: a result or a SettingsError, within a second, always.

Each reader gets 2,000 inputs of a plain mutator, or `FUZZ_EXAMPLES=100000 python -m pytest tests/test_fuzz.py`, and
some of hypothesis, which makes ten times fewer in the same time and then finds the smallest that fails. What fails is
made again by FUZZ_SEED, which the failure names.
"""

import contextlib
import json
import os
import random
import re
import time

import pytest
import test_report

from osaccel import binding, settings
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.messages import LONGEST_MESSAGE, SettingsError
from osaccel.report import page
from osaccel.settings import Settings

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2000"))
SEED = int(os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(10**9))))
# What hypothesis tries of each reader.
HYPOTHESIS = 200
# What reading may take of memory: the largest file has 2 MiB.
MEMORY = 256 << 20
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
FINGERPRINT = {
    "steps": 100,
    "blocks": 32,
    "sampler": "X",
    "resolution": [9, 64, 64],
    "timesteps": "the scheduler's own",
}
SEEDS = {
    "cache.json": json.dumps(CACHE),
    "cache.yaml": "\n".join(f"{key}: {value}" for key, value in CACHE.items()),
    "schedule.txt": json.dumps(TIMESTEPS),
    "plan.json": PLAN,
    "all.yaml": YAML,
    "cache.json.report.json": json.dumps({"fingerprint": FINGERPRINT}),
    "page-plan.report.json": json.dumps(test_report.of_plan()),
    "page-cache.report.json": json.dumps(test_report.of_cache()),
    "page-list.report.json": json.dumps(test_report.of_list()),
}
VARIABLES = {
    "cache.json": "OSACCEL_CACHE_CONFIG", "cache.yaml": "OSACCEL_CACHE_CONFIG", "schedule.txt": "OSACCEL_TIMESTEPS",
    "plan.json": "OSACCEL_PLAN", "all.yaml": "OSACCEL_CONFIG",
}  # fmt: skip
# Each was seen to end in something else than a message, in this project or in its parsers.
PIECES = [
    "[" * 3000, "{" * 3000, '{"a":' * 3000, "- " * 3000, "? " * 3000, "9" * 5000, "1" + "0" * 399, "9" * 20, "-1e999",
    "NaN", "-Infinity", "1e400", "010", "1:30", "0x1F", "1_000", "0o7", "!!int abc",
    "!!python/object/apply:os.system [true]", "!!timestamp 2024-99-99", "2024-99-99", "2024-02-30 25:61:61",
    "&a [*a]", "&a x", "*a", "<<: {a: 1}", "\0", "\ud800", "\\ud800", '"\\UFFFFFFFF"', "%YAML 1.1\n---\n",
    "%YAML " + "9" * 5000 + ".1\n---\n", "%TAG ! tag:x,2000:\n---\n", "---\n", "...\n", "~", "null", "true", "Yes",
    "on", '"', "'", "|\n  x", ">\n", "#", ": ", "\t", "\r", "\u2028", "\x85", "\ufeff", "a" * 40000, "1," * 1500,
    '{"a": 1, "a": 2}', "cache_block_start: 1\n", "-0.0", "5e-324", "0.9999999999", "\u0663", "\U0001f600",
    "\x1b[31m", "{}", "[]", ",",
]  # fmt: skip


WORDS = re.compile(r'"[^"]*"|[\w.+-]+|\s+|.')


PATHS = [
    "",
    ".",
    "/",
    "/dev/zero",
    "/dev/null",
    "/dev/tty",
    "~",
    "~x/y",
    "a\0b",
    "\ud800",
    "\udcff",
    "x" * 5000,
    "x/" * 3000,
]
NUMBERS = ["1", "0", "50", "1.5", "all"]
NAMES = [setting.name for setting in settings.TABLE]
ASKED = [setting.variable for setting in settings.TABLE] + ["OSACCEL_X", "PATH"]


# The readers and what is asked of each --------------------------------------------------------------------------------


def read(name, path):
    """What is done with a file of this name."""
    if name.startswith("page-"):
        page.content_of(page.load(path))
        return
    if not name.endswith(".report.json"):
        settings.load({VARIABLES[name]: path})
        return
    applied = Settings(cache=DitCacheConfig(**CACHE), cache_file=path[: -len(".report.json")])
    _, recorded = binding.recorded_of(applied)
    if isinstance(recorded, str):
        raise SettingsError(recorded)
    for line in binding.mismatches(recorded, {**FINGERPRINT, "steps": 50, "resolution": [9, 64, 32]}):
        assert len(line) < LONGEST_MESSAGE + 100


def read_content(name, path, content):
    """Write and read it; whether it was accepted."""
    with open(path, "wb") as file:
        file.write(content)
    return checked(read, name, path)


def load_options(options):
    settings.exported(options, {}) if settings.load({}, options) is not None else None


def checked(function, *arguments):
    """Whether the call took its arguments; fails on what is no SettingsError, on long messages, and after a second."""
    before = time.thread_time()
    try:
        function(*arguments)
        return True
    except SettingsError as error:
        message = str(error)
        assert message.isprintable() and len(message) < LONGEST_MESSAGE + 100, len(message)
        return False
    finally:
        spent = time.thread_time() - before
        assert spent < 1, f"{spent:.2f} s"


# Many inputs ----------------------------------------------------------------------------------------------------------


class Mutator:
    """Inputs from a seed's words and the pieces, and from inputs that were accepted."""

    def __init__(self, name):
        self.random, self.known = random.Random(f"{SEED} {name}"), []

    def accepted(self, text):
        """Go on from it, too."""
        if len(text) < 3000:
            self.known[self.random.randrange(50) :] = [text]

    def text(self, seed):
        """`seed` with words exchanged for pieces, and with pieces put in, cut out or repeated anywhere."""
        draw = self.random
        words = WORDS.findall(draw.choice(self.known) if self.known and draw.random() < 0.3 else seed) or [""]
        for _ in range(draw.randrange(3)):
            words[draw.randrange(len(words))] = self.piece()
        text = "".join(words)
        for _ in range(draw.randrange(3)):
            start = draw.randrange(len(text) + 1)
            stop = start + draw.choice([0, 0, 1, 2, 5, 20, 1000])
            text = text[:start] + draw.choice([self.piece(), text[start:stop] * 2, ""]) + text[stop:]
        return text

    def piece(self):
        draw = self.random
        if draw.random() < 0.6:
            return draw.choice(PIECES)
        highest = draw.choice([0x7F, 0x7F, 0xFF, 0xFFFF, 0x10FFFF])
        return "".join(chr(draw.randint(0, highest)) for _ in range(draw.randrange(9)))

    def content(self, text):
        """The text as a file holds it, now and then with a byte changed."""
        content = bytearray(text.encode("utf-8", self.random.choice(["surrogatepass", "ignore"])))
        if content and self.random.random() < 0.1:
            content[self.random.randrange(len(content))] = self.random.randrange(256)
        return bytes(content)

    def value(self):
        return self.random.choice(
            [self.piece, lambda: self.random.choice(PATHS), lambda: self.random.choice(NUMBERS)]
        )()

    def values(self, names):
        """Up to four of the names, each with something."""
        return {self.random.choice(names): self.value() for _ in range(self.random.randrange(5))}


@contextlib.contextmanager
def little_memory():
    """A memory bomb ends in MemoryError here, where the system has such limits."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzzed(name, attempt):
    """`attempt(mutator)` many times; what fails says how it is made again."""
    mutator, accepted = Mutator(name), []
    with little_memory():
        try:
            while len(accepted) < EXAMPLES:
                accepted.append(attempt(mutator))
        except BaseException:
            print(f"FUZZ_SEED={SEED} FUZZ_EXAMPLES={len(accepted) + 1} makes this of {name} again")
            raise
    # Else the mutations are too wild to get past the parser, or what is changed is not read.
    assert 0.01 < sum(accepted) / EXAMPLES < 0.99, sum(accepted)


@pytest.mark.parametrize("name", list(SEEDS))
def test_many_files(name, tmp_path):
    path = str(tmp_path / name)

    def attempt(mutator):
        text = mutator.text(SEEDS[name])
        content = mutator.content(text)
        is_accepted = read_content(name, path, content)
        if is_accepted:
            mutator.accepted(text)
        return is_accepted

    # Of what is read first.
    read_content(name, path, SEEDS[name].encode())
    fuzzed(name, attempt)


def test_many_variables():
    fuzzed("variables", lambda mutator: checked(settings.load, mutator.values(ASKED)))


def test_many_options():
    fuzzed("options", lambda mutator: checked(load_options, mutator.values(NAMES)))


# Small inputs ---------------------------------------------------------------------------------------------------------


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


paths = st.one_of(st.sampled_from(PATHS), st.text(max_size=10))
values = st.one_of(st.text(max_size=12), st.sampled_from(PIECES), paths, st.sampled_from(NUMBERS))
budget = hypothesis.settings(
    max_examples=HYPOTHESIS,
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
    database=None,
    # Explaining traces every line, which would count as time.
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)


@pytest.mark.parametrize("name", list(SEEDS))
def test_files(name, tmp_path):
    path = str(tmp_path / name)

    @budget
    @hypothesis.given(mutated(SEEDS[name]))
    def check(content):
        read_content(name, path, content)

    check()


@budget
@hypothesis.given(st.dictionaries(st.sampled_from(ASKED), values, max_size=4))
def test_variables(environ):
    checked(settings.load, environ)


@budget
@hypothesis.given(st.dictionaries(st.sampled_from(NAMES), values, max_size=4))
def test_options(options):
    checked(load_options, options)
