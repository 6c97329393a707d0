# SPDX-License-Identifier: Apache-2.0
"""Wraps the known pipelines' `__call__`: each call runs inside a Generation; a hook itself never raises."""

import inspect
import logging
import os
import threading
import weakref
from dataclasses import replace
from typing import Any, Callable, Dict, Optional

import wrapt

from osaccel import log, schedule
from osaccel import settings as settings_module
from osaccel.formats import SettingsError
from osaccel.hooks import agreement, silence
from osaccel.settings import Settings
from osaccel.targets import TARGETS, Target

logger = logging.getLogger("osaccel")

_settings: Optional[Settings] = None
_session: Optional[Any] = None
# The thread in which a pipeline runs, by the pipeline's id.
_running: Dict[int, int] = {}
_entering = threading.Lock()
_warned = set()  # type: ignore[var-annotated]
# Of models that were asked for theirs.
_digests: "weakref.WeakKeyDictionary[Any, Optional[str]]" = weakref.WeakKeyDictionary()


def wrap_pipeline(module: Any) -> None:
    """Post-import hook: wrap the target class of `module`; what is wrong here is reported, never raised."""
    log.prepare()
    target = TARGETS[module.__name__]
    pipeline_class = getattr(module, target.pipeline_class, None)
    if pipeline_class is None or "__call__" not in vars(pipeline_class):
        _warn_unrecognised(f"{module.__name__} has no class {target.pipeline_class} with a __call__ of its own")
        return
    own = _own_wrapper(pipeline_class)
    if own is not None:
        own._self_wrapper.is_active = True
        return
    wrapt.wrap_function_wrapper(module, target.pipeline_class + ".__call__", _Call(target))
    agreement.announce()
    try:
        current_settings()
    except SettingsError as error:
        silence.explained = True
        logger.error("%s", error)


def unwrap_pipeline(module: Any) -> None:
    """Undo `wrap_pipeline`."""
    pipeline_class: Any = getattr(module, TARGETS[module.__name__].pipeline_class, object)
    wrapper = _own_wrapper(pipeline_class)
    if wrapper is not None and wrapper is vars(pipeline_class)["__call__"]:
        pipeline_class.__call__ = wrapper.__wrapped__
    elif wrapper is not None:
        # Another tool has wrapped it since, and keeps what it wrapped.
        wrapper._self_wrapper.is_active = False


def _own_wrapper(pipeline_class: Any) -> Any:
    """Our wrapper of the class's `__call__`, which other tools may have wrapped before and after; None without one."""
    found = vars(pipeline_class).get("__call__")
    while found is not None and not isinstance(getattr(found, "_self_wrapper", None), _Call):
        found = getattr(found, "__wrapped__", None)
    return found


def current_settings() -> Settings:
    """The settings of this process, read when first needed and then frozen."""
    global _settings
    if _settings is None:
        _settings = settings_module.load(os.environ)
    return _settings


def _agreed_settings(target: Target) -> Settings:
    """The settings of this process; under sequence parallelism, those with which all ranks sample alike."""
    global _settings
    group = target.sequence_parallel_group()
    if group is None or agreement.is_settled():
        return current_settings()
    own: agreement.Own
    try:
        own = current_settings()
    except SettingsError as error:
        own = error
    _settings = agreement.agree(own, group)
    return _settings


