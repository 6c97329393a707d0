# SPDX-License-Identifier: Apache-2.0
"""One warning at exit when settings ask for something and nothing was accelerated; status 1 when they are strict.

Only a process that samples may warn: it has imported a known pipeline or diffusers' base class of all pipelines, is
no child of multiprocessing and has started none (those may be the ones that sample). So torchrun's parent, data loader
workers, pip and `python -c` say nothing; nor does a script that ended with a traceback or was asked for its --help.
"""

import logging
import os
import sys
from typing import Optional

from osaccel import log
from osaccel import settings as settings_module
from osaccel.messages import SettingsError
from osaccel.settings import Settings
from osaccel.targets import TARGETS

logger = logging.getLogger("osaccel")

# What this process did: a generation was accelerated or searched on; a line said why one was not.
accelerated = False
explained = False


def report() -> None:
    """At exit: warn, or end with status 1, when this process sampled without what its settings ask for."""
    if accelerated or _is_helper() or _ended_otherwise():
        return
    settings = _settings()
    if settings is None or not (settings.accelerates or settings.search):
        return
    log.prepare()
    wanted = ", ".join(place for name, place in settings.sources.items() if name not in ("config", "log", "strict"))
    if not explained and os.environ.get("RANK", "0") == "0":
        logger.warning("settings ask for acceleration (%s), but nothing was accelerated: %s", wanted, _reason())
    if settings.strict:
        logger.error("OSACCEL_STRICT is set and nothing was accelerated")
        log.flush_streams()
        # The exit status is decided already when this runs.
        os._exit(1)


def _settings() -> Optional[Settings]:
    pipelines = sys.modules.get("osaccel.hooks.pipelines")
    known: Optional[Settings] = getattr(pipelines, "_settings", None)
    try:
        return known or settings_module.load(os.environ)
    except SettingsError as error:
        if not explained:
            log.prepare()
            logger.error("%s", error)
        return None


def _is_helper() -> bool:
    process = sys.modules.get("multiprocessing.process")
    if process is None:
        return False
    # The counter is the only trace of children that have ended.
    started = repr(getattr(process, "_process_counter", "count(1)")) != "count(1)"
    return started or process.parent_process() is not None


def _ended_otherwise() -> bool:
    return hasattr(sys, "last_value") or hasattr(sys, "last_exc") or not {"-h", "--help"}.isdisjoint(sys.argv)


def _reason() -> str:
    imported = [name for name in TARGETS if name in sys.modules]
    if imported:
        return f"{imported[0]} was imported, but {TARGETS[imported[0]].pipeline_class}.__call__ was never reached"
    return f"no known pipeline was imported ({', '.join(TARGETS)})"
