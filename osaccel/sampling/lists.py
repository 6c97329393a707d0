# SPDX-License-Identifier: Apache-2.0
"""One adapter per scheduler family; what a list decides is overwritten, everything else stays the class's own code.

Every adapter first lets the scheduler reset itself for as many steps as the list has, then puts in:

* Euler, Euler ancestral, DPM-Solver++ multistep and singlestep, DEIS: timesteps and sigmas
  (``scheduling_euler_discrete``; Karras et al. arXiv 2206.00364; Lu et al. arXiv 2211.01095; Zhang and Chen arXiv
  2204.13902). Their steps read the solver's coefficients from ``sigmas``, so any spacing is followed.
* Heun: the same, interior points twice (``scheduling_heun_discrete``; arXiv 2206.00364, algorithm 2).
* KDPM2 ancestral: the same, with the log midpoint of every ancestral step in between
  (``scheduling_k_dpm_2_ancestral_discrete``; k-diffusion ``sample_dpm_2_ancestral``).
* DDIM, DDPM, PNDM: their steps find the previous timestep by integer arithmetic, which no list can steer. So the list
  becomes a noise schedule of its own: a private copy of the scheduler with one *training* timestep per list entry,
  which the class's own step samples completely (Song et al. arXiv 2010.02502, eq. 12; Ho et al. arXiv 2006.11239,
  eq. 7; Liu et al. arXiv 2202.09778, eq. 9). Clipping, thresholding, eta and the variance types come for free.
  Only PNDM's multistep weights, which assume even gaps, are replaced where the gaps are not even.

The last noise level is the class's own too: 0, or s(0) for DEIS and PNDM.
"""

import copy
import functools
import inspect
from typing import Any, Callable, Dict, Optional, Sequence, Type

import numpy as np
import torch

from .levels import alphas_cumprod_at, checked_timesteps, sigmas_at

# Instance attributes that belong to whoever opened the generation; neither saved nor restored here.
_NOT_STATE = ("step", "set_timesteps", "__getstate__")
# What Heun's and KDPM2's steps create on a scheduler that does not have it yet; left behind, it keeps a latent alive.
_MADE_BY_STEPS = ("sample", "dt")


class UnsupportedScheduler(ValueError):
    """The scheduler cannot follow a timestep list; the message names its class, the reason and what is allowed."""


class ScheduleAdapter:
    """Puts timestep lists into one scheduler instance and takes them out again.

    ``step`` is None where the scheduler's own step follows the list; otherwise a function with the same signature as
    ``scheduler.step`` that the caller installs in its place while the generation lasts. The adapter itself sets no
    attribute named ``step`` or ``set_timesteps`` on the scheduler.
    """

    step: Optional[Callable[..., Any]] = None

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._before: Optional[Dict[str, Any]] = None

    def set_timesteps(
        self,
        timesteps: Sequence[float],
        device: Any = None,
        original_set_timesteps: Optional[Callable[..., None]] = None,
    ) -> None:
        """Do what ``scheduler.set_timesteps`` does, for a given list.

        timesteps: descending, possibly fractional, in units of training timesteps; clipped to the trained range.
        device: where ``scheduler.timesteps`` is to live, as in diffusers.
        original_set_timesteps: the scheduler's own bound method, called first; by default the one of its class.
        Raises ValueError if the list is too short for the sampler or not strictly descending after clipping.
        """
        steps = checked_timesteps(timesteps, self._num_train_timesteps(), self._minimum())
        if self._before is None:
            self._before = {name: value for name, value in vars(self.scheduler).items() if name not in _NOT_STATE}
        if original_set_timesteps is None:
            original_set_timesteps = type(self.scheduler).set_timesteps.__get__(self.scheduler)
        original_set_timesteps(len(steps), device=device)
        self._put(steps, device)

    def num_inference_steps(self, timesteps: Sequence[float]) -> int:
        """What a pipeline is to be handed as ``num_inference_steps``, for its warm-up count and its progress bar."""
        return len(timesteps)

    def restore(self) -> None:
        """Give the scheduler back the state it had before the first list, its config included. Twice is harmless."""
        if self._before is None:
            return
        for name in _MADE_BY_STEPS:
            vars(self.scheduler).pop(name, None)
        vars(self.scheduler).update(self._before)
        self._before = None

    def _num_train_timesteps(self) -> int:
        return len(self.scheduler.alphas_cumprod)

    def _minimum(self) -> int:
        return 1

    def _put(self, steps: np.ndarray, device: Any) -> None:
        raise NotImplementedError


class SigmaAdapter(ScheduleAdapter):
    """For schedulers whose step reads ``sigmas[i]`` and ``sigmas[i + 1]``."""

    def _put(self, steps: np.ndarray, device: Any) -> None:
        self.scheduler.num_inference_steps = len(steps)
        self.scheduler.sigmas = self._sigmas(steps)
        self.scheduler.timesteps = torch.from_numpy(steps).to(device)

    def _sigmas(self, steps: np.ndarray) -> torch.Tensor:
        """Shape (N + 1,), float32 on the CPU where the schedulers keep them; the last one is the class's own."""
        own = self.scheduler.sigmas.cpu()
        return torch.cat([torch.from_numpy(sigmas_at(self.scheduler.alphas_cumprod, steps)).to(own.dtype), own[-1:]])


