# SPDX-License-Identifier: Apache-2.0
"""Runs the unmodified Open-Sora-Plan v1.2.0 scripts; needs OSACCEL_UPSTREAM and an environment that imports them.

OSACCEL_UPSTREAM names an unpacked checkout of tag v1.2.0 with tiny checkpoints beside it in `<checkout>/../tiny`
(model, vae, mt5, prompts.txt), written by make_tiny_checkpoints.py. The same Python must import the upstream on a CPU.

UPSTREAM_DEVICE=cuda runs the same tests on GPUs, sample_t2v_sp with nccl and one rank per GPU, two at most; those that
need more ranks are skipped. UPSTREAM_RANKS says how many ranks there may be, for a place in which several share a GPU.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CHECKOUT = os.environ.get("OSACCEL_UPSTREAM", "")
TINY = os.path.join(os.path.dirname(os.path.abspath(CHECKOUT)), "tiny")
# Not named OSACCEL_...: of those a process with osaccel accepts only the ones it knows.
DEVICE, RANKS = os.environ.get("UPSTREAM_DEVICE", "cpu"), os.environ.get("UPSTREAM_RANKS")


def pytest_collection_modifyitems(items):
    reason = ""
    if not CHECKOUT:
        reason = "OSACCEL_UPSTREAM names no Open-Sora-Plan v1.2.0 checkout"
    elif not os.path.isdir(os.path.join(CHECKOUT, "opensora", "sample")):
        reason = f"OSACCEL_UPSTREAM={CHECKOUT} has no opensora/sample"
    elif not os.path.isdir(os.path.join(TINY, "model")):
        reason = f"no tiny checkpoints in {TINY}"
    for item in items:
        if reason and os.path.dirname(__file__) in str(item.fspath):
            item.add_marker(pytest.mark.skip(reason=reason))


# Beside what the scripts save, tests count the calls of each block: the user's own sitecustomize does it.
COUNTING_SITECUSTOMIZE = """
    import importlib.abc, importlib.util, json, os, sys

    class CountBlocks(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != "opensora.models.diffusion.opensora.modules":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), count(module.BasicTransformerBlock))
            return spec

    def count(block_class):
        original, calls = block_class.forward, []

        def forward(self, *args, **kwargs):
            if not hasattr(self, "counted_as"):
                self.counted_as = len(calls)
                calls.append(0)
            calls[self.counted_as] += 1
            with open(os.path.join(os.environ["COUNT_DIR"], "calls_" + os.environ.get("RANK", "0")), "w") as file:
                json.dump(calls, file)
            return original(self, *args, **kwargs)

        block_class.forward = forward

    if "COUNT_DIR" in os.environ:
        sys.meta_path.insert(0, CountBlocks())
