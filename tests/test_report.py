# SPDX-License-Identifier: Apache-2.0
"""The report pages: each kind from its own sidecar, escaped, self-contained, and rendered where there is a browser."""

import html.parser
import json
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from osaccel import settings
from osaccel.formats import SettingsError, plan_content
from osaccel.plan import Correction, Plan, Region
from osaccel.report import cache as cache_page
from osaccel.report import page as report
from osaccel.report import plan as plan_page
from osaccel.report import timesteps as list_page
from osaccel.report import words

BOUND = {"steps": 8, "blocks": 4, "sampler": "DDIM<b>", "resolution": [29, 480, 640], "guidance_scale": 7.5}
NASTY = 'a dog\'s <script>alert("1")</script> & it'
CHOSEN = {"cache_step_start": 1, "cache_step_interval": 2, "cache_block_start": 0, "cache_num_blocks": 2}
PLAN = Plan(
    steps=8, skip=(2,), conditional_only=(4, 5), regions=(Region(1, 3, (3,)), Region(3, 4, (6,), 1)),
    correction=Correction(corrector=1.0),
)  # fmt: skip


def evaluation(plan, error, **more):
    return {"config": plan_content(plan), "error": error, "resumed_at": 2, "seconds": 1.0, "psnr": None, **more}


def of_plan():
    probe = Plan(steps=8, conditional_only=(4, 6))
    return {
        "kind": "plan", "date": "2026-01-02", "goal": "2x", "plan": plan_content(PLAN), "work": PLAN.work(4),
        "error": 0.2, "predicted_error": 0.05, "psnr": 31.0, "prompts": [NASTY, ["two", "three"], None],
        "fingerprint": BOUND, "versions": {"osaccel": "0"}, "windows": {"first": 2, "length": 3, "actions": ["a", "b"]},
        "cost": {"plain_generations": 5.2, "plain_seconds": 3.0, "seconds": 4000.0, "recording_bytes": 3 << 20},
        "gains": {"skip": [0.1, 1.2]}, "curves": {"together": [[0.4, 0.1], [1.0, 0.0]], "skipped": [[0.5, 0.2]]},
        "evaluations": [evaluation(probe, 0.01), evaluation(PLAN, 0.2, seconds=0.1), evaluation(Plan(steps=8), None)],
    }  # fmt: skip


def of_cache():
    runs = [{"error": 0.1, "predicted_speed_up": 1.4, "config": CHOSEN, "measured_speed_up": 1.3},
            {"error": None, "predicted_speed_up": 1.5}]  # fmt: skip
    return {
        "chosen": CHOSEN, "speed_up": 1.4, "error": 0.1, "cost": {"plain_generations": 3.0, "recording_bytes": 4096},
        "evaluations": runs, "fingerprint": BOUND, "delta_change": [[1.0] * 4] * 8, "prompts": [NASTY],
    }  # fmt: skip


def of_list():
    curve = {"4": 0.5, "8": 0.1}
    return {
        "kind": "restep", "method": "wdp", "parameters": {"max_gap": 2.0}, "teacher_steps": 8, "fingerprint": BOUND,
        "lists": {"4": [999.0, 700.0, 300.0, 0.0]}, "cost_curve": curve, "cost_curve_even": {"4": 0.9, "8": 0.1},
        "prompts": [NASTY],
    }  # fmt: skip


CASES = {"plan": (of_plan, 3), "dit_cache": (of_cache, 4), "restep": (of_list, 2)}