class HeunAdapter(SigmaAdapter):
    """Two evaluations per interval but the last: 2 N - 1 timesteps."""

    def _put(self, steps: np.ndarray, device: Any) -> None:
        super()._put(steps, device)
        sigmas, times = self.scheduler.sigmas, self.scheduler.timesteps
        self.scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        self.scheduler.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])


class KDPM2AncestralAdapter(SigmaAdapter):
    """An evaluation at the log midpoint of every interval but the last: 2 N - 1 timesteps."""

    def _put(self, steps: np.ndarray, device: Any) -> None:
        super()._put(steps, device)
        sigmas = self.scheduler.sigmas
        following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
        up = (following**2 * (sigmas**2 - following**2) / sigmas**2) ** 0.5
        down = (following**2 - up**2) ** 0.5
        # 0 / 0 at the final sigma, where there is nothing left to step.
        down[-1] = 0.0
        middle = sigmas.log().lerp(down.log(), 0.5).exp()
        middle[-2:] = 0.0
        self.scheduler.timesteps = self._interleaved(steps, middle).to(device)
        self.scheduler.sigmas = _doubled(sigmas)
        for name, values in (("sigmas_interpol", middle), ("sigmas_up", up), ("sigmas_down", down)):
            setattr(self.scheduler, name, _doubled(values).to(getattr(self.scheduler, name).device))

    def _interleaved(self, steps: np.ndarray, middle: torch.Tensor) -> torch.Tensor:
        """t0, m0, t1, m1, ..., t(N-1): what the model is evaluated at, float32."""
        log_sigmas = self.scheduler.log_sigmas.cpu()
        between = np.array([self.scheduler._sigma_to_t(sigma, log_sigmas) for sigma in middle[:-2]], dtype=np.float32)
        times = np.empty(2 * len(steps) - 1, dtype=np.float32)
        times[0::2], times[1::2] = steps, between.reshape(-1)
        return torch.from_numpy(times)


def _doubled(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])


class ReindexedAdapter(ScheduleAdapter):
    """The class's own step, run on a private copy whose training timesteps *are* the list."""

    # Table entries per list entry: 2 makes room for the midpoints that a Runge-Kutta start evaluates.
    spacing = 1

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._reindexed: Any = None
        # The class's, not the instance's: the caller may already have put its own wrapper there, which ends up here.
        self._own_step = type(scheduler).step.__get__(scheduler)

        def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            return self._step(model_output, timestep, sample, *args, **kwargs)

        # Pipelines read the signature to decide whether the step takes a generator.
        step.__signature__ = inspect.signature(self._own_step)  # type: ignore[attr-defined]
        step.__doc__ = self._own_step.__doc__
        self.step = step

    def restore(self) -> None:
        super().restore()
        self._reindexed = None

    def _put(self, steps: np.ndarray, device: Any) -> None:
        times = self._table_times(steps)
        reindexed = copy.copy(self.scheduler)
        for name in _NOT_STATE:
            vars(reindexed).pop(name, None)
        reindexed.alphas_cumprod = alphas_cumprod_at(self.scheduler.alphas_cumprod, times)
        # With this config the class's integer arithmetic gives exactly the places 0, spacing, 2 spacing, ...
        reindexed.register_to_config(num_train_timesteps=len(times), timestep_spacing="leading", steps_offset=0)
        reindexed.set_timesteps(len(steps))
        self._reindexed = reindexed
        self.scheduler.num_inference_steps = len(steps)
        self.scheduler.timesteps = torch.from_numpy(times[reindexed.timesteps.numpy()]).to(device)

    def _table_times(self, steps: np.ndarray) -> np.ndarray:
        """The timesteps at the table's places, ascending as a noise schedule is, shape (spacing * N,)."""
        return steps[::-1].copy()

    def _place(self, timestep: Any) -> int:
        """Where in the table this step starts."""
        times = self.scheduler.timesteps
        matches = (times == torch.as_tensor(timestep, dtype=times.dtype, device=times.device)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"Timestep {float(timestep):.10g} is not one of the scheduler's timesteps.")
        return int(self._reindexed.timesteps[int(matches[0])])

    def _step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if self._reindexed is None:
            return self._own_step(model_output, timestep, sample, *args, **kwargs)
        return self._reindexed.step(model_output, self._place(timestep), sample, *args, **kwargs)


