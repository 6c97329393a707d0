# SPDX-License-Identifier: Apache-2.0
"""Wraps the known pipelines' `__call__`: each call runs inside a Generation; a hook itself never raises."""

import atexit
import inspect
import logging
import os
import sys
from typing import Any, Callable, Optional

import wrapt

from osaccel import settings as settings_module
from osaccel.formats import SettingsError
from osaccel.hooks import agreement
from osaccel.settings import Settings
from osaccel.targets import TARGETS, Target

logger = logging.getLogger("osaccel")

_settings: Optional[Settings] = None
_session: Optional[Any] = None
_running = set()  # type: ignore[var-annotated]
_warned = set()  # type: ignore[var-annotated]


def wrap_pipeline(module: Any) -> None:
    """Post-import hook: wrap the target class of `module`; what is wrong here is reported, never raised."""
    _log_to_stderr()
    target = TARGETS[module.__name__]
    pipeline_class = getattr(module, target.pipeline_class, None)
    if pipeline_class is None or "__call__" not in vars(pipeline_class):
        _warn_unrecognised(f"{module.__name__} has no class {target.pipeline_class} with a __call__ of its own")
        atexit.register(_fail_if_strict)
        return
    if isinstance(vars(pipeline_class)["__call__"], wrapt.FunctionWrapper):
        return
    wrapt.wrap_function_wrapper(module, target.pipeline_class + ".__call__", _caller(target))
    try:
        current_settings()
    except SettingsError as error:
        logger.error("%s", error)


def unwrap_pipeline(module: Any) -> None:
    """Undo `wrap_pipeline`."""
    pipeline_class = getattr(module, TARGETS[module.__name__].pipeline_class, None)
    wrapper = vars(pipeline_class or object).get("__call__")
    if pipeline_class is not None and isinstance(wrapper, wrapt.FunctionWrapper):
        pipeline_class.__call__ = wrapper.__wrapped__


def current_settings() -> Settings:
    """The settings of this process, read when first needed and then frozen."""
    global _settings
    if _settings is None:
        _settings = settings_module.load(os.environ)
    return _settings


def _caller(target: Target) -> Callable:
    def call(wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        settings = current_settings()
        # A pipeline that calls itself is still one generation.
        if settings.disable or not (settings.accelerates or settings.search) or id(instance) in _running:
            return wrapped(*args, **kwargs)
        _running.add(id(instance))
        try:
            if settings.search:
                return _search(wrapped, instance, args, kwargs, target, settings)
            return _generate(wrapped, instance, args, kwargs, target, settings)
        finally:
            _running.discard(id(instance))

    return call


def _search(wrapped: Callable, pipeline: Any, args: tuple, kwargs: dict, target: Target, settings: Settings) -> Any:
    global _session, _settings
    from osaccel.search.session import Session

    if _session is None:
        agreement.check(settings, target.state_modules)
        group = agreement.sequence_parallel_group(target.state_modules)
        _session = Session(settings, group, target.block_path, target.hidden_states)
    output = _session.on_call(wrapped, pipeline, args, kwargs)
    if _session.is_over:
        # OSACCEL_SEARCH_THEN=continue: from here on as if what was found had been given.
        _settings, _session = _session.settings, None
    return output


def _generate(wrapped: Callable, pipeline: Any, args: tuple, kwargs: dict, target: Target, settings: Settings) -> Any:
    # Imported here: the pipeline's module has imported torch by now.
    from osaccel.generation import Generation, UnsupportedPipeline, is_rank_zero
    from osaccel.network.policy import IntervalPolicy
    from osaccel.wall import attached

    agreement.check(settings, target.state_modules)
    group = agreement.sequence_parallel_group(target.state_modules)
    _check_fingerprint(wrapped, pipeline, args, kwargs, target, settings)
    generation = Generation(
        pipeline,
        policy=IntervalPolicy(settings.cache) if settings.cache else None,
        timesteps=None if _has_own_timesteps(wrapped, args, kwargs) else settings.timesteps,
        block_path=target.block_path,
        hidden_states=target.hidden_states,
        source=settings.sources.get("cache_config", "cache configuration"),
    )
    try:
        generation.open()
    except UnsupportedPipeline as error:
        if settings.strict:
            raise
        _warn_unrecognised(str(error))
        return wrapped(*args, **kwargs)
    try:
        args, kwargs = _with_steps(wrapped, args, kwargs, generation.num_inference_steps)
        with attached(pipeline, group, settings):
            output = wrapped(*args, **kwargs)
        if is_rank_zero():
            logger.info("%s", generation.summary())
        return output
    finally:
        generation.close()


def _check_fingerprint(
    wrapped: Callable, pipeline: Any, args: tuple, kwargs: dict, target: Target, settings: Settings
) -> None:
    """Warn, or refuse in strict mode, when the cache configuration was searched for another kind of generation."""
    from osaccel import binding
    from osaccel.generation import find_blocks

    if settings.cache is None or settings.cache_file is None:
        return
    try:
        blocks = len(find_blocks(pipeline, target.block_path))
    except (TypeError, ValueError):
        # Not the upstream we know; opening the generation will say so.
        return
    found = binding.of_call(pipeline, _bind(wrapped, args, kwargs), blocks, settings.timesteps)
    differences = binding.mismatches(settings.cache_file, found)
    if not differences:
        return
    message = f"{settings.cache_file} was searched for another generation: {'; '.join(differences)}"
    if settings.strict:
        raise SettingsError(message + ". OSACCEL_STRICT refuses it; search again, or sample as it was searched.")
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s; quality and speed may differ from what was measured", message)


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
    logger.warning("%s; the script runs unaccelerated", reason)


def _fail_if_strict() -> None:
    """Strict mode for an upstream that never reaches a wrapped call: the only place left to fail is the exit."""
    if current_settings().strict:
        logger.error("OSACCEL_STRICT is set and nothing was accelerated")
        sys.stdout.flush()
        os._exit(1)


def _log_to_stderr() -> None:
    """Scripts configure no logging, so the summary line would be lost; a configured application keeps its own way."""
    if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[osaccel] %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    level = os.environ.get("OSACCEL_LOG", "INFO").upper()
    logger.setLevel(level if level in settings_module.LOG_LEVELS else "INFO")
