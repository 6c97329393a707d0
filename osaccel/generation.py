# SPDX-License-Identifier: Apache-2.0
"""The scope of one `pipeline(...)` call: attaches a plan to this pipeline, and detaches it when the call ends.

Invariant: after `close` the pipeline, its scheduler and its blocks are as they were before `open`, and no tensor that
was stored is alive, however the call ended. Generations in other threads, or within a step of this one, are their own;
what counts the steps of one generation, a scheduler, is refused to a second one.
"""

import contextlib
import inspect
import statistics
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

from osaccel.attaching import hide_from_copies, is_scheduler, wrap_scheduler
from osaccel.clock import Clock
from osaccel.formats import SettingsError
from osaccel.interceptors import Interceptor, StepCall, network_through, step_through, watches_network
from osaccel.network.forwards import HiddenStates, ReplacedForward
from osaccel.network.halves import ConditionalOnly
from osaccel.network.regions import BlockCache
from osaccel.plan import Plan
from osaccel.sampling.branches import CorrectedBranches
from osaccel.sampling.corrected import Corrected
from osaccel.sampling.standin import StandIn
from osaccel.targets import Target, target_of

# The schedulers in use by a generation, by id.
_in_use: Dict[int, "Generation"] = {}


class UnsupportedPipeline(RuntimeError):
    """The pipeline does not look like the upstream that osaccel knows; the message says what is missing."""


def is_open_for(pipeline: Any) -> bool:
    """Whether a generation of this very pipeline is open."""
    generation = _in_use.get(id(getattr(pipeline, "scheduler", None)))
    return generation is not None and generation.pipeline is pipeline


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


