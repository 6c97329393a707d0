# SPDX-License-Identifier: Apache-2.0
"""benchmarks.wall at its smallest: a video taken apart with and without osaccel, and single steps timed."""

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from benchmarks import wall, wall_steps  # noqa: E402

CACHE = {"cache_block_start": 1, "cache_num_blocks": 10, "cache_step_start": 0, "cache_step_interval": 2}


def test_a_video_of_the_miniature_is_taken_apart(tmp_path):
    config = tmp_path / "dit_cache_config.json"
    config.write_text(json.dumps(CACHE))
    script = wall.miniature(4, ["a red circle moves left"])
    arms = [wall.Arm("plain", None), wall.Arm("nothing set", ()), wall.Arm("cache", ("--cache-config", str(config)))]
    runs = wall.measure(script, arms, 1, tmp_path / "runs")
    plain, idle, cached = (wall.digests(runs[arm.name]) for arm in arms)
    assert plain == idle != cached
    (video,) = runs["plain"][0][0]
    assert all(video[part] > 0 for part in wall.PARTS)
    assert video["denoising"] > video["text"]
    lines = wall.table(runs, 1).splitlines()
    assert len(lines) == 5 and lines[2].startswith("| plain | 0 |") and lines[2].endswith("| as plain |")
    assert lines[4].endswith("| others |")


def test_a_script_that_fails_is_an_error_with_its_output(tmp_path):
    script = wall.Script(str(tmp_path), "opensora.sample.no_such_script", ())
    with pytest.raises(RuntimeError, match="No module named"):
        wall.take_apart(script, wall.Arm("plain", None), tmp_path / "run")


def test_ratios_are_of_medians_on_the_same_rank():
    def run(*seconds):
        return [[{**dict.fromkeys((*wall.PARTS, wall.PROCESSOR), second), "digest": "d"}] for second in seconds]

    runs = {"plain": [run(1.0, 2.0), run(3.0, 2.0), run(2.0, 2.0)], "half": [run(1.0, 0.5)]}
    rows = wall.table(runs, 2).splitlines()
    assert rows[4].startswith("| half | 0 | 1.00 (0.50) |") and rows[5].startswith("| half | 1 | 0.50 (0.25) |")


def test_single_steps_are_timed(capsys, tmp_path):
    file = tmp_path / "steps.json"
    wall_steps.main(wall.parse_args(["steps", "--steps", "6", "--repeats", "1", "--json", str(file)]))
    rows = json.loads(file.read_text())["small"]
    assert rows["plain"]["error"] == 0 == rows["mask left out"]["error"] == rows["recorded for a search"]["error"]
    assert rows["four keys"]["ideal"] == pytest.approx(36 / 30) and rows["four keys"]["error"] > 0
    # Two full steps, then everything, all but the first of six blocks, nothing, and one half.
    assert rows["plan, 3x"]["ideal"] == pytest.approx(6 / (3 + 1 / 6 + 1 / 2))
    assert rows["corrected"]["ideal"] == 1 and rows["corrected"]["error"] > 0
    assert all(0 < row["beside"] < row["seconds"] and row["added"] < 1 for row in rows.values())
    assert rows["mask left out"]["added"] == 0 and rows["recorded for a search"]["host"] > 0
    table = capsys.readouterr().out.strip().splitlines()
    assert [line.split(" | ")[0][2:] for line in table if line.startswith("| ")][1:] == list(rows)


def test_the_published_size_needs_the_upstream():
    with pytest.raises(SystemExit, match="--size 93x720p needs --checkout"):
        wall_steps.main(wall.parse_args(["steps", "--size", "93x720p"]))
