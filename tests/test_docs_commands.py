# SPDX-License-Identifier: Apache-2.0
"""Every command of the pages is run: here, by the test that is named, or not, for the reason that is given.

A command that stands in no list fails. What takes longer is run with DOCS_COMMANDS=all. Only sizes and placeholders are
replaced: the miniature stands for the upstream, with few steps on one rank.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Tuple

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("imageio")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "osaccel" / "demo"
PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/reference/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
# What begins like this is a command, alone in a line or among words.
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|pip|uv|ruff|mypy|torchrun|bash|twine|\.ci/run)\b|[A-Z_]+=\S+ \S")
STEPS = 24


def commands(text):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shell = "".join(content for language, content in fences if language in ("", "bash", "sh", "shell"))
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = shell.replace("\\\n", " ").splitlines() + re.findall(r"^    (\S.*)$", rest, re.MULTILINE)
    for words in [*lines, *re.findall(r"`([^`]+)`", rest)]:
        words = " ".join(words.partition(" # ")[0].split())
        if COMMAND.match(words):
            yield words


FOUND = {words: page for page in reversed(PAGES) for words in commands((ROOT / page).read_text(encoding="utf-8"))}


class Run(NamedTuple):
    """Run in a folder of its own, or where the repository is.

    Args:
        shows: what its output must hold.
        sizes: what is replaced, besides what stands for the upstream.
    """

    shows: str
    sizes: Tuple[Tuple[str, str], ...] = ()
    quick: bool = False
    in_repository: bool = False


class RunBy(NamedTuple):
    """A test runs it; its file holds these words."""

    file: str
    words: str


class NotHere(NamedTuple):
    reason: str


COMMAND_WORD, SCRIPT = "COMMAND...", "python -m opensora.sample.sample_t2v"
SAMPLES, BLOCKS = "save path videos", "blocks computed"
INSTALLS = NotHere("installs from the index; .ci/run does so in a fresh environment")
ALONE = NotHere("a name in a sentence, not a whole command")
SEARCH = (
    "OSACCEL_SEARCH=plan OSACCEL_TARGET=2x OSACCEL_SEARCH_PROMPTS=24 OSACCEL_PLAN=plan.json python -m osaccel.run "
    "torchrun --nproc_per_node 8 -m opensora.sample.sample_t2v_sp ..."
)
HOW = {
    SEARCH: Run("found a plan for 2x", (("PROMPTS=24", "PROMPTS=4"),), quick=True),
    "OSACCEL_PLAN=plan.json python -m osaccel.run torchrun --nproc_per_node 8 -m opensora.sample.sample_t2v_sp ...":
        Run(BLOCKS, quick=True),
    "python -m osaccel.report plan.json": Run("plan.json.report.html", quick=True),
    "python -m osaccel.report FILE": Run("plan.json.report.html", (("FILE", "plan.json"),)),
    "python -m osaccel.doctor --plan plan.yaml": Run("3 steps skipped", quick=True),
    "python -m osaccel.run --help": Run("OSACCEL_CALIBRATION_VIDEOS", quick=True),
    "python -m osaccel.doctor -- COMMAND...": Run("Nothing is set", ((COMMAND_WORD, SCRIPT),)),
    "python -m osaccel.doctor OPTIONS -- COMMAND...":
        Run("ideal speed-up", (("OPTIONS", "--plan plan.json"), (COMMAND_WORD, SCRIPT))),
    "python -m osaccel.doctor [options] -- COMMAND...":
        Run("ideal speed-up", (("[options]", "--plan plan.json"), (COMMAND_WORD, SCRIPT))),
    "python -m osaccel.doctor": Run("versions"),
    "python -m osaccel.doctor --json": Run('"findings"'),
    "python -m osaccel.run torchrun ... -m opensora.sample.sample_t2v_sp_on_npu ...": Run(SAMPLES),
    "python -m osaccel.run torchrun ... -m opensora.sample.sample_t2v_sp ...": Run(SAMPLES),
    "python -m osaccel.run python -m opensora.sample.sample_t2v --device cpu ...": Run(SAMPLES),
    "OSACCEL_CORRECTION=1 python -m osaccel.run torchrun ... -m opensora.sample.sample_t2v_sp ... "
    "--num_sampling_steps 25": Run("25 steps (default timesteps) begins: corrected"),
    "OSACCEL_PLAN=plan.json python -m osaccel.run torchrun ... -m opensora.sample.sample_t2v_sp ...": Run(BLOCKS),
    "python -m osaccel.run OPTIONS torchrun ... -m opensora.sample.sample_t2v_sp ...":
        Run(BLOCKS, (("OPTIONS", "--plan plan.json"),)),
    "python -m osaccel.run --config osaccel.yaml torchrun ... -m opensora.sample.sample_t2v_sp ...":
        Run("found a plan for 1.5x", (("--config", "--plan config.json --config"),)),
    "OSACCEL_SEARCH=plan OSACCEL_TARGET=2x OSACCEL_PLAN=plan.json ...same command...":
        Run("found a plan for 2x", (("plan.json", "again.json"),
            ("...same command...", "python -m osaccel.run torchrun ... -m opensora.sample.sample_t2v_sp ..."))),
    "python -m venv .venv && . .venv/bin/activate": Run(""),
    "ruff check . && ruff format --check . && mypy": Run("Success: no issues found", in_repository=True),
    "python -m pytest tests/test_plan.py": Run(" passed", (("tests/", "-q tests/"),), in_repository=True),
    "python -m pytest tests/test_report.py": Run(" passed", (("tests/", "-q tests/"),), in_repository=True),
    "FUZZ_EXAMPLES=100000 python -m pytest tests/test_fuzz.py -k many":
        Run(" passed", (("100000", "100"), ("tests/", "-q tests/")), in_repository=True),
    "SIGKILL_MOMENTS=40 python -m pytest tests/test_journal.py -k killed":
        RunBy("test_journal.py", '"SIGKILL_MOMENTS"'),
    "python -m benchmarks.oracle --corrections --steps 50 25 15 --mixture 300 --mixtures 16 --videos 256":
        Run("energy", (("50 25 15", "6 4"), ("mixtures 16", "mixtures 2"), ("videos 256", "videos 16 --batch 8"))),
    "python -m benchmarks.overhead": Run("every action", (("overhead", "overhead --pairs 1"),)),
    "python -m benchmarks.reference.evaluate": Run("valid", (("evaluate", "evaluate --prompts 2 --steps 10"),)),
    "python -m benchmarks.reference.evaluate --prompts 200":
        Run("valid", (("--prompts 200", "--prompts 2 --steps 10"),)),
    "python -m benchmarks.reference.redundancy": Run("", (("redundancy", "redundancy --prompts 1 --steps 5"),)),
    "python -m benchmarks.reference.redundancy --prompts 4": Run("", (("--prompts 4", "--prompts 1 --steps 5"),)),
    "pip install -c constraints.txt -e \".[demo]\" && python -m osaccel.demo": RunBy("test_demo.py", '"osaccel.demo"'),
    "python -m osaccel.demo --search": RunBy("test_demo.py", '"--search"'),
    "pip install -c constraints.txt -e \".[test]\" && python -m pytest": RunBy("../.ci/run", "python -m pytest"),
    "python -m benchmarks.plans --prompts 48 --targets 2,1.6,3,1.3,4 --videos 96 --kept DIR [--model second]":
        Run("osaccel plan", (("--prompts 48 --targets 2,1.6,3,1.3,4 --videos 96 --kept DIR [--model second]",
            "--kept kept --videos 2 --prompts 1 --steps 24 --targets 2 --work 2 --only ours"),)),
    "python -m benchmarks.plans --prompts 24 --first 24 --probed 24 --only ours ...":
        RunBy("test_benchmarks_plans.py", '"ours"'),
    "python -m benchmarks.goals --goals psnr:50,psnr:45,psnr:40,error:0.02 --prompts 24 --probed 24 --videos 96 "
    "--kept DIR":
        Run("held out", (("psnr:50,psnr:45,psnr:40,error:0.02 --prompts 24 --probed 24 --videos 96 --kept DIR",
            "psnr:40,error:0.1 --prompts 1 --videos 1 --steps 24 --kept kept"),)),
    "python -m benchmarks.corrections --work DIR --response 16 [--model second]":
        Run("the response foresees", (("DIR --response 16 [--model second]",
            "work --prompts 1 --batch 2 --computed --steps --samplers --response 1"),)),
    "python -m benchmarks.corrections --work DIR --prompts 96 --steps --samplers":
        Run("12 computed, corrector and response", (("DIR --prompts 96 --steps --samplers",
            "work --prompts 1 --batch 2 --computed 12 --steps --samplers"),)),
    "python -m benchmarks.corrections --work DIR --prompts 64 --samplers":
        Run("gap to 100 steps closed", (("DIR --prompts 64 --samplers",
            "work --prompts 2 --batch 2 --computed 12 --steps 12 --samplers"),)),
    "python -m benchmarks.corrections --work DIR --prompts 16 --samplers 50 25":
        Run("gap to 100 steps closed", (("DIR --prompts 16 --samplers 50 25",
            "work --prompts 2 --batch 2 --computed 12 --steps 12 --samplers"),)),
    "SOAK=200 python -m pytest tests/test_soak.py": RunBy("test_soak.py", '"SOAK"'),
    "python tests/matrix.py": RunBy("test_packaging.py", "matrix.try_cell("),
    "python -m benchmarks.wall miniature": RunBy("test_wall_benchmark.py", "wall.miniature("),
    "python -m benchmarks.wall steps --size 29x480p 29x240p --device cuda --checkout CHECKOUT --steps 20 --repeats 2":
        RunBy("test_wall_benchmark.py", "wall_steps.main("),
    "python -m benchmarks.reference.train --out DIR": RunBy("test_reference.py", "train"),
    "python -m osaccel.report": RunBy("test_report.py", "report.main("),
    "python -m osaccel.run": RunBy("test_launcher.py", "osaccel.run"),
    "OSACCEL_UPSTREAM=/path/to/Open-Sora-Plan-1.2.0 python -m pytest tests/upstream": NotHere("needs the upstream"),
    "python -m pytest": NotHere("is what runs this"),
    ".ci/run": NotHere("runs this, in a fresh environment"),
    "python -m build && twine check --strict dist/*": NotHere("needs build and twine, which no extra brings"),
    "python -m benchmarks.windows": NotHere("takes hours; test_benchmarks_plans.py tests what it computes"),
    "python -m benchmarks.reference.curve --out DIR": NotHere("needs a training's folder"),
    "python -m benchmarks.reference.export --out DIR": NotHere("needs a training's folder, and writes the checkpoint"),
    "python -m benchmarks.reference.errors --out DIR": NotHere("needs a training's folder"),
    "pip install .": INSTALLS,
    "pip install -c constraints.txt -e \".[bench]\"": INSTALLS,
    "pip install -c constraints.txt -e \".[test]\"": INSTALLS,
    "pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt -e \".[test]\"": INSTALLS,
    "pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt -e \".[demo]\"": INSTALLS,
    "uv pip install --torch-backend cpu -c constraints.txt -e \".[test]\"": INSTALLS,
    "uv pip install --torch-backend cpu -c constraints.txt -e \".[demo]\"": INSTALLS,
    **dict.fromkeys(["torchrun ...", "python ...", "bash script.sh", "python -m benchmarks.", "python -m",
                     "pip install", "python -c", "python -S"], ALONE),
}  # fmt: skip


def test_every_command_is_run_or_has_a_reason_why_not():
    assert [f"{page}: {words}" for words, page in FOUND.items() if words not in HOW] == []
    assert [words for words in HOW if words not in FOUND] == []
    for how in HOW.values():
        if isinstance(how, RunBy):
            assert how.words in (ROOT / "tests" / how.file).read_text(), how


def ready(words, how):
    """The command with sizes and the miniature in place."""
    for old, new in how.sizes:
        assert old in words, old
        words = words.replace(old, new)
    options = (
        f"--model_path {DEMO}/checkpoint/model --ae_path {DEMO}/checkpoint/vae --text_encoder_name "
        f"{DEMO}/checkpoint/text_encoder --save_img_path videos --num_sampling_steps {STEPS} --seed 0 "
        f"--text_prompt prompts.txt"
    )
    one = "torchrun --standalone --nproc_per_node 1"
    words = words.replace("torchrun --nproc_per_node 8", one).replace("torchrun ...", one)
    words = re.sub(r"sample_t2v(_sp(_on_npu)?)?( --device cpu)? \.\.\.", rf"sample_t2v\3 {options}", words)
    assert "..." not in words
    return words


def go(words, how, folder):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OSACCEL_")}
    environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environ["PATH"]])
    environ["PYTHONPATH"] = os.pathsep.join([str(DEMO), str(ROOT)])
    done = subprocess.run(
        ready(words, how), shell=True, cwd=ROOT if how.in_repository else folder, env=environ, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0 and how.shows in said, said[-4000:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a reader has it who has searched a plan and copied the files of docs/files.md."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(DEMO / "checkpoint" / "prompts.txt", folder / "all.txt")
    (folder / "prompts.txt").write_text("\n".join((folder / "all.txt").read_text().splitlines()[:4]))
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/files.md").read_text(), re.MULTILINE | re.DOTALL)
    plan, config = sorted(blocks, key=lambda block: "search:" in block)
    (folder / "plan.yaml").write_text(plan)
    # So few steps leave no plan for 3x, and one prompt is enough.
    (folder / "osaccel.yaml").write_text(config.replace("2x, 3x", "1.5x, 2x").replace("prompts: 4", "prompts: 1"))
    go(SEARCH, HOW[SEARCH], folder)
    (folder / "prompts.txt").write_text((folder / "all.txt").read_text().splitlines()[0])
    return folder


@pytest.mark.parametrize("words", [words for words, how in HOW.items() if isinstance(how, Run)])
def test_the_command_does_what_its_page_says(words, place):
    how = HOW[words]
    if not how.quick and os.environ.get("DOCS_COMMANDS") != "all":
        pytest.skip("takes longer; DOCS_COMMANDS=all runs it")
    if words != SEARCH:
        go(words, how, place)
    else:
        assert (place / "plan.json").exists() and (place / "plan.json.report.npz").exists()
