# SPDX-License-Identifier: Apache-2.0
"""What diffusers' own caches share: how one is attached to a transformer that is none of diffusers' classes."""

import contextlib
from typing import Any, Iterator

from osaccel.sampling.levels import NoiseLevels


def sigma_of(levels: NoiseLevels, kwargs: dict) -> float:
    """The noise level of a transformer call, from the timestep it is given."""
    return levels.sigma(kwargs["timestep"].reshape(-1)[0])


@contextlib.contextmanager
def attach(pipeline: Any, config: Any, steps: int, enable_at: int = 0) -> Iterator[None]:
    """One of diffusers' caches on the transformer, inside the cache context of every step.

    The upstream's class is no diffusers `CacheMixin`; a subclass that is one has `enable_cache` and `cache_context`.
    """
    from diffusers.hooks import HookRegistry  # noqa: F401  (fails here, not in a generation, on an old diffusers)
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models.cache_utils import CacheMixin

    net, levels = pipeline.transformer, NoiseLevels(pipeline.scheduler)
    net.__class__ = type(type(net).__name__, (type(net), CacheMixin), {})
    TransformerBlockRegistry.register(
        type(net.transformer_blocks[0]), TransformerBlockMetadata(return_hidden_states_index=0)
    )
    plain, step = net.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal plain, step
        if step == enable_at:
            net.forward = plain
            net.enable_cache(config)
            plain, net.forward = net.forward, forward
        sigma = sigma_of(levels, kwargs)
        where = {"step_index": step, "num_inference_steps": steps, "sigma": sigma / (1 + sigma)}
        step += 1
        with net.cache_context("denoising", **where):
            return plain(*args, **kwargs)

    net.forward = forward
    yield
