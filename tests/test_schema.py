# SPDX-License-Identifier: Apache-2.0
"""The JSON schema of plan files says what the reader says: examples of the docs and of searches, and what is wrong."""

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from osaccel import formats, settings, strict_yaml
from osaccel.dit_cache_config import CACHE_KEYS
from osaccel.formats import SettingsError

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "osaccel" / "plan.schema.json").read_text())
TYPES = {"object": dict, "array": list, "integer": int, "number": (int, float)}
PLAN = {"format": "osaccel.plan/1", "steps": 12, "skip": [5], "conditional_only": [3, 7],
        "regions": [{"start": 1, "stop": 4, "reuse": [8], "order": 1}, {"start": 6, "stop": 9}],
        "correction": {"predictor": 0, "corrector": [0.5] * 12}, "made_for": {"steps": 12}, "measured": {}}  # fmt: skip
FOUR = {"cache_step_start": 0, "cache_step_interval": 1, "cache_block_start": 2, "cache_num_blocks": 0}
EIGHT = {"method": "dit_block_cache", "blocks_count": 6, "steps_count": 12, "step_start": 3, "step_interval": 3,
         "step_end": 10, "block_start": 1, "block_end": 5}  # fmt: skip


def accepts(schema, value):
    """As JSON schema 2020-12 says, as far as our schema goes; a keyword that is not known here is an error."""
    unknown = set(schema) - {*RULES, "$schema", "$defs", "title", "description", "properties"}
    assert not unknown, unknown
    return all(RULES[keyword](schema, value) for keyword in schema if keyword in RULES)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def keeps_properties(schema, value):
    known = schema["properties"]
    return not isinstance(value, dict) or all(key in known and accepts(known[key], value[key]) for key in value)


RULES = {
    "$ref": lambda s, v: accepts(SCHEMA["$defs"][s["$ref"].rpartition("/")[2]], v),
    "anyOf": lambda s, v: any(accepts(option, v) for option in s["anyOf"]),
    "type": lambda s, v: isinstance(v, TYPES[s["type"]]) and not isinstance(v, bool),
    "const": lambda s, v: v == s["const"],
    "enum": lambda s, v: v in s["enum"],
    "minimum": lambda s, v: not is_number(v) or v >= s["minimum"],
    "maximum": lambda s, v: not is_number(v) or v <= s["maximum"],
    "items": lambda s, v: not isinstance(v, list) or all(accepts(s["items"], item) for item in v),
    "uniqueItems": lambda s, v: not isinstance(v, list) or len({json.dumps(item) for item in v}) == len(v),
    "required": lambda s, v: not isinstance(v, dict) or set(s["required"]) <= set(v),
    # The only form in which it stands there: nothing but the properties.
    "additionalProperties": keeps_properties,
}


def schema_accepts(value):
    """By the small reader above, and by jsonschema where it is installed: they must agree."""
    here = accepts(SCHEMA, value)
    if find_spec("jsonschema"):
        import jsonschema

        assert jsonschema.Draft202012Validator(SCHEMA).is_valid(value) == here
    return here


def reader_accepts(value):
    try:
        formats.parse_plan(copy.deepcopy(value), "x")
    except SettingsError:
        return False
    return True