@pytest.fixture(params=CASES)
def written(request, tmp_path):
    """The page's path, its text, its number of pictures, and the kind."""
    make, pictures = CASES[request.param]
    (tmp_path / "found.json.report.json").write_text(json.dumps(make()))
    if request.param != "restep":
        frames = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8, 3), np.uint8)
        name = "plan" if request.param == "plan" else "cached"
        np.savez(str(tmp_path / "found.json.report.npz"), **{"plain": frames[0], name: frames[1]})
    path = report.write(report.load(str(tmp_path / "found.json")))
    return path, open(path, encoding="utf-8").read(), pictures, request.param


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes, and that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self._open = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def test_a_page_is_whole_self_contained_and_escaped(written):
    _, text, pictures, _ = written
    elements = Elements(text).found
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert len(images) == pictures and all(len(image["alt"]) > 20 for image in images)
    loaded = [value for _, attributes in elements for key, value in attributes.items() if key in ("src", "srcset")]
    assert all(value.startswith("data:image/png;base64,") for value in loaded) and len(loaded) == 2 * pictures
    assert not [tag for tag, _ in elements if tag in ("script", "link", "b")]
    assert "&lt;script&gt;" in text and "DDIM&lt;b&gt;" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in elements
    assert "prefers-color-scheme: dark" in text


def test_a_page_says_what_to_do_next(written):
    path, text, _, kind = written
    option = {"plan": "--plan", "dit_cache": "--cache-config", "restep": "--timesteps"}[kind]
    found = path[: -len(".report.html")]
    assert f"<pre>python -m osaccel.run {option} {found} -- COMMAND...</pre>" in text
    assert "What to do next" in text and "29 frames of 640 x 480" in text


def test_the_plan_page_says_what_was_measured_and_what_predicted(tmp_path):
    (tmp_path / "p.json.report.json").write_text(json.dumps(of_plan()))
    shown = plan_page.content(report.load(str(tmp_path / "p.json")))
    said = " ".join([*shown.found, shown.following])
    assert "error of the final latents 0.2 (0 is the plain video), PSNR of the frames 31.00 dB. Predicted" in said
    assert "Predicted before it was run: 0.05" in said
    assert "4.0 times as large as predicted" in said and "more than the saved work explains" in said
    runs = shown.tables[0]
    assert len(runs.rows) == 3 and runs.rows[runs.marked[0]][0] == plan_page.said(PLAN)
    assert "skipped 2; conditional only 4–5; blocks 1 to 2 reused at 3; block 3 forecast at 6" in runs.rows[0][0]
    assert shown.facts["What the search took"]["recordings kept"] == "3.0 MiB"
    assert shown.prompts == [NASTY, "two", "three"]


def test_a_plan_that_nothing_was_predicted_of_says_nothing_of_a_prediction():
    """As one that skips steps evenly; it comes from no windows."""
    windows = {"first": 2, "length": 3, "actions": []}
    shown = plan_page.content({**of_plan(), "predicted_error": None, "windows": windows, "stem": "p.json"})
    assert not any("redicted" in sentence for sentence in shown.found)
    assert [table.title for table in shown.tables] == ["What was run"]
    assert [table.title for table in plan_page.content({**of_plan(), "stem": "p.json"}).tables][1:] == [
        "Windows of the search"
    ]


