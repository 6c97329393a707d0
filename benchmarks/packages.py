# SPDX-License-Identifier: Apache-2.0
"""Caches of other packages attached to the miniature as their documentation says: cache-dit and diffusers' own hooks.

Both come with the extra `bench`; without them `missing` says so in a line and the rest of the comparison runs. Every
attach function takes the pipeline whose transformer belongs to one generation, and is to be entered around it.
"""

import ast
import contextlib
import importlib
import io
import os
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

NEEDED = {"cache-dit": ("cache_dit", "BlockAdapter"), "diffusers": ("diffusers.hooks", "SeaCacheConfig")}


def missing() -> Dict[str, str]:
    """Package name -> why its arms are left out."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    lines = {}
    for package, (module, name) in NEEDED.items():
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            lines[package] = f"{package} left out ({error}); install it with: pip install -e '.[bench]'"
    return lines


@contextlib.contextmanager
def cache_dit(
    pipeline: Any,
    steps: int,
    warmup: int,
    threshold: float = 0.0,
    mask: Optional[Sequence[bool]] = None,
    taylor: bool = False,
) -> Iterator[None]:
    """cache-dit's DBCache with F1B0: block 0 always runs and its residual decides, or a fixed mask does.

    With `taylor` the residual of the other blocks is not reused but forecast (TaylorSeer calibrator, order 1).
    """
    import cache_dit as package

    net = pipeline.transformer
    config = package.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warmup, residual_diff_threshold=threshold,
        num_inference_steps=steps, enable_separate_cfg=False,
    )  # fmt: skip
    if mask is not None:
        config.steps_computation_mask, config.steps_computation_policy = [int(on) for on in mask], "static"
    calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    adapter = package.BlockAdapter(
        transformer=net, blocks=net.transformer_blocks, forward_pattern=package.ForwardPattern.Pattern_3
    )
    package.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    yield


@contextlib.contextmanager
def diffusers_hook(pipeline: Any, config: Any, steps: int, enable_at: int = 0) -> Iterator[None]:
    """One of diffusers' caches on the transformer, inside the cache context of every step.

    The upstream's class is no diffusers `CacheMixin`; a subclass that is one has `enable_cache` and `cache_context`.
    """
    from diffusers.hooks import HookRegistry  # noqa: F401  (fails here, not in a generation, on an old diffusers)
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models.cache_utils import CacheMixin

    net = pipeline.transformer
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
        sigma = float(pipeline.scheduler.sigmas[step])
        where = {"step_index": step, "num_inference_steps": steps, "sigma": sigma / (1 + sigma)}
        step += 1
        with net.cache_context("denoising", **where):
            return plain(*args, **kwargs)

    net.forward = forward
    yield


def first_block(pipeline: Any, steps: int, warmup: int, threshold: float) -> Any:
    """First-Block-Cache; it has no warm-up of its own, so it is switched on after that many steps."""
    from diffusers.hooks import FirstBlockCacheConfig

    return diffusers_hook(pipeline, FirstBlockCacheConfig(threshold), steps, enable_at=warmup)


def sea_cache(pipeline: Any, steps: int, warmup: int, threshold: float) -> Any:
    """SeaCache (arXiv 2602.18993) with its default first-order forecast of the residual.

    It is made for x = (1 - sigma) * clean + sigma * noise: with the sampler's s = sigma / (1 - sigma), that is its
    scaled input times sqrt(1 + s^2) / (1 + s).
    """
    from diffusers.hooks import SeaCacheConfig

    def latents(_: Any, args: tuple, kwargs: dict) -> List[Any]:
        scaled = args[0] if args else kwargs["hidden_states"]
        s = float(pipeline.scheduler.sigmas[pipeline.scheduler.step_index or 0])
        return list((scaled * ((1 + s * s) ** 0.5 / (1 + s))).unbind(0))

    config = SeaCacheConfig(threshold=threshold, retention_steps=warmup, raw_vision_callback=latents)
    return diffusers_hook(pipeline, config, steps)


def mag_cache(pipeline: Any, steps: int, warmup: int, threshold: float, ratios: Sequence[float]) -> Any:
    """MagCache (arXiv 2506.09045) with the magnitude ratios of this model."""
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(
        threshold=threshold, retention_ratio=warmup / steps, num_inference_steps=steps, mag_ratios=list(ratios)
    )
    return diffusers_hook(pipeline, config, steps)


def mag_ratios(steps: int, generate: Callable[[Callable], Any]) -> List[float]:
    """What MagCache prints when it calibrates; `generate(attach)` runs one generation."""
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generate(lambda pipeline: diffusers_hook(pipeline, config, steps))
    return ast.literal_eval(printed.getvalue().strip().splitlines()[-1])


def taylor_seer(pipeline: Any, steps: int, warmup: int, every: int) -> Any:
    """TaylorSeer (arXiv 2503.06923), order 1 on every block's output: `every`-th step computes, after the warm-up."""
    import torch
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=every, disable_cache_before_step=warmup, max_order=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+"],
    )  # fmt: skip
    return diffusers_hook(pipeline, config, steps)
