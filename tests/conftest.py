# SPDX-License-Identifier: Apache-2.0
"""What every test starts from: no OSACCEL_* variable of the developer's own, deterministic CPU threads."""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("OSACCEL_") and name != "OSACCEL_UPSTREAM":
            monkeypatch.delenv(name)