@pytest.mark.parametrize("make, file", [(of_plan, "plan"), (of_cache, "file")])
def test_a_page_asks_to_compare_frames_only_where_there_are_some(make, file):
    frames = {"plain": np.zeros((3, 8, 8, 3), np.uint8), "other": np.zeros((3, 8, 8, 3), np.uint8)}
    pages = [
        report.content_of({"kind": "dit_cache", **make(), "stem": "x", "frames": found}) for found in (frames, None)
    ]
    assert [page.figures[-1].name == "frames" for page in pages] == [True, False]
    assert ["Compare the frames below" in page.following for page in pages] == [True, False]
    assert all(f"run your command with the {file}" in page.following.lower() for page in pages)
    assert all("search again" in page.following for page in pages)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"goal": "2x", "work": 0.5}, "loses less, such as OSACCEL_TARGET=1.5x."),
        ({"goal": "1.001x", "work": 0.999}, "plain ones, sample without it."),
        ({"goal": "error:0.3", "error": 0.25}, "loses less, such as OSACCEL_TARGET=error:0.12."),
        ({"goal": "error:1e-07", "error": 5e-8}, "loses less, such as OSACCEL_TARGET=error:2.5e-08."),
        ({"goal": "psnr:30", "psnr": 31.0}, "loses less, such as OSACCEL_TARGET=psnr:37."),
        ({"goal": "psnr:198", "psnr": 199.0}, "plain ones, sample without it."),
        ({"goal": "error:0.1", "keeps": False}, "plain ones, sample more steps and search again."),
    ],
)
def test_another_target_is_of_the_same_kind_and_one_that_is_taken(changed, said):
    page = plan_page.content({**of_plan(), **changed, "stem": "p.json"})
    assert page.following.endswith(said), page.following
    for target in re.findall(r"OSACCEL_TARGET=(\S+)\.$", page.following):
        settings.load({"OSACCEL_TARGET": target})
    assert any("not reached" in sentence for sentence in page.found) is not changed.get("keeps", True)


@pytest.mark.parametrize("milder", ["error:0.013", None])
def test_a_plan_that_changes_nothing_is_not_recommended(tmp_path, milder):
    plain, path = Plan(steps=8), tmp_path / "p.json.report.json"
    nothing = {"goal": "error:1e-07", "plan": plan_content(plain), "work": 1.0, "error": 0.0, "predicted_error": 0.0}
    runs = [evaluation(plain, 0.0, resumed_at=8), evaluation(PLAN, 0.2)]
    path.write_text(json.dumps({**of_plan(), **nothing, "milder": milder, "evaluations": runs}))
    text = open(report.write(report.load(str(path))), encoding="utf-8").read()
    assert "this plan computes every step in full and gains nothing" in text
    assert f"milder target{', such as OSACCEL_TARGET=error:0.013' if milder else ''}." in text
    assert "osaccel.run" not in text and "COMMAND" not in text and "<p>In time" not in text
    assert not re.search(r"OSACCEL_TARGET=[\d.]+x", text)


def colours_of_dots(shown):
    """By place in per cent of work, as they are in the picture."""
    canvas = Figure()
    plan_page.draw_curve(shown, canvas)
    dots = canvas.axes[0].collections[0]
    found = {round(x): to_hex(colour) for (x, _), colour in zip(dots.get_offsets(), dots.get_facecolors())}
    lines = {line.get_label(): to_hex(line.get_color()) for line in canvas.axes[0].lines if line.get_linestyle() != ":"}
    return found, lines


def test_dots_have_the_colour_of_their_family_s_line():
    alone = {
        "skipped": Plan(steps=8, skip=(2,)),
        "conditional only": Plan(steps=8, conditional_only=(3, 4, 5, 6)),
        "reused": Plan(steps=8, regions=(Region(1, 4, (2, 4, 6)),)),
        "forecast": Plan(steps=8, regions=(Region(1, 4, (2, 4, 5, 6), 1),)),
    }
    mixed = Plan(steps=8, skip=(2, 4), regions=(Region(1, 4, (3, 5)),))
    runs = [evaluation(plan, 0.1) for plan in (*alone.values(), mixed)]
    curves = {name: [[0.4, 0.1], [0.9, 0.01]] for name in ("together", *alone)}
    shown = {**of_plan(), "curves": curves, "evaluations": runs}
    dots, lines = colours_of_dots(plan_page.Shown(shown))
    places = {name: round(100 * plan.work(4)) for name, plan in alone.items()}
    assert len({*places.values(), round(100 * mixed.work(4))}) == 5 and len(set(lines.values())) == 5
    assert {name: dots[place] for name, place in places.items()} == {
        name: lines[f"predicted, {name} alone"] for name in alone
    }
    assert dots[round(100 * mixed.work(4))] == lines["predicted, all families"]
    # Where one family is all there is, it is all families.
    dots, lines = colours_of_dots(plan_page.Shown({**shown, "curves": {"together": curves["together"]}}))
    assert set(dots.values()) == {lines["predicted, all families"]}


