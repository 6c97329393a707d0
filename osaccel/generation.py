# SPDX-License-Identifier: Apache-2.0
"""The scope of one `pipeline(...)` call: attaches cache and timesteps to this pipeline, and detaches when it ends.

Invariant: after `close` the pipeline, its scheduler and its blocks are as they were before `open`, and no tensor that
the cache stored is alive, however the call ended.
"""

import inspect
import os
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import wrapt

from osaccel.network.policy import Policy, check_regions
from osaccel.network.regions import BlockCache, HiddenStates, ReplacedForward, StepClock

Interceptor = Callable[[Callable, tuple, dict], Any]


class UnsupportedPipeline(RuntimeError):
    """The pipeline does not look like the upstream that osaccel knows; the message says what is missing."""


def find_blocks(pipeline: Any, block_path: str) -> torch.nn.ModuleList:
    """The transformer blocks at a dotted path such as "transformer.transformer_blocks".

    Raises:
        ValueError: an attribute on the path does not exist, or there are no blocks.
        TypeError: what is there is not an nn.ModuleList.
    """
    found = pipeline
    walked: List[str] = []
    for part in block_path.split("."):
        walked.append(part)
        owner, found = found, getattr(found, part, None)
        if found is None:
            raise ValueError(
                f"Failed to access '{'.'.join(walked)}': Attribute '{part}' not found in {type(owner).__name__}"
            )
    if not isinstance(found, torch.nn.ModuleList):
        raise TypeError(f"Object at path '{block_path}' must be type nn.ModuleList, but got {type(found).__name__}")
    if len(found) == 0:
        raise ValueError(f"ModuleList at path '{block_path}' is empty")
    return found


def wrap_method(instance: Any, name: str, function: Callable, wrapper: Callable) -> Callable[[], None]:
    """Put a wrapt wrapper around `function` on the instance as `name`; returns what takes it off again."""
    previous: Dict[str, Any] = {name: instance.__dict__[name]} if name in instance.__dict__ else {}

    def undo() -> None:
        instance.__dict__.pop(name, None)
        instance.__dict__.update(previous)

    setattr(instance, name, wrapt.FunctionWrapper(function, wrapper))
    return undo


