# SPDX-License-Identifier: Apache-2.0
"""One resumable optimisation loop: all randomness of a step follows from (seed, step), so no random state is saved.

With several workers each takes its share of every batch and gradients are averaged, once per step: on a shared machine
two processes of one thread each lose far less to other programs than one process of two threads.
"""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: int) -> slice:
    """The part of a batch that is this worker's."""
    size = batch // workers()
    return slice(rank() * size, (rank() + 1) * size)


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Loop:
    """Warm-up, cosine, gradient clipping and a moving average; `run` continues where a checkpoint ended."""

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        steps: int,
        rate_at: Callable[[int], float],
        decay: float,
        bf16: bool,
        read_only: bool = False,
    ):
        self.model: Any = model
        self.path, self.steps, self.rate_at = path, steps, rate_at
        self.decay, self.bf16, self.step, self.read_only = decay, bf16, 0, read_only
        self.average: Any = copy.deepcopy(model).requires_grad_(False).eval()
        settings: Dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **settings)
        self.losses = path.with_suffix(".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._load(torch.load(path, map_location="cpu", weights_only=True))

    def run(self, loss_at: Callable[[nn.Module, int], torch.Tensor], save_every: int, stop_at: int = 0) -> None:
        """Minimise `loss_at(model, step)`; `stop_at` ends early, as an interruption would."""
        last = min(self.steps, stop_at or self.steps)
        bar = tqdm(
            range(self.step, last), initial=self.step, total=self.steps, desc=self.path.stem, mininterval=10,
            disable=rank() > 0,
        )  # fmt: skip
        self.model.train()
        with open(self.losses if rank() == 0 else os.devnull, "a") as log:
            for self.step in bar:
                loss = self._update(loss_at)
                log.write(json.dumps({"step": self.step, "loss": round(loss, 6)}) + "\n")
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                if (self.step + 1) % save_every == 0:
                    log.flush()
                    self._save(self.step + 1)
        self.step = last
        self._save(last)

    def _update(self, loss_at: Callable[[nn.Module, int], torch.Tensor]) -> float:
        rate = self.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = loss_at(self.model, self.step)
        self.model.zero_grad()
        loss.backward()
        loss = self._mean_over_workers(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._average()
        return loss.item()

    def _mean_over_workers(self, loss: torch.Tensor) -> torch.Tensor:
        """Average the gradients in place; returns the average loss."""
        if workers() == 1:
            return loss.detach()
        grads: List[Any] = [parameter.grad for parameter in self.model.parameters()]
        flat = torch.cat([loss.detach().float().reshape(1)] + [grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= workers()
        parts = flat[1:].split([grad.numel() for grad in grads])
        for grad, part in zip(grads, parts):
            grad.copy_(part.view_as(grad))
        return flat[0]

    @torch.no_grad()
    def _average(self) -> None:
        # A short memory at first, so that the random start is forgotten.
        decay = min(self.decay, (self.step + 1) / (self.step + 10))
        mine: List[torch.Tensor] = list(self.average.parameters())
        theirs: List[torch.Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for target, source in zip(self.average.buffers(), self.model.buffers()):
            target.copy_(source)

    def _save(self, step: int) -> None:
        if rank() > 0:
            return
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def _load(self, state: Dict) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if rank() > 0 or self.read_only:
            return
        # Lines past the checkpoint belong to steps that are about to be repeated.
        lines = self.losses.read_text().splitlines() if self.losses.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] < self.step]
        self.losses.write_text("".join(line + "\n" for line in kept))