class _Call:
    """A wrapt wrapper for a known pipeline's `__call__`; its type tells it from other tools' wrappers."""

    def __init__(self, target: Target):
        self.target, self.is_active = target, True

    def __call__(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        if not self.is_active:
            return wrapped(*args, **kwargs)
        log.prepare()
        settings = _agreed_settings(self.target)
        if settings.disable or not (settings.accelerates or settings.search) or not _enter(instance, settings):
            return wrapped(*args, **kwargs)
        try:
            if settings.search:
                return _search(wrapped, instance, args, kwargs, self.target, settings)
            return _generate(wrapped, instance, args, kwargs, self.target, settings)
        finally:
            del _running[id(instance)]


def _enter(pipeline: Any, settings: Settings) -> bool:
    """Whether a generation begins with this call; a pipeline that calls itself is still one generation."""
    thread = threading.get_ident()
    with _entering:
        if _running.get(id(pipeline), thread) != thread:
            raise RuntimeError(
                "This pipeline is running in another thread, and its scheduler counts the steps of one generation "
                "only: it must not be called from two threads at once, with or without osaccel. Give each thread a "
                "pipeline with a scheduler of its own; they may share everything else."
            )
        if settings.search and any(other != thread for other in _running.values()):
            raise RuntimeError(
                "OSACCEL_SEARCH runs recorded calls again, so its process must call pipelines one after the other; "
                "another thread is in one."
            )
        is_new = id(pipeline) not in _running
        _running[id(pipeline)] = thread
        return is_new


def _search(wrapped: Callable, pipeline: Any, args: tuple, kwargs: dict, target: Target, settings: Settings) -> Any:
    global _session, _settings
    from osaccel.search.session import Session

    if _session is None:
        _session = Session(settings, target)
    silence.accelerated = True
    output = _session.on_call(wrapped, pipeline, args, kwargs)
    if _session.is_over:
        # OSACCEL_SEARCH_THEN=continue: from here on as if what was found had been given.
        _settings, _session = _session.settings, None
    return output


def _generate(wrapped: Callable, pipeline: Any, args: tuple, kwargs: dict, target: Target, settings: Settings) -> Any:
    # Imported here: the pipeline's module has imported torch by now.
    from osaccel.attaching import is_rank_zero
    from osaccel.generation import Generation, UnsupportedPipeline, is_open_for
    from osaccel.wall import attached

    if is_open_for(pipeline):
        # By the script itself, which has said what it wants of this pipeline.
        silence.accelerated = True
        return wrapped(*args, **kwargs)
    plan = settings.generation_plan()
    if plan.timesteps and _has_own_timesteps(wrapped, args, kwargs):
        plan = replace(plan, timesteps=None)
    _warn_of_another_schedule(pipeline)
    _check_binding(_bind(wrapped, args, kwargs), pipeline, target, settings)
    say = logger.info if is_rank_zero() else logger.debug
    generation = Generation(pipeline, plan, target, source=settings.plan_source, announce=lambda line: say("%s", line))
    try:
        generation.open()
    except UnsupportedPipeline as error:
        if settings.strict:
            raise
        _warn_unrecognised(str(error))
        return wrapped(*args, **kwargs)
    silence.accelerated = True
    try:
        args, kwargs = _with_steps(wrapped, args, kwargs, generation.num_inference_steps)
        with attached(pipeline, target.sequence_parallel_group(), settings):
            output = wrapped(*args, **kwargs)
        say("%s", generation.summary())
        return output
    finally:
        generation.close()


def _warn_of_another_schedule(pipeline: Any) -> None:
    """Open-Sora-Plan v1.3 has v1.2's module and class names; what is derived for its schedule is right or refused."""
    reasons = "; ".join(schedule.unfamiliar(getattr(pipeline, "scheduler", None)))
    if reasons and reasons not in _warned:
        _warned.add(reasons)
        logger.warning("this is not Open-Sora-Plan v1.2's schedule (%s); files found for that one may not fit", reasons)


def _check_binding(arguments: dict, pipeline: Any, target: Target, settings: Settings) -> None:
    """Warn, or refuse in strict mode, when what is applied was searched for another kind of generation."""
    from osaccel import binding
    from osaccel.generation import find_blocks

    source, recorded = binding.recorded_of(settings)
    if not recorded:
        return
    try:
        blocks = len(find_blocks(pipeline, target.block_path))
    except (TypeError, ValueError):
        # Not the upstream we know; opening the generation will say so.
        return
    found = binding.of_call(pipeline, arguments, blocks, settings.timesteps)
    if isinstance(recorded, dict) and recorded.get("model"):
        found["model"] = _weights_digest(target.owner_of_blocks(pipeline))
    differences = binding.mismatches(recorded, found)
    if not differences:
        return
    message = f"{source} may not fit this generation: {'; '.join(differences)}"
    if settings.strict:
        raise SettingsError(message + ". OSACCEL_STRICT refuses it; search again, or sample as it was searched.")
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s; quality and speed may differ from what was measured", message)


def _weights_digest(model: Any) -> Optional[str]:
    """Of a model, taken once; None where it cannot be taken, of weights that are offloaded or quantised for example."""
    from osaccel import binding

    if model not in _digests:
        try:
            _digests[model] = binding.weights_digest(model)
        except Exception:  # whatever a model of others raises is no reason not to sample
            _digests[model] = None
    return _digests[model]


def _has_own_timesteps(wrapped: Callable, args: tuple, kwargs: dict) -> bool:
    own = _bind(wrapped, args, kwargs).get("timesteps") is not None
    if own:
        logger.warning("the pipeline was called with timesteps= of its own; the searched timesteps are not used")
    return own


def _with_steps(wrapped: Callable, args: tuple, kwargs: dict, steps: Optional[int]) -> Any:
    """The call's arguments with `num_inference_steps` as the searched list has it."""
    if steps is None:
        return args, kwargs
    names = [name for name in inspect.signature(wrapped).parameters]
    position = names.index("num_inference_steps") if "num_inference_steps" in names else len(args)
    if position < len(args):
        return args[:position] + (steps,) + args[position + 1 :], kwargs
    return args, dict(kwargs, num_inference_steps=steps)


def _bind(function: Callable, args: tuple, kwargs: dict) -> dict:
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except TypeError:
        # The call itself will fail with Python's own message.
        return dict(kwargs)


def _warn_unrecognised(reason: str) -> None:
    silence.explained = True
    logger.warning("%s; the script runs unaccelerated", reason)
