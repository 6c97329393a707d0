# SPDX-License-Identifier: Apache-2.0
"""What docs/migration.md promises to users of msModelSlim and MindIE-SD, its own snippets included."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from osaccel import compat, formats, run, settings
from osaccel.adaptors import DitCacheAdaptor, DitCacheSearchConfig, ReStepAdaptor
from osaccel.formats import SettingsError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migration.md").read_text(encoding="utf-8")
EIGHT = {
    "method": "dit_block_cache", "blocks_count": 6, "steps_count": 12, "step_start": 3, "step_interval": 3,
    "step_end": 10, "block_start": 1, "block_end": 5,
}  # fmt: skip


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def process(code, *path):
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {list(map(str, path))}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True)


class Pipeline(tiny.UnseededPipeline):
    """Gives its video as the upstream does: one 8-bit tensor (videos, T, H, W, C)."""

    def __call__(self, **arguments):
        latents = super().__call__(**arguments)
        return SimpleNamespace(images=(latents.reshape(1, 5, 8, 1, 1) * 50 + 128).clamp(0, 255).to(torch.uint8))


# Files --------------------------------------------------------------------------------------------------------------


def test_the_example_with_comments_is_read(tmp_path):
    four, eight = snippets("json")
    (tmp_path / "four.json").write_text(four, encoding="utf-8")
    (tmp_path / "eight.json").write_text(eight, encoding="utf-8")
    assert formats.read_cache_config(str(tmp_path / "four.json")).to_dict() == {
        "cache_block_start": 8, "cache_num_blocks": 4, "cache_step_start": 20, "cache_step_interval": 2,
    }  # fmt: skip
    plan = formats.read_plan(str(tmp_path / "eight.json"))
    assert (plan.steps, plan.regions[0].start, plan.regions[0].stop) == (100, 8, 28)


@pytest.mark.parametrize("text", ['{"a": "http://x # y"}', '{"a": "\\"//#"} # b', '// c\n{"a": 1}', '{"a":\n# b\n1}'])
def test_comments_end_lines_and_are_none_inside_a_text(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    plain = "\n".join(line for line in text.split("\n") if not line.startswith(("#", "//"))).replace("} # b", "}")
    assert formats.read_file(str(path)) == json.loads(plain)


@pytest.mark.parametrize("text", ['{"a": 1 / 2}', "{# }", '{"a" # b', "// only"])
def test_a_comment_makes_nothing_valid_that_is_not(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SettingsError, match="not valid JSON"):
        formats.read_file(str(tmp_path / "x.json"))


def test_eight_fields_are_the_plan_that_mindie_sd_runs():
    plan = formats.parse_plan(EIGHT, "x")

    def reuses(step, block):
        """MindIE-SD's rule, written out."""
        if not 3 <= step < 10 or (step - 3) % 3 == 0:
            return False
        return 1 <= block < 5

    (region,) = plan.regions
    for step in range(12):
        for block in range(6):
            assert reuses(step, block) == (step in region.reuse and region.start <= block < region.stop)
    assert plan.steps == 12 and plan.made_for == {"steps": 12, "blocks": 6}


def test_eight_fields_have_mindie_sd_s_defaults_and_our_messages(tmp_path):
    three = {"method": "dit_block_cache", "blocks_count": 6, "steps_count": 12}
    assert formats.parse_plan(three, "x").is_plain
    plan = formats.parse_plan({**three, "step_interval": 2}, "x")
    assert (plan.regions[0].start, plan.regions[0].stop) == (0, 6) and plan.regions[0].reuse == (1, 3, 5, 7, 9, 11)
    assert formats.parse_plan({**EIGHT, "block_start": 5}, "x").is_plain
    path = tmp_path / "c.json"
    path.write_text(json.dumps(EIGHT))
    assert settings.load({"OSACCEL_PLAN": str(path)}).accelerates
    for wrong, expected in (
        ({"method": "attention_cache"}, "x: method must be 'dit_block_cache', got 'attention_cache'"),
        ({"steps_count": 0}, "x: steps_count must be an integer of at least 1, got 0"),
        ({"steps_count": 10**6}, "x: steps_count must be at most 10000"),
        ({"step_strat": 1}, "x: unknown key 'step_strat'. Did you mean 'step_start'?"),
        ({"block_end": True}, "x: block_end must be an integer of at least 0, got True"),
    ):
        with pytest.raises(SettingsError, match=re.escape(expected)):
            formats.parse_plan({**EIGHT, **wrong}, "x")
    with pytest.raises(SettingsError, match="x: missing key blocks_count"):
        formats.parse_plan({"method": "dit_block_cache", "steps_count": 3}, "x")


def test_a_region_from_eight_fields_survives_being_written():
    plan = formats.parse_plan(EIGHT, "x")
    assert formats.parse_plan(formats.plan_content(plan), "x") == plan