class PNDMAdapter(ReindexedAdapter):
    """Runge-Kutta start over three intervals, then linear multistep: N + 9 timesteps, as the class has them.

    The class's multistep weights are those of even gaps; on irregular ones they are consistent, but only first order.
    So where the gaps are uneven the noise predictions are combined with the Adams-Bashforth weights of the gaps that
    are there (Hairer, Norsett and Wanner, Solving ODEs I, section III.5), in t, where even gaps give the class's own.
    """

    spacing = 2

    def _minimum(self) -> int:
        return 2 if self.scheduler.config.skip_prk_steps else 4

    def _table_times(self, steps: np.ndarray) -> np.ndarray:
        ascending = steps[::-1]
        times = np.repeat(ascending, 2)
        times[1:-1:2] = (ascending[:-1] + ascending[1:]) / 2
        return times

    def _put(self, steps: np.ndarray, device: Any) -> None:
        super()._put(steps, device)
        # The class keeps history and counter; its transfer formula is the one place that sees the combination.
        self._reindexed._get_prev_sample = functools.partial(self._transfer, self._table_times(steps).astype(float))

    def _place(self, timestep: Any) -> int:
        # Timesteps repeat, so only the class's own counter tells where it is.
        return int(self._reindexed.timesteps[self._reindexed.counter])

    def _transfer(self, times: np.ndarray, sample: Any, place: int, next_place: int, combined: Any) -> Any:
        """The class's ``_get_prev_sample``, given a combination of noise predictions that suits the gaps."""
        own = self._reindexed
        history = own.ets[::-1]
        # The start is Runge-Kutta or a trapezoid; the last entry of a list that ends at 0 has no interval of its own.
        if own.counter >= len(own.prk_timesteps) and len(history) > 1 and times[place] > 0:
            nodes = times[place :: self.spacing][: len(history)]
            end = times[next_place] if next_place >= 0 else 0.0
            gaps = np.diff(nodes, prepend=end)
            if not np.allclose(gaps, gaps[0]):
                combined = sum(w * noise for w, noise in zip(_adams_bashforth(nodes, end).tolist(), history))
        return type(own)._get_prev_sample(own, sample, place, next_place, combined)


# Sum of the absolute weights up to which an order is used: three times that of even gaps at order 4. Without a limit a
# long gap after short ones gets weights in the hundreds, which amplify whatever is not smooth in the model.
_WEIGHT_LIMIT = 20.0


def _adams_bashforth(nodes: np.ndarray, end: float) -> np.ndarray:
    """Weights of the values at ``nodes`` (newest first) for their mean over [nodes[0], end]; they sum to one.

    Of the highest order whose weights stay under the limit; order one always does.
    """
    for order in range(len(nodes), 0, -1):
        # In units of the interval, so that the system is well scaled; exact for polynomials up to order - 1.
        u = (nodes[:order] - nodes[0]) / (end - nodes[0])
        powers = np.arange(order)
        weights = np.linalg.solve(u ** powers[:, None], 1 / (powers + 1))
        if np.abs(weights).sum() <= _WEIGHT_LIMIT:
            break
    return weights


_ADAPTERS: Dict[str, Type[ScheduleAdapter]] = {
    "DDIMScheduler": ReindexedAdapter,
    "DDPMScheduler": ReindexedAdapter,
    "DEISMultistepScheduler": SigmaAdapter,
    "DPMSolverMultistepScheduler": SigmaAdapter,
    "DPMSolverSinglestepScheduler": SigmaAdapter,
    "EulerAncestralDiscreteScheduler": SigmaAdapter,
    "EulerDiscreteScheduler": SigmaAdapter,
    "HeunDiscreteScheduler": HeunAdapter,
    "KDPM2AncestralDiscreteScheduler": KDPM2AncestralAdapter,
    "PNDMScheduler": PNDMAdapter,
}


def adapter_for(scheduler: Any) -> ScheduleAdapter:
    """The adapter for this scheduler, found by the names of its classes; has no side effects.

    Raises UnsupportedScheduler for an unknown class, and for a configuration in which a timestep does not name a
    noise level of the training schedule.
    """
    for base in type(scheduler).__mro__:
        if base.__name__ in _ADAPTERS:
            reason = _refusal(scheduler.config, scheduler.alphas_cumprod)
            if reason:
                raise UnsupportedScheduler(f"{type(scheduler).__name__} cannot follow a timestep list: {reason}")
            return _ADAPTERS[base.__name__](scheduler)
    raise UnsupportedScheduler(
        f"{type(scheduler).__name__} cannot follow a timestep list: it is not one of the known schedulers, which are "
        f"{', '.join(sorted(_ADAPTERS))}."
    )


def _refusal(config: Any, alphas_cumprod: torch.Tensor) -> Optional[str]:
    """Why this configuration cannot be given a list, or None."""
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    if continuous:
        return (
            "with timestep_type='continuous' and prediction_type='v_prediction' its timesteps are logarithms of sigma, "
            "not training timesteps; timestep_type='discrete' is allowed."
        )
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return (
            "with use_flow_sigmas or prediction_type='flow_prediction' its noise levels do not come from the training "
            "betas; prediction_type='epsilon' and 'v_prediction' without use_flow_sigmas are allowed."
        )
    if not bool((alphas_cumprod > 0).all()):
        return (
            "its training schedule ends at zero signal (rescale_betas_zero_snr=True), where sigma is infinite; "
            "rescale_betas_zero_snr=False is allowed."
        )
    return None
