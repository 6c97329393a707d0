# SPDX-License-Identifier: Apache-2.0
"""Re-runs one recorded pipeline call exactly, or from any step on, without recomputing what lies before it.

A call is recorded as its arguments, the random state on entry and, per step, the prediction handed to
`scheduler.step`. A replay restores the random state and lets the scheduler itself walk through the recorded predictions
up to the step where it resumes: scheduler state, drawn noise and latents come out bit for bit, whatever the sampler,
and the transformer is not called. A cache gets its first delta from the block boundaries, where they were kept.
"""

import inspect
import random
import time
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel.attaching import wrap_method
from osaccel.generation import Generation
from osaccel.interceptors import Interceptor, StepCall, latents_of, with_latents
from osaccel.network.forwards import prediction_of, with_prediction
from osaccel.network.regions import BlockCache
from osaccel.plan import Plan
from osaccel.targets import Target, target_of


class Abandoned(Exception):
    """A replay was stopped on purpose, by what watches its steps."""


class RandomState:
    """Where every random generator a pipeline may draw from stands; the accelerators' current devices included."""

    def __init__(self, generators: Sequence[torch.Generator] = ()):
        self.generators = list(generators)
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.torch = torch.get_rng_state()
        self.devices = {name: module.get_rng_state() for name, module in _accelerators().items()}
        self.arguments = [generator.get_state() for generator in self.generators]

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        accelerators = _accelerators()
        for name, state in self.devices.items():
            if name in accelerators:
                accelerators[name].set_rng_state(state)
        for generator, state in zip(self.generators, self.arguments):
            generator.set_state(state)

    def to_dict(self) -> Dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "generators"}

    def load(self, content: Dict[str, Any]) -> None:
        vars(self).update(content)


def _accelerators() -> Dict[str, Any]:
    """The accelerator modules in use; asking one that was never initialised for its state would initialise it."""
    found = {}
    for name in ("cuda", "npu", "xpu", "mps"):
        module = getattr(torch, name, None)
        is_initialized = getattr(module, "is_initialized", lambda: False)
        if hasattr(module, "get_rng_state") and is_initialized():
            found[name] = module
    return found


class Call:
    """One pipeline call: what to run and where the random state stood. `arguments` are bound to their names."""

    def __init__(
        self,
        function: Callable,
        pipeline: Any,
        args: tuple,
        kwargs: dict,
        target: Optional[Target] = None,
    ):
        self.function, self.pipeline, self.target = function, pipeline, target or target_of(pipeline)
        bound = inspect.signature(function).bind(*args, **kwargs)
        self.args, self.kwargs = bound.args, bound.kwargs
        bound.apply_defaults()
        self.arguments = dict(bound.arguments)
        self.state = RandomState(_generators(self.arguments))

    def with_arguments(self, **replaced: Any) -> Any:
        """args and kwargs with some values replaced, where the function has such parameters."""
        bound = inspect.signature(self.function).bind(*self.args, **self.kwargs)
        for name, value in replaced.items():
            if name in inspect.signature(self.function).parameters:
                bound.arguments[name] = value
        return bound.args, bound.kwargs


def _generators(arguments: Dict[str, Any]) -> List[torch.Generator]:
    found: List[torch.Generator] = []
    for value in arguments.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, torch.Generator):
                found.append(item)
    return found