def test_a_column_in_which_nothing_is_known_is_left_out():
    """As PSNR where no frames were decoded; what is chosen stays marked."""
    shown = plan_page.content({**of_plan(), "stem": "p.json"})
    assert "PSNR in dB" not in shown.tables[0].columns
    assert all(len(row) == len(shown.tables[0].columns) for row in shown.tables[0].rows)
    with_psnr = of_plan()
    with_psnr["evaluations"][0]["psnr"] = 41.5
    assert plan_page.content({**with_psnr, "stem": "p.json"}).tables[0].columns[-1] == "PSNR in dB"


def test_a_list_s_page_says_which_list_its_command_applies():
    several = {**of_list(), "lists": {"4": [999.0, 0.0], "6": [999.0, 0.0]}, "stem": "x.6.txt"}
    several["fingerprint"] = {**BOUND, "steps": 6}
    shown = list_page.content(several)
    assert "applies the list of 6 steps" in shown.following and "--num_sampling_steps 6" in shown.following
    assert "of its own beside this one" in shown.following and "x.6.txt -- COMMAND" in shown.command
    assert "beside this one" not in list_page.content({**of_list(), "stem": "x.txt"}).following


def test_the_picture_shows_halves_regions_and_skipped_steps():
    c, h, r, f, s = range(5)
    rows = plan_page.rows_of(PLAN, 8, 4)
    assert [row.height for row in rows] == [0.25, 0.5, 0.25] * 2
    assert [row.label for row in rows[:2]] == ["conditional, block 0", "conditional, blocks 1–2"]
    assert [row.kinds for row in rows] == [
        [c, c, s, c, c, c, c, c], [c, c, s, r, c, c, c, c], [c, c, s, c, c, c, f, c],
        [c, c, s, c, h, h, c, c], [c, c, s, r, h, h, c, c], [c, c, s, c, h, h, f, c],
    ]  # fmt: skip
    assert len(plan_page.rows_of(PLAN, 8, 4, is_guided=False)) == 3


def test_the_map_of_a_cache(tmp_path):
    shown = {**of_cache(), "fingerprint": {"blocks": 3}, "delta_change": [[1.0] * 3] * 4}
    assert cache_page.compute_map(shown).tolist() == [[1, 1, 0, 1]] * 2 + [[1, 1, 1, 1]]


def test_a_file_without_a_report_is_told_from_one_that_does_not_exist(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert report.main([str(path)]) == 2
    assert capsys.readouterr().err == (
        f"osaccel: error: {path}: does not exist; a search that failed or is not finished writes no file.\n"
    )
    path.write_text(json.dumps(plan_content(PLAN)))
    assert report.main([str(path)]) == 2
    assert capsys.readouterr().err == (
        f"osaccel: error: {path}: nothing to show: no search wrote a report beside it (plan.json.report.json).\n"
    )
    assert report.main([f"{path}.report.json"]) == 2 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "other"}', '{"kind": "plan"}', "{"])