class Generation:
    """Context manager around one pipeline call.

    Args:
        pipeline: a diffusers pipeline with a `scheduler`, and transformer blocks where the target says.
        plan: what its steps compute; the plain generation by default.
        target: where things are in the pipeline; by default as its class is known.
        interceptors: stand between the plan and the network and scheduler, in this order (`osaccel.interceptors`).
        source: where the plan came from, for error messages.
        announce: called with one line when the generation's steps are known.

    Raises, on entering:
        UnsupportedPipeline: the pipeline has no such blocks or scheduler.
        ValueError: the plan does not fit the number of blocks.
        osaccel.sampling.UnsupportedScheduler: the scheduler cannot do what the plan asks of it.
        RuntimeError: another generation has the scheduler.
    When the pipeline sets its timesteps, SettingsError: the plan is for another number of steps.
    """

    def __init__(
        self,
        pipeline: Any,
        plan: Optional[Plan] = None,
        target: Optional[Target] = None,
        interceptors: Sequence[Interceptor] = (),
        source: str = "plan",
        announce: Optional[Callable[[str], None]] = None,
    ):
        self.pipeline, self.plan, self.target = pipeline, plan or Plan(), target or target_of(pipeline)
        self.source, self._announce = source, announce
        self.clock = Clock()
        self.cache: Optional[BlockCache] = None
        self.interceptors = [*self._of_plan(), *interceptors]
        self._undo = contextlib.ExitStack()
        self._network: Optional[ReplacedForward] = None
        self._times = _StepTimes()

    def _of_plan(self) -> List[Interceptor]:
        plan = self.plan
        found: List[Interceptor] = []
        if plan.conditional_only:
            found.append(CorrectedBranches(plan, self.clock))
        if plan.skip or plan.correction.is_used:
            # Without skipped steps the network is left alone.
            found.append((StandIn if plan.skip else Corrected)(plan, self.clock))
        if plan.conditional_only:
            if self.target.guidance is None:
                raise UnsupportedPipeline(
                    f"{self.source}: conditional_only needs to know how the pipeline runs guidance, and nothing is "
                    "known of that; give Generation a target with `guidance`, or take conditional_only out."
                )
            found.append(ConditionalOnly(plan, self.target.guidance, self.clock))
        return found

    def __enter__(self) -> "Generation":
        self.open()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def open(self) -> None:
        try:
            self._started = time.perf_counter()
            self.clock.thread = threading.get_ident()
            self._attach_scheduler()
            if self.plan.touches_network:
                self._attach_blocks()
            if watches_network(self.interceptors):
                self._attach_network()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Detach everything, last attached first."""
        try:
            self._undo.close()
        finally:
            for interceptor in self.interceptors:
                interceptor.close()

    @property
    def num_inference_steps(self) -> Optional[int]:
        """What the pipeline must be told instead of its caller's number; None leaves that alone."""
        return None if self.plan.timesteps is None else len(self.plan.timesteps)

    # The scheduler

    def _attach_scheduler(self) -> None:
        scheduler: Any = getattr(self.pipeline, "scheduler", None)
        if not is_scheduler(scheduler):
            raise UnsupportedPipeline(f"{type(self.pipeline).__name__} has no scheduler with set_timesteps and step.")
        self._claim(scheduler)
        set_timesteps, step = scheduler.set_timesteps, scheduler.step
        if self.plan.timesteps is not None:
            from osaccel.sampling import adapter_for

            adapter = adapter_for(scheduler)
            self._undo.callback(adapter.restore)
            set_timesteps = self._with_list(adapter, set_timesteps)
            step = adapter.step or step
        self._step = step_through(self.interceptors, step)
        self._undo.callback(wrap_scheduler(scheduler, self._on_set_timesteps, self._on_step, set_timesteps, step))

    def _claim(self, scheduler: Any) -> None:
        """Have the scheduler for this generation alone; it counts the steps of one, also without us."""
        if _in_use.setdefault(id(scheduler), self) is not self:
            name = type(scheduler).__name__
            raise RuntimeError(
                f"This {name} is in use by another generation, and it counts the steps of one only: pipelines that "
                "share a scheduler must not be called at once, with or without osaccel. Give each its own "
                f"({name}.from_config(pipeline.scheduler.config)), or call one after the other."
            )
        self._undo.callback(_in_use.pop, id(scheduler))

    def _check_calls(self) -> None:
        """Refuse to go on where the network's calls go to, or come from, another generation than the steps do."""
        if self.clock.thread != threading.get_ident():
            raise RuntimeError("The pipeline is called from two threads at once; a generation is that of one call.")
        is_reached = self.cache is None or self.cache.is_reached()
        if not is_reached or (self._network is not None and not self._network.is_current()):
            raise RuntimeError("Another generation of this thread is attached to the transformer; close it first.")

    def _with_list(self, adapter: Any, original: Callable) -> Callable:
        def set_timesteps(num_inference_steps: Any = None, device: Any = None, **_: Any) -> None:
            adapter.set_timesteps(self.plan.timesteps, device=device, original_set_timesteps=original)

        # wrapt shows the pipeline the signature of what it wraps.
        set_timesteps.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return set_timesteps

    def _on_set_timesteps(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        self.clock.thread = threading.get_ident()
        self._check_calls()
        result = wrapped(*args, **kwargs)
        self.clock.restart()
        self._times.restart()
        if self.cache:
            self.cache.clear()
        self._begin(self.pipeline.scheduler)
        return result

    def _begin(self, scheduler: Any) -> None:
        steps = len(scheduler.timesteps)
        try:
            self.plan.check_steps(steps)
        except ValueError as error:
            raise SettingsError(f"{self.source}: {error}") from None
        for interceptor in self.interceptors:
            interceptor.begin(scheduler)
        if self._announce is not None:
            self._announce(self.opening(steps))

    def _on_step(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        self._check_calls()
        result = self._step(StepCall(args, kwargs)) if self.interceptors else wrapped(*args, **kwargs)
        self._times.end_step(self._is_full(self.clock.step))
        self.clock.end_step()
        return result

    # The transformer

    def _attach_blocks(self) -> None:
        compile_forward = self._run_compiled_transformer_eagerly()
        try:
            blocks = find_blocks(self.pipeline, self.target.block_path)
        except (TypeError, ValueError) as error:
            raise UnsupportedPipeline(str(error)) from None
        try:
            self.plan.check_blocks(len(blocks))
        except ValueError as error:
            raise SettingsError(f"{self.source}: {error}") from None
        for module in (self.target.owner_of_blocks(self.pipeline), *blocks):
            _refuse_module_compile(module)
        states, batch_dim = HiddenStates(self.target.hidden_states), self.target.block_batch_dim()
        self.cache = BlockCache(list(blocks), self.plan, self.clock, states, batch_dim, compile_forward)
        self._undo.callback(self.cache.detach)

    def _attach_network(self) -> None:
        def make(original: Callable) -> Callable:
            return network_through(self.interceptors, original)

        self._network = ReplacedForward(self.target.owner_of_blocks(self.pipeline), make, self.clock)
        self._undo.callback(self._network.restore)

    def _run_compiled_transformer_eagerly(self) -> Optional[Callable]:
        """Swap a torch.compile'd transformer for its original; returns the same compilation, to be used per block.

        The decision to skip must stay in eager Python: read inside a compiled region, the step index would recompile
        the graph at every step.
        """
        name = self.target.block_path.split(".")[0]
        compiled = getattr(self.pipeline, name, None)
        if not isinstance(compiled, torch.nn.Module) or "_orig_mod" not in compiled._modules:
            return None
        self.pipeline.__dict__[name] = compiled._orig_mod
        self._undo.callback(self.pipeline.__dict__.__setitem__, name, compiled)
        self._undo.callback(hide_from_copies(self.pipeline, lambda state: state.__setitem__(name, compiled)))
        return compiled.dynamo_ctx  # type: ignore[return-value]

    # What it says of itself

    def opening(self, steps: int) -> str:
        """One line for the moment the steps are known: what was found, and what is expected of it."""
        text = f"generation of {steps} steps ({self._spacing}) begins: {self.plan.describe()}"
        if self.cache is None:
            return text
        work = self.plan.work(self.cache.num_blocks, steps)
        return f"{text}; network work {100 * work:.1f} %, ideal speed-up {1 / work:.3f}x"

    def summary(self) -> str:
        """One line: steps, blocks computed of total, network work, ideal and measured speed-up, seconds."""
        seconds = time.perf_counter() - self._started
        computed, total = self.computed_blocks, self.total_blocks
        if not total:
            blocks = "no block cached"
        else:
            speed_up = self._times.speed_up()
            measured = "" if speed_up is None else f", measured {speed_up:.3f}x"
            blocks = (
                f"{computed:g} of {total:g} blocks computed, ideal speed-up {total / max(computed, 1):.3f}x{measured}, "
                f"network work {100 * computed / total:.1f} %"
            )
        return f"generation: {self.clock.step} steps ({self._spacing}), {blocks}, {seconds:.2f} s"

    @property
    def _spacing(self) -> str:
        return "searched timesteps" if self.plan.timesteps is not None else "default timesteps"

    @property
    def computed_blocks(self) -> float:
        """Network work so far: block calls x share of the batch."""
        return self.cache.computed_blocks if self.cache else 0

    @property
    def total_blocks(self) -> float:
        """The same of the plain generation."""
        if self.cache is None or not self.cache.forwards:
            return 0
        skipped = sum(step < self.clock.step for step in self.plan.skip)
        called = self.clock.step - skipped
        return self.cache.num_blocks * self.cache.forwards * (self.clock.step / called if called else 1)

    def _is_full(self, step: int) -> bool:
        plan = self.plan
        reuses = any(step in region.reuse for region in plan.used_regions)
        return not (reuses or step in plan.skip or (self.clock.has_branches and step in plan.conditional_only))


class _StepTimes:
    """Wall seconds of every step, and the speed-up they show against the generation's own full steps.

    On accelerators work is queued, so a single step's time says little there and the medians are meant.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()
        self._full: List[float] = []
        self._all: List[float] = []

    def end_step(self, is_full: bool) -> None:
        now = time.perf_counter()
        self._all.append(now - self._last)
        if is_full:
            self._full.append(now - self._last)
        self._last = now

    def speed_up(self) -> Optional[float]:
        """As many median full steps over the time of all; None where no step but the first was full."""
        # The first step holds what is done once: compilation, kernels loaded, memory taken.
        if len(self._full) < 2 or len(self._full) == len(self._all):
            return None
        return len(self._all[1:]) * statistics.median(self._full[1:]) / sum(self._all[1:])


def _refuse_module_compile(module: Any) -> None:
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{type(module).__name__} was compiled in place with module.compile(), which would bake one step's "
            "decision into the graph. Use pipeline.transformer = torch.compile(pipeline.transformer) instead, or no "
            "cache configuration."
        )