"""
METHOD = "EulerAncestralDiscrete"
# Of the tiny transformer.
BLOCKS = 6


def most_ranks():
    """How many ranks may run here."""
    if RANKS is not None:
        return int(RANKS)
    return 4 if DEVICE == "cpu" else torch.cuda.device_count()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def enough(ranks):
    """That number, or the test is skipped."""
    if ranks > most_ranks():
        pytest.skip(f"needs {ranks} ranks, and {most_ranks()} can run here")
    return ranks


class Upstream:
    """Runs the scripts, each distinct command once per session."""

    def __init__(self, folder):
        self.folder, self.runs = folder, {}
        self.site = folder / "site"
        self.site.mkdir()
        self.on_cpu = DEVICE == "cpu"
        (self.site / "sitecustomize.py").write_text(textwrap.dedent(COUNTING_SITECUSTOMIZE))

    def run(
        self, script="sample_t2v", prefix=(), sitecustomize=None, steps=8, method=METHOD, frames=5, extra=(),
        ranks=None, **environ,
    ):  # fmt: skip
        ranks = min(2, most_ranks()) if ranks is None else enough(ranks)
        key = json.dumps([script, prefix, sitecustomize, steps, method, frames, extra, ranks, environ])
        if key not in self.runs:
            self.runs[key] = self._run(script, prefix, sitecustomize, steps, method, frames, extra, ranks, environ)
        return self.runs[key]

    def ranks_of(self, script):
        """The names of a script's ranks, where a test does not ask for a number of them."""
        return ["0"] if script == "sample_t2v" else [str(rank) for rank in range(min(2, most_ranks()))]

    def run_file(self, name, ranks, *arguments):
        """Run a Python file that lies here, on `ranks` ranks, with the tiny checkpoints; returns what it printed."""
        here = os.path.dirname(os.path.abspath(__file__))
        command = [sys.executable]
        if enough(ranks) > 1:
            command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", free_port()]
        environ = dict(os.environ, PYTHONHASHSEED="3", OMP_NUM_THREADS="1")
        environ.update(PYTHONPATH=os.pathsep.join([CHECKOUT, ROOT]), UPSTREAM_DEVICE=DEVICE)
        command += [os.path.join(here, name), TINY, *arguments]
        ended = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400)
        return ended.stdout.decode()

    def found(self, name, ranks, *arguments):
        """The same; returns what each rank printed behind FOUND."""
        output = self.run_file(name, ranks, *arguments)
        # Ranks print at once, now and then on one line.
        found = [json.loads(text) for text in re.findall(r"FOUND (\{.*?\})", output)]
        assert len(found) == ranks, output[-4000:]
        return found

    def _run(self, script, prefix, sitecustomize, steps, method, frames, extra, ranks, variables):
        out = self.folder / str(len(self.runs))
        out.mkdir()
        site = self.site
        if sitecustomize:
            site = out / "site"
            site.mkdir()
            (site / "sitecustomize.py").write_text(sitecustomize + (self.site / "sitecustomize.py").read_text())
        environ = dict(os.environ, PYTHONHASHSEED="3", UPSTREAM_SEED="5", OMP_NUM_THREADS="1", COUNT_DIR=str(out))
        environ.pop("OSACCEL_UPSTREAM")
        environ.update(PYTHONPATH=os.pathsep.join([str(site), CHECKOUT, ROOT]), **variables)
        command = [*prefix, *self._command(script, out, steps, method, frames, ranks), *extra]
        if script != "sample_t2v" and self.on_cpu:
            environ["FAKE_CUDA_ON_CPU"] = "1"
        return finish(command, environ, out, stop_after_first_round=script != "sample_t2v")

    def _command(self, script, out, steps, method, frames, ranks):
        start = [sys.executable]
        if script != "sample_t2v":
            start += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", free_port()]
        options = {
            "model_path": f"{TINY}/model", "ae": "CausalVAEModel_D4_4x8x8", "ae_path": f"{TINY}/vae",
            "text_encoder_name": f"{TINY}/mt5", "text_prompt": f"{TINY}/prompts.txt", "save_img_path": out / "videos",
            "cache_dir": out / "cache", "num_frames": frames, "height": 64, "width": 64, "num_sampling_steps": steps,
            "guidance_scale": 7.5, "max_sequence_length": 32, "sample_method": method, "model_type": "dit", "fps": 8,
        }  # fmt: skip
        if script == "sample_t2v":
            options["device"] = DEVICE
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*start, "-m", f"opensora.sample.{script}", *words]


class Result:
    def __init__(self, status, log, out):
        self.status, self.log, self.out = status, log, out
        videos = sorted((out / "videos").glob("*")) if (out / "videos").exists() else []
        # The grid of all videos repeats the single ones, and is still being written when a round ends.
        self.videos = {path.name: path.read_bytes() for path in videos if not re.match(r"[A-Za-z0-9]+_gs", path.name)}
        # By rank, of every block. The script of several ranks loops, and loads its model again.
        self.calls = {path.name[6:]: json.loads(path.read_text())[:BLOCKS] for path in out.glob("calls_*")}
        # A progress bar of the script may stand before a line, on the same one.
        self.summaries = re.findall(r"\[osaccel\] generation:.*", log)


def finish(command, environ, out, stop_after_first_round, limit=400):
    """Run to the end; sample_t2v_sp samples again forever, so it is stopped when its first round is saved."""
    with open(out / "log", "w") as log:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # torchrun's workers have sessions of their own, but it ends them when it is asked to end.
        signal.signal(signal.SIGALRM, lambda *_: process.terminate())
        signal.alarm(limit)
        for line in process.stdout:
            log.write(line)
            if stop_after_first_round and line.startswith("save path"):
                process.terminate()
        signal.alarm(0)
    status = process.wait()
    return Result(status, (out / "log").read_text(), out)


@pytest.fixture(scope="session")
def upstream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    yield Upstream(folder)
    shutil.rmtree(folder, ignore_errors=True)