def test_what_is_no_report_is_refused_in_one_line(tmp_path, capsys, content):
    (tmp_path / "x.json.report.json").write_text(content)
    assert report.main([str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("osaccel: error:") and error.count("\n") == 1


@pytest.mark.parametrize("kind", [of_plan, of_cache, of_list])
def test_a_damaged_report_is_refused_in_one_line(tmp_path, capsys, kind):
    """Whatever is exchanged in it; what only shows when it is drawn too."""
    damages = [
        ("fingerprint", 3), ("fingerprint", dict(BOUND, blocks=10**9)), ("evaluations", [[]]), ("lists", {"x": "y"}),
        ("windows", {"first": 0, "length": 10**9, "actions": [1] * 9}), ("curves", {"together": [[1, "a"]]}),
        ("delta_change", [["a"]]), ("cost_curve", {"4": "a"}), ("cost", [1]),
    ]  # fmt: skip
    used = 0
    for key, value in damages:
        (tmp_path / "found.report.json").write_text(json.dumps({**kind(), key: value}))
        status = report.main([str(tmp_path / "found")])
        said = capsys.readouterr().err
        assert status == 0 or (status == 2 and said.count("\n") == 1 and "cannot be shown as a" in said), said
        used += status == 2
    assert used >= 4


@pytest.mark.parametrize(
    "damage, said",
    [
        ({"kind": []}, "not a report of a search"),
        ({"kind": {"plan": 1}}, "not a report of a search"),
        ({"windows": {"first": -(10**9), "length": 10**8, "actions": ["full"] * 10}}, "before the first step"),
        ({"windows": {"first": 0, "length": 10**8, "actions": ["full"] * 10}}, "too many to be shown"),
        ({"evaluations": [{"config": {"format": "osaccel.plan/1", "steps": 10**20}}]}, "steps must be at most 10000"),
    ],
)
def test_a_number_or_a_kind_that_is_none_costs_neither_time_nor_a_traceback(tmp_path, damage, said):
    path = tmp_path / "plan.json.report.json"
    path.write_text(json.dumps({**of_plan(), **damage}))
    with pytest.raises(SettingsError, match=said):
        report.content_of(report.load(str(path)))


def test_damaged_frames_are_refused_in_one_line(tmp_path, capsys):
    """A bit anywhere in them, or few bytes that expand to many."""
    (tmp_path / "found.report.json").write_text(json.dumps(of_plan()))
    frames, picked = np.zeros((2, 8, 8, 3), np.uint8), random.Random(0)
    np.savez_compressed(tmp_path / "found.report.npz", plain=frames, plan=frames)
    whole = (tmp_path / "found.report.npz").read_bytes()
    for _ in range(300):
        place = picked.randrange(len(whole))
        spoilt = whole[:place] + bytes([whole[place] ^ 1 << picked.randrange(8)]) + whole[place + 1 :]
        (tmp_path / "found.report.npz").write_bytes(spoilt)
        try:
            report.content_of(report.load(str(tmp_path / "found")))
        except report.SettingsError as error:
            assert "cannot be read as frames" in str(error) or "cannot be shown" in str(error)
    np.savez_compressed(tmp_path / "found.report.npz", plain=np.zeros(65 << 20, np.uint8), plan=frames)
    assert report.main([str(tmp_path / "found")]) == 2 and "more than 67108864 bytes" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.json.report.json").write_text(json.dumps(of_list()))
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    assert report.main([str(tmp_path / "x.json")]) == 2
    assert "the report needs jinja2: pip install jinja2" in capsys.readouterr().err


def test_numbers_in_words():
    assert [words.size(n) for n in (512, 1536, 200 << 20, 3 << 30)] == ["512 bytes", "1.5 KiB", "200 MiB", "3.0 GiB"]
    assert [words.duration(s) for s in (0.25, 42, 90, 3725)] == ["0.2 s", "42 s", "2 min", "1 h 2 min"]
    assert words.spans([3, 5, 7, 9, 11]) == "3, 5, … 11" and words.spans([1, 2, 3, 7]) == "1–3, 7"
    assert words.times(1, "step") == "1 step" and words.number(None) == "–"


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_page_renders_without_scrolling_sideways(written, width, tmp_path):
    path, text, _, _ = written
    # The browser's own measure of the page, put where --dump-dom shows it.
    probe = tmp_path / "probe.html"
    measure = "<script>onload = () => { document.title = 'wide ' + document.documentElement.scrollWidth }</script>"
    probe.write_text(text.replace("</body>", measure + "</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert int(dumped.split("<title>wide ")[1].split("<")[0]) <= width