# Flags --------------------------------------------------------------------------------------------------------------


def test_every_former_option_is_in_the_table_and_every_option_in_the_table_exists():
    table = PAGE[PAGE.index("## Flags") : PAGE.index("## Files")]
    assert [name for name in run.FORMER_OPTIONS if f"`{name}" not in table and f" {name} " not in table] == []
    known = {setting.option for setting in settings.TABLE}
    right = re.findall(r"^\|[^|]*\|([^|]*)\|$", table, re.MULTILINE)
    assert {option for cell in right for option in re.findall(r"--[a-z]+(?:-[a-z]+)*\b(?!_)", cell)} <= known


# Python -------------------------------------------------------------------------------------------------------------


def test_the_page_s_snippets_run(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    compat.install()
    pipeline = Pipeline()
    names = {"pipeline": pipeline}
    for snippet in snippets("python"):
        exec(compile(snippet, "docs/migration.md", "exec"), names)
    assert names["found"] == names["adaptor"].dit_cache_config and names["ReStepAdaptor"] is ReStepAdaptor
    names["adaptor"].detach()
    compat.uninstall()


def test_a_search_needs_no_seeds_of_the_callback():
    """Candidates are compared on the same noise: with the plain run's, nothing differs where nothing is reused."""
    pipeline, seen = Pipeline(), []
    adaptor = DitCacheAdaptor(pipeline, DitCacheSearchConfig(cache_ratio=1.3, num_sampling_steps=10))

    def callback(given):
        seen.append(torch.get_rng_state())
        return given(num_inference_steps=10).images

    adaptor.search(callback)
    adaptor.detach()
    assert len(seen) > 1 and all(torch.equal(state, seen[0]) for state in seen)


@pytest.mark.parametrize("kind", [list, tuple, lambda videos: videos, lambda videos: videos.numpy()])
def test_a_search_takes_what_pipelines_return(kind):
    pipeline = Pipeline()
    adaptor = DitCacheAdaptor(pipeline, DitCacheSearchConfig(cache_ratio=1.3, num_sampling_steps=10))
    assert adaptor.search(lambda given: kind(given(num_inference_steps=10).images)) == adaptor.dit_cache_config
    with pytest.raises(ValueError, match="length equal to prompts_num: 1!=2"):
        adaptor.search(lambda given: kind(given(num_inference_steps=10).images), prompts_num=2)
    adaptor.detach()


def test_the_adaptors_are_loaded_when_they_are_asked_for():
    code = (
        "import osaccel\nassert 'torch' not in sys.modules\n"
        "print(osaccel.DitCacheAdaptor.__name__, 'torch' in sys.modules)"
    )
    assert process(code).stdout.split() == ["DitCacheAdaptor", "True"]
    assert "has no attribute 'DitCacheAdapter'" in process("import osaccel; osaccel.DitCacheAdapter").stderr


def test_compat_gives_msmodelslim_s_names_without_torch_until_one_is_used():
    code = (
        "import osaccel.compat, msmodelslim.pytorch.multi_modal.dit_cache as module\n"
        "assert 'torch' not in sys.modules\n"
        "from msmodelslim.pytorch.multi_modal.dit_cache import DitCacheSearchConfig\n"
        "from msmodelslim.pytorch.multi_modal.sampling_optimization import ReStepAdaptor\n"
        "print(DitCacheSearchConfig.__module__, ReStepAdaptor.__module__)\n"
        "try: module.Other\n"
        "except AttributeError as error: print(error)\n"
        "import msmodelslim.quant"
    )
    result = process(code)
    assert result.stdout.splitlines()[0] == "osaccel.adaptors.dit_cache osaccel.adaptors.restep", result.stderr
    assert "of osaccel.compat, has no attribute 'Other'" in result.stdout
    assert "ModuleNotFoundError: No module named 'msmodelslim.quant'" in result.stderr


def test_compat_never_shadows_nor_completes_the_real_package(tmp_path):
    (tmp_path / "msmodelslim" / "pytorch").mkdir(parents=True)
    for place in ("msmodelslim", "msmodelslim/pytorch"):
        (tmp_path / place / "__init__.py").write_text("real = True\n")
    code = "import osaccel.compat, msmodelslim.pytorch\nprint(msmodelslim.real)\nimport msmodelslim.pytorch.multi_modal"
    result = process(code, tmp_path)
    assert result.stdout == "True\n" and "No module named 'msmodelslim.pytorch.multi_modal'" in result.stderr
    assert "No module named 'msmodelslim'" in process("import osaccel, msmodelslim").stderr


def test_seed_everything_seeds_with_the_rank(monkeypatch):
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    monkeypatch.setenv("RANK", "3")
    ReStepAdaptor.seed_everything(39)
    found = torch.rand(3)
    torch.manual_seed(42)
    assert torch.equal(found, torch.rand(3))
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
