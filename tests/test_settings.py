# SPDX-License-Identifier: Apache-2.0
"""Settings: precedence, and one exact message for every way a value or file can be wrong."""

import json

import pytest

from osaccel import settings
from osaccel.formats import SettingsError, read_timesteps, write_cache_config, write_timesteps

GOOD = {"cache_block_start": 2, "cache_num_blocks": 3, "cache_step_start": 4, "cache_step_interval": 2}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def cache_file(tmp_path):
    return write(tmp_path / "dit_cache_config.json", GOOD)


def message_of(environ, **options):
    with pytest.raises(SettingsError) as caught:
        settings.load(environ, options)
    return str(caught.value)


def test_no_setting_changes_nothing():
    loaded = settings.load({})
    assert not loaded.accelerates and loaded.log == "INFO"


def test_msmodelslim_files_load(tmp_path, cache_file):
    schedule = write(tmp_path / "searched_schedule.txt", [0.0, 0.25, 0.5, 1.0])
    loaded = settings.load({"OSACCEL_CACHE_CONFIG": cache_file, "OSACCEL_TIMESTEPS": schedule})
    assert dict(loaded.cache) == GOOD
    assert loaded.timesteps == (1000.0, 500.0, 250.0, 0.0)


def test_option_wins_over_variable_over_yaml(tmp_path, cache_file):
    other = write(tmp_path / "other.json", dict(GOOD, cache_num_blocks=1))
    inline = write(
        tmp_path / "all.yaml",
        "cache: {cache_block_start: 0, cache_num_blocks: 7, cache_step_start: 0, cache_step_interval: 5}\nlog: debug\n",
    )
    environ = {"OSACCEL_CONFIG": inline}
    assert settings.load(environ).cache.cache_num_blocks == 7
    assert settings.load(environ).log == "DEBUG"
    environ["OSACCEL_CACHE_CONFIG"] = cache_file
    assert settings.load(environ).cache.cache_num_blocks == 3
    assert settings.load(environ, {"cache_config": other}).cache.cache_num_blocks == 1


def test_yaml_paths_are_relative_to_the_yaml_file(tmp_path, cache_file, monkeypatch):
    write(tmp_path / "steps.txt", [0.1, 0.9])
    everything = write(tmp_path / "all.yml", "cache: dit_cache_config.json\nsampling:\n  timesteps: steps.txt\n")
    monkeypatch.chdir("/")
    loaded = settings.load({"OSACCEL_CONFIG": everything})
    assert dict(loaded.cache) == GOOD and loaded.timesteps == (900.0, 100.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (dict(GOOD, cache_block_start=-1), "cache_block_start must be a non-negative integer, got -1"),
        (dict(GOOD, cache_step_interval=0), "cache_step_interval must be a positive integer, got 0"),
        (
            dict(GOOD, cache_num_blocks=2.5),
            "cache_num_blocks must be a non-negative integer, got 2.5 (a number of type",
        ),
        (dict(GOOD, cache_num_blocks=True), "cache_num_blocks must be a non-negative integer, got True (a boolean)"),
        (dict(GOOD, cache_num_blocks="3"), "cache_num_blocks must be a non-negative integer, got '3' (text)"),
        (dict(GOOD, cache_step_sart=1), "unknown key 'cache_step_sart'. Did you mean 'cache_step_start'?"),
        ({"cache_block_start": 1}, "missing keys cache_num_blocks, cache_step_start, cache_step_interval"),
        ([1, 2], "expected a mapping with cache_block_start"),
        ("{not json", "not valid JSON"),
        ('{"cache_block_start": 1, "cache_block_start": 2}', "the key 'cache_block_start' stands there twice"),
    ],
)
def test_wrong_cache_configs(tmp_path, content, expected):
    path = write(tmp_path / "cache.json", content)
    message = message_of({"OSACCEL_CACHE_CONFIG": path})
    assert message.startswith(path) and expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([0.1, 0.1, 0.2], "entries 0 and 1 are the same timestep, 0.1"),
        ([0.1, 0.3, 0.2], "the list must ascend, but entry 2 (0.2) is below entry 1 (0.3)"),
        ([0.1, 1.5], "entry 1 must be in [0, 1], got 1.5"),
        ([0.1, float("nan")], "entry 1 must be in [0, 1], got nan"),
        ([0.1, "0.2"], "entry 1 must be a number in [0, 1], got '0.2' (text)"),
        ([0.1], "a list of at least two timesteps is needed, got 1"),
        ({"a": 1}, "expected a list of numbers in [0, 1], ascending, got a mapping"),
    ],
)
def test_wrong_timestep_lists(tmp_path, content, expected):
    path = write(tmp_path / "searched_schedule.txt", content)
    message = message_of({"OSACCEL_TIMESTEPS": path})
    assert message.startswith(path) and expected in message


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"OSACCEL_CACHE_CONF": "x"},
            "OSACCEL_CACHE_CONF: unknown environment variable. Did you mean 'OSACCEL_CACHE_CO",
        ),
        ({"OSACCEL_LOG": "LOUD"}, "OSACCEL_LOG: unknown log level 'LOUD'. Allowed: DEBUG, INFO, WARNING, ERROR."),
        ({"OSACCEL_STRICT": "maybe"}, "OSACCEL_STRICT: expected one of 1, true, yes, on"),
        ({"OSACCEL_SEARCH": "dit_cahce"}, "OSACCEL_SEARCH: unknown search 'dit_cahce'. Did you mean 'dit_cache'?"),
        ({"OSACCEL_CACHE_RATIO": "3"}, "OSACCEL_CACHE_RATIO: expected a number in (1, 2], got '3'"),
        ({"OSACCEL_CACHE_RATIO": "3\x1f"}, "OSACCEL_CACHE_RATIO: expected a number in (1, 2], got '3\\x1f'"),
        ({"OSACCEL_CACHE_RATIO": "1_5"}, "OSACCEL_CACHE_RATIO: expected a number in (1, 2], got '1_5'"),
        ({"OSACCEL_SEARCH_PROMPTS": "010"}, "OSACCEL_SEARCH_PROMPTS: expected a whole number of at least 1, got '010'"),
        ({"OSACCEL_TARGET_STEPS": "50,x"}, "OSACCEL_TARGET_STEPS: expected a whole number of at least 1, got 'x'"),
        ({"OSACCEL_CACHE_CONFIG": "no/such.json"}, "no/such.json: cannot be read: No such file or directory."),
        (
            {"OSACCEL_CONFIG": "plan.json"},
            "plan.json: the settings file must end in .yaml or .yml. OSACCEL_PLAN, or --plan, takes a plan alone.",
        ),
    ],
)
def test_wrong_variables(environ, expected):
    assert expected in message_of(environ)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("cach: x\n", "unknown key 'cach'. Did you mean 'cache'?"),
        ("sampling: {timestep: x}\n", "sampling: unknown key 'timestep'. Did you mean 'timesteps'?"),
        ("sampling: [1]\n", "sampling: expected a mapping with timesteps, got a list."),
        ("cache: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("cache: {cache_block_start: 1}\n", "cache: missing keys"),
    ],
)
def test_wrong_yaml(tmp_path, content, expected):
    path = write(tmp_path / "all.yaml", content)
    message = message_of({"OSACCEL_CONFIG": path})
    assert message.startswith(path) and expected in message