class Recording:
    """The plain generation of one call: per step the prediction given to the scheduler and the latents it returned.

    Both are kept on the host: 2 latents per step. `seconds` is the time from the first forward to the last step.

    Attributes:
        outputs: what every forward of every step returned, where they are kept: as much again per branch of guidance. A
            replay then answers in the network's place, so that whatever stands before it sees what it saw.
    """

    def __init__(self) -> None:
        self.outputs: List[List[torch.Tensor]] = []
        self.predictions: List[torch.Tensor] = []
        self.latents: List[torch.Tensor] = []
        self.stand_in: Any = None
        self.seconds = 0.0
        self.forwards = 0

    @property
    def steps(self) -> int:
        return len(self.predictions)

    def content(self) -> Dict[str, Any]:
        """What `load` of another process needs: plain values and tensors."""
        stand_in = self.stand_in
        if not isinstance(stand_in, (torch.Tensor, tuple, type(None))):
            stand_in = {"sample": stand_in.sample}
        return {**vars(self), "stand_in": stand_in}

    def load(self, content: Dict[str, Any]) -> None:
        vars(self).update(content)
        if isinstance(self.stand_in, dict):
            self.stand_in = _Output(self.stand_in["sample"])

    def stand_in_on(self, device: torch.device) -> Any:
        """What a forward that is not computed returns: of the right kind, its numbers are never used."""
        if isinstance(self.stand_in, torch.Tensor):
            return self.stand_in.to(device)
        if isinstance(self.stand_in, tuple):
            return tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in self.stand_in)
        return with_prediction(self.stand_in, prediction_of(self.stand_in).to(device))

    def nbytes(self) -> int:
        outputs = [tensor for forwards in self.outputs for tensor in forwards]
        return sum(tensor.numel() * tensor.element_size() for tensor in self.predictions + self.latents + outputs)


class _Output:
    """In place of a transformer's output object that was read back: its sample, by name, by key and by position."""

    def __init__(self, sample: torch.Tensor):
        self.sample = sample

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.sample