def documented():
    """Every JSON and YAML example of a plan in the docs, and the demo's files."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        for language, text in re.findall(r"^```(json|yaml)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            if language == "yaml":
                content = strict_yaml.parse(text)
                if "format" in content:
                    yield content
            else:
                yield json.loads(re.sub(r" *(#|//) .*", "", text))
    for name in ("plan.json", "dit_cache_config.json"):
        yield json.loads((ROOT / "osaccel" / "demo" / "configs" / name).read_text())


def changed(content, **changes):
    return {key: value for key, value in {**content, **changes}.items() if value is not ...}


VALID = [PLAN, FOUR, EIGHT, {"format": "osaccel.plan/1", "steps": 1}, changed(EIGHT, step_end=..., block_start=...)]
REGION = {"start": 1, "stop": 4}
INVALID = [
    {}, [], None, "plan.json", {"steps": 12}, changed(PLAN, format=...), changed(PLAN, format="osaccel.plan/2"),
    changed(PLAN, steps=...), changed(PLAN, steps=0), changed(PLAN, steps="12"), changed(PLAN, steps=True),
    changed(PLAN, skipp=[1]), changed(PLAN, skip=[0]), changed(PLAN, skip=5), changed(PLAN, skip=None),
    changed(PLAN, skip=["5"]), changed(PLAN, skip=[5, 5]), changed(PLAN, conditional_only=[-1]),
    changed(PLAN, regions={}), changed(PLAN, regions=[{"start": 1}]), changed(PLAN, regions=[{**REGION, "stop": 0}]),
    changed(PLAN, regions=[{**REGION, "order": 2}]), changed(PLAN, regions=[{**REGION, "order": False}]),
    changed(PLAN, regions=[{**REGION, "reuse": [0]}]), changed(PLAN, regions=[{**REGION, "blocks": 3}]),
    changed(PLAN, correction={"corrector": 1.5}), changed(PLAN, correction={"corrector": "1"}),
    changed(PLAN, correction={"strength": 1}), changed(PLAN, correction=1),
    changed(PLAN, correction={"predictor": None}),
    changed(PLAN, correction={"predictor": [True] * 12}), changed(PLAN, made_for=[]), changed(PLAN, measured=None),
    changed(FOUR, cache_num_blocks=...), changed(FOUR, cache_step_interval=0), changed(FOUR, cache_block_start=-1),
    changed(FOUR, cache_step_start=1_000_001), changed(FOUR, cache_steps=1), {**PLAN, **FOUR},
    changed(EIGHT, method="attention_cache"), changed(EIGHT, method=...), changed(EIGHT, blocks_count=0),
    changed(EIGHT, steps_count=10_001), changed(EIGHT, step_interval=0), changed(EIGHT, block_end=-1),
    changed(EIGHT, step_start=None), changed(EIGHT, interval=2),
]  # fmt: skip


def test_valid_examples_are_valid_for_both():
    examples = [*VALID, *documented()]
    assert len(examples) > 9
    for content in examples:
        assert reader_accepts(content) and schema_accepts(content), content


@pytest.mark.parametrize("content", INVALID, ids=lambda content: json.dumps(content)[-60:])
def test_what_is_wrong_is_refused_by_both(content):
    assert not reader_accepts(content) and not schema_accepts(content)


@pytest.mark.parametrize(
    "content",
    [
        changed(PLAN, skip=[12]),
        changed(PLAN, skip=[3]),
        changed(PLAN, skip=[8]),
        changed(PLAN, regions=[{"start": 4, "stop": 4}]),
        changed(PLAN, regions=[REGION, {"start": 3, "stop": 9}]),
        changed(PLAN, correction={"corrector": [1.0] * 11}),
    ],
    ids=str,
)
def test_what_docs_files_md_says_a_schema_cannot_say(content):
    assert schema_accepts(content) and not reader_accepts(content)


def test_the_schema_has_every_key_of_the_reader():
    parts = SCHEMA["$defs"]
    assert tuple(parts["plan"]["properties"]) == formats._PLAN_KEYS
    assert tuple(parts["region"]["properties"]) == formats._REGION_KEYS
    assert tuple(parts["plan"]["properties"]["correction"]["properties"]) == formats._CORRECTION_KEYS
    assert set(parts["dit_cache_config"]["properties"]) == set(CACHE_KEYS)
    assert tuple(parts["mindie_sd"]["properties"]) == ("method", *formats._MINDIE_KEYS)


def test_the_settings_file_of_the_docs_is_read(tmp_path):
    (text,) = (
        found
        for found in re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/files.md").read_text(), re.MULTILINE | re.DOTALL)
        if "search:" in found
    )
    file = tmp_path / "osaccel.yaml"
    file.write_text(text)
    found = settings.load({}, {"config": str(file)})
    assert found.search == "plan" and found.plan_output == str(tmp_path / "plan.json")
    assert [str(goal) for goal in found.target] == ["2x", "3x"] and found.search_prompts == 4
    # Without the search the same file samples with the plan.
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    file.write_text(re.sub(r"^search:\n( .*\n)+", "", text, flags=re.MULTILINE))
    assert settings.load({}, {"config": str(file)}).plan == formats.parse_plan(PLAN, "x")