PLAN = {"format": "osaccel.plan/1", "steps": 10, "skip": [3]}
MINDIE = {"method": "dit_block_cache", "blocks_count": 4, "steps_count": 10}
TAKERS = {"PLAN": PLAN, "CACHE_CONFIG": GOOD, "TIMESTEPS": [0.1, 0.9], "CONFIG": {"plan": "plan.json", "log": "INFO"}}


@pytest.mark.parametrize("variable", TAKERS)
@pytest.mark.parametrize("other", TAKERS)
def test_a_file_of_another_kind_is_answered_with_the_setting_that_takes_it(tmp_path, variable, other):
    path = write(tmp_path / "file.yaml", TAKERS[other])
    # The four keys are a plan too.
    if variable == other or (variable, other) == ("PLAN", "CACHE_CONFIG"):
        return
    message = message_of({f"OSACCEL_{variable}": path})
    option = "--" + other.lower().replace("_", "-")
    assert message.startswith(path) and message.endswith(f" OSACCEL_{other}, or {option}, takes such a file.")


def test_no_other_setting_is_named_where_the_kind_is_right_or_unknown(tmp_path):
    path = write(tmp_path / "cache.json", {**GOOD, "cache_num_blocks": -1})
    for variable in ("OSACCEL_CACHE_CONFIG", "OSACCEL_PLAN"):
        assert "takes such a file" not in message_of({variable: path})
    assert "takes such a file" not in message_of({"OSACCEL_PLAN": write(tmp_path / "x.json", {"a": 1})})
    mindie = write(tmp_path / "mindie.json", MINDIE)
    assert "OSACCEL_PLAN, or --plan, takes such a file." in message_of({"OSACCEL_CACHE_CONFIG": mindie})


def test_a_picture_is_no_text(tmp_path):
    path = tmp_path / "plan.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert message_of({"OSACCEL_PLAN": str(path)}) == f"{path}: cannot be read: it is not a text file (UTF-8)."


def test_a_directory_is_not_a_file(tmp_path):
    assert "cannot be read: Is a directory." in message_of({"OSACCEL_CACHE_CONFIG": str(tmp_path)})


def test_disable_needs_no_valid_file():
    assert settings.load({"OSACCEL_DISABLE": "1", "OSACCEL_CACHE_CONFIG": "no/such.json"}).disable


def test_files_written_load_again_and_hold_exactly_the_known_content(tmp_path):
    from osaccel.dit_cache_config import DitCacheConfig

    config = tmp_path / "new" / "dit_cache_config.json"
    write_cache_config(str(config), DitCacheConfig(**GOOD))
    assert json.loads(config.read_text()) == GOOD
    schedule = tmp_path / "searched_schedule.txt"
    write_timesteps(str(schedule), [999.0, 500.5, 0.0])
    assert read_timesteps(str(schedule)) == pytest.approx((999.0, 500.5, 0.0))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["searched_schedule.txt"]