class _Recorder(Interceptor):
    """Keeps in `recording` what replays of this generation need."""

    def __init__(self, recording: Recording, before_first_forward: Callable[[], None], keep_outputs: bool):
        self.recording, self.before_first_forward = recording, before_first_forward
        self.keep_outputs, self._forwards = keep_outputs, []  # type: ignore[var-annotated]
        self._started = 0.0

    def network(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        recording = self.recording
        if not recording.forwards:
            self.before_first_forward()
            self._started = time.perf_counter()
        recording.forwards += 1
        recording.stand_in = proceed(*args, **kwargs)
        if self.keep_outputs:
            self._forwards.append(prediction_of(recording.stand_in).detach().cpu().clone())
        return recording.stand_in

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        recording = self.recording
        recording.predictions.append(call.model_output.detach().cpu().clone())
        result = proceed(call)
        recording.latents.append(latents_of(result).detach().cpu().clone())
        if self.keep_outputs:
            recording.outputs.append(self._forwards)
            self._forwards = []
        recording.seconds = time.perf_counter() - self._started
        return result


class _Resumed(Interceptor):
    """Takes the steps before `resume` from a replay's recording; see Replay.run."""

    def __init__(self, replay: "Replay", resume: int, watch: Any, final: Any):
        self.replay, self.recording = replay, replay.recording
        self.resume, self.watch, self.final = resume, watch, final
        self.now, self._forward = 0, -1

    def network(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        if self.now < self.resume:
            return self._recorded(_device_of(args, kwargs))
        return proceed(*args, **kwargs)

    def _recorded(self, device: torch.device) -> Any:
        """What the network returned, or, where that was not kept, something of the kind; `step` then knows better."""
        stand_in, forwards = self.recording.stand_in_on(device), self.recording.outputs
        if not forwards:
            return stand_in
        self._forward += 1
        return with_prediction(stand_in, forwards[self.now][self._forward].to(device))

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        now = self.now
        self.now, self._forward = self.now + 1, -1
        if now < self.resume and not self.recording.outputs:
            prediction = self.recording.predictions[now]
            call = call.replaced(prediction.to(call.model_output.device, copy=True))
        result = proceed(call)
        if now >= self.resume and self.watch is not None:
            self.watch(now, latents_of(result))
        if self.final is not None and now == self.recording.steps - 1:
            result = with_latents(result, self.final)
        return result


class Replay:
    """Runs a call again and again, differing only by plan. Text is encoded once, nothing is decoded unless asked.

    Args:
        call: what to run.
        timesteps: a searched list the call is to follow, or None.
    """

    def __init__(self, call: Call, timesteps: Optional[Sequence[float]] = None):
        self.call, self.timesteps = call, timesteps
        self.recording = Recording()
        # Of the last run under a plan; it goes on counting blocks until that run is over.
        self.cache: Optional[BlockCache] = None
        self._texts: List[Tuple[Any, RandomState]] = []
        self._encoded = 0
        # Called once the number of steps is known and nothing has been computed.
        self.before_first_forward: Callable[[], None] = lambda: None

    def record(
        self,
        attach: Optional[Callable[[Generation], Callable[[], None]]] = None,
        decode: bool = True,
        keep_outputs: bool = False,
        watchers: Sequence[Interceptor] = (),
    ) -> Any:
        """Run the plain call once, keeping what replays need; returns the pipeline's output.

        attach: called with the open Generation, may hook into the blocks; returns what detaches.
        keep_outputs: keep what the network returned too; watchers: see the same calls as the recorder.
        """
        self.recording = recording = Recording()
        recorder = _Recorder(recording, self.before_first_forward, keep_outputs)
        return self._run([recorder, *watchers], None, decode, attach, quiet=not decode)

    def content(self) -> Dict[str, Any]:
        """What `load` of another process needs, beside the call: plain values and tensors."""
        return {
            "recording": self.recording.content(),
            "random": self.call.state.to_dict(),
        }

    def load(self, content: Dict[str, Any]) -> None:
        self.recording.load(content["recording"])
        self.call.state.load(content["random"])

    def run(
        self,
        plan: Optional[Plan] = None,
        resume: int = 0,
        watch: Optional[Callable[[int, torch.Tensor], None]] = None,
        final: Optional[torch.Tensor] = None,
        decode: bool = False,
    ) -> Any:
        """Run again under `plan`, taking the steps before `resume` from the recording.

        watch: called with (step, latents) after every step from `resume` on; may raise Abandoned.
        final: latents to end with in place of the sampled ones, to have them decoded.
        Returns the pipeline's output; `self.cache.computed_blocks` is then the number of blocks that ran.
        """
        return self._run([_Resumed(self, resume, watch, final)], plan, decode, None, quiet=True)

    def decode(self, final: Optional[torch.Tensor] = None) -> Any:
        """The pipeline's output for the recorded latents, or for `final`, without calling the transformer."""
        return self.run(resume=self.recording.steps, final=final, decode=True)

    def _run(
        self, interceptors: Sequence[Interceptor], plan: Optional[Plan], decode: bool, attach: Any, quiet: bool
    ) -> Any:
        call = self.call
        replaced: Dict[str, Any] = {} if decode else {"output_type": "latent", "callback": None}
        if self.timesteps is not None:
            replaced["num_inference_steps"] = len(self.timesteps)
        args, kwargs = call.with_arguments(**replaced)
        call.state.restore()
        self._encoded = 0
        plan = plan or Plan()
        if self.timesteps is not None:
            plan = replace(plan, timesteps=tuple(self.timesteps))
        generation = Generation(call.pipeline, plan, call.target, interceptors)
        undo = self._quiet_and_text(quiet)
        try:
            with generation:
                self.cache = generation.cache
                if attach is not None:
                    undo.append(attach(generation))
                return call.function(*args, **kwargs)
        finally:
            while undo:
                undo.pop()()

    def _quiet_and_text(self, quiet: bool) -> List[Callable[[], None]]:
        pipeline = self.call.pipeline
        undo: List[Callable[[], None]] = []
        encode = getattr(pipeline, "encode_prompt", None)
        if callable(encode):
            undo.append(wrap_method(pipeline, "encode_prompt", encode, self._encode))
        configure = getattr(pipeline, "set_progress_bar_config", None)
        if quiet and callable(configure):
            before = dict(getattr(pipeline, "_progress_bar_config", {}))
            configure(**dict(before, disable=True))
            undo.append(lambda: configure(**before))
        return undo

    def _encode(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        # Some pipelines encode prompt and negative prompt by two calls; the n-th call of every run is the same.
        number, self._encoded = self._encoded, self._encoded + 1
        if number == len(self._texts):
            encoded = wrapped(*args, **kwargs)
            # The random state after it belongs to it.
            self._texts.append((encoded, RandomState(self.call.state.generators)))
        encoded, state = self._texts[number]
        state.restore()
        return encoded


def _device_of(args: tuple, kwargs: dict) -> torch.device:
    """Where the transformer's inputs are."""
    return next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
