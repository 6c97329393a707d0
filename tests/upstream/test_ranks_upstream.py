# SPDX-License-Identifier: Apache-2.0
"""The unmodified two-rank script where one rank's node got no OSACCEL_* variables, as some launchers leave it."""

import json

LAUNCHER = ("python", "-m", "osaccel.run")
CACHE = {"cache_block_start": 1, "cache_num_blocks": 4, "cache_step_start": 2, "cache_step_interval": 2}
# Runs in every process before the script: what is forwarded to the node of rank 1 is PYTHONPATH alone.
FORGET = """
import os
if os.environ.get("RANK") == "1":
    os.environ.pop("OSACCEL_CACHE_CONFIG", None)
"""


def test_a_rank_without_variables_samples_with_those_of_rank_0(upstream, tmp_path):
    path = tmp_path / "dit_cache_config.json"
    path.write_text(json.dumps(CACHE))
    environ = {"OSACCEL_CACHE_CONFIG": str(path)}
    both = upstream.run("sample_t2v_sp", prefix=LAUNCHER, ranks=2, **environ)
    one = upstream.run("sample_t2v_sp", prefix=LAUNCHER, sitecustomize=FORGET, ranks=2, **environ)
    assert len(one.videos) == 2 and one.videos == both.videos, one.log[-3000:]
    assert one.calls == both.calls
    assert "rank 1 has no osaccel settings and takes those of rank 0" in one.log