class Generation:
    """Context manager around one pipeline call.

    Args:
        pipeline: a diffusers pipeline with a `scheduler`, and transformer blocks at `block_path`.
        policy: a cache policy (see `osaccel.network.policy`), or None.
        timesteps: the searched timesteps, descending, in [0, 1000], or None for the scheduler's own spacing.
        block_path, hidden_states: where the blocks are and what they call their hidden states.
        source: where the cache configuration came from, for error messages.
        step, forward: for a search: called as f(original, args, kwargs) in place of `scheduler.step` and of the
            transformer's forward; they may observe, or return something else.

    Raises, on entering:
        UnsupportedPipeline: the pipeline has no such blocks or scheduler.
        ValueError: the policy does not fit the number of blocks.
        osaccel.sampling.UnsupportedScheduler: the scheduler cannot follow a list of timesteps.
    """

    def __init__(
        self,
        pipeline: Any,
        policy: Optional[Policy] = None,
        timesteps: Optional[Sequence[float]] = None,
        block_path: str = "transformer.transformer_blocks",
        hidden_states: Tuple[str, ...] = ("hidden_states",),
        source: str = "cache configuration",
        step: Optional[Interceptor] = None,
        forward: Optional[Interceptor] = None,
    ):
        self.pipeline, self.policy, self.timesteps = pipeline, policy, timesteps
        self.block_path, self.hidden_states, self.source = block_path, hidden_states, source
        self._intercept_step, self._intercept_forward = step, forward
        self.clock = StepClock()
        self.cache: Optional[BlockCache] = None
        self._undo: List[Callable[[], None]] = []

    def __enter__(self) -> "Generation":
        self.open()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def open(self) -> None:
        try:
            self._started = time.perf_counter()
            self._attach_scheduler()
            if self.policy is not None and self.policy.regions:
                self._attach_blocks(self.policy)
            if self._intercept_forward is not None:
                self._attach_forward(self._intercept_forward)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Detach everything, last attached first."""
        while self._undo:
            self._undo.pop()()

    @property
    def num_inference_steps(self) -> Optional[int]:
        """What the pipeline must be told instead of its caller's number; None leaves that alone."""
        return None if self.timesteps is None else len(self.timesteps)

    def _attach_scheduler(self) -> None:
        scheduler: Any = getattr(self.pipeline, "scheduler", None)
        if not callable(getattr(scheduler, "set_timesteps", None)) or not callable(getattr(scheduler, "step", None)):
            raise UnsupportedPipeline(f"{type(self.pipeline).__name__} has no scheduler with set_timesteps and step.")
        set_timesteps, step = scheduler.set_timesteps, scheduler.step
        if self.timesteps is not None:
            from osaccel.sampling import adapter_for

            adapter = adapter_for(scheduler)
            self._undo.append(adapter.restore)
            set_timesteps = self._with_list(adapter, set_timesteps)
            step = adapter.step or step
        self._undo.append(wrap_method(scheduler, "set_timesteps", set_timesteps, self._on_set_timesteps))
        self._undo.append(wrap_method(scheduler, "step", step, self._on_step))

    def _with_list(self, adapter: Any, original: Callable) -> Callable:
        def set_timesteps(num_inference_steps: Any = None, device: Any = None, **_: Any) -> None:
            adapter.set_timesteps(self.timesteps, device=device, original_set_timesteps=original)

        # wrapt shows the pipeline the signature of what it wraps.
        set_timesteps.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return set_timesteps

    def _on_set_timesteps(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        result = wrapped(*args, **kwargs)
        self.clock.step = 0
        if self.cache:
            self.cache.clear()
        return result

    def _on_step(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        if self._intercept_step is None:
            result = wrapped(*args, **kwargs)
        else:
            result = self._intercept_step(wrapped, args, kwargs)
        self.clock.step += 1
        return result

    def _attach_blocks(self, policy: Policy) -> None:
        compile_forward = self._run_compiled_transformer_eagerly()
        try:
            blocks = find_blocks(self.pipeline, self.block_path)
        except (TypeError, ValueError) as error:
            raise UnsupportedPipeline(str(error)) from None
        check_regions(policy, len(blocks), self.source)
        for module in (self._owner_of_blocks(), *blocks):
            _refuse_module_compile(module)
        self.cache = BlockCache(list(blocks), policy, self.clock, HiddenStates(self.hidden_states), compile_forward)
        self._undo.append(self.cache.detach)

    def _attach_forward(self, intercept: Interceptor) -> None:
        def make(original: Callable) -> Callable:
            return lambda *args, **kwargs: intercept(original, args, kwargs)

        self._undo.append(ReplacedForward(self._owner_of_blocks(), make).restore)

    def _owner_of_blocks(self) -> Any:
        owner = self.pipeline
        for part in self.block_path.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    def _run_compiled_transformer_eagerly(self) -> Optional[Callable]:
        """Swap a torch.compile'd transformer for its original; returns the same compilation, to be used per block.

        The decision to skip must stay in eager Python: read inside a compiled region, the step index would recompile
        the graph at every step.
        """
        name = self.block_path.split(".")[0]
        compiled = getattr(self.pipeline, name, None)
        if not isinstance(compiled, torch.nn.Module) or "_orig_mod" not in compiled._modules:
            return None
        self.pipeline.__dict__[name] = compiled._orig_mod
        self._undo.append(lambda: self.pipeline.__dict__.__setitem__(name, compiled))
        return compiled.dynamo_ctx  # type: ignore[return-value]

    def summary(self) -> str:
        """One line: blocks computed of total, steps, seconds, the ideal speed-up of the policy."""
        seconds = time.perf_counter() - self._started
        if self.cache is None or not self.cache.total_blocks:
            blocks = "no block cached"
        else:
            computed, total = self.cache.computed_blocks, self.cache.total_blocks
            blocks = f"{computed} of {total} blocks computed, ideal speed-up {total / max(computed, 1):.3f}x"
        spacing = "searched timesteps" if self.timesteps is not None else "default timesteps"
        return f"generation: {self.clock.step} steps ({spacing}), {blocks}, {seconds:.2f} s"


def is_rank_zero() -> bool:
    """Whether this process is the one that logs: rank 0 of torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _refuse_module_compile(module: Any) -> None:
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{type(module).__name__} was compiled in place with module.compile(), which would bake one step's "
            "decision into the graph. Use pipeline.transformer = torch.compile(pipeline.transformer) instead, or no "
            "cache configuration."
        )
