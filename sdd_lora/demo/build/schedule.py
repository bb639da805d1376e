"""Learning-rate schedule and weight average of the build stages."""

import math
from pathlib import Path
from typing import Any

import torch

from sdd_lora.demo.build.checkpoints import save_state
from sdd_lora.training.ema import decay_at, update_average


def cosine(progress: float, warmup: float) -> float:
    """Factor on the learning rate: linear up to `warmup`, then a half cosine down to 0 at 1."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class WeightAverage:
    """Average of a module's parameters, with decay_t = min(decay, (1+t)/(10+t))."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        decay = decay_at(self.updates, self.decay, warmup=True)
        update_average(self.average, dict(module.named_parameters()), decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def write_start(state: Path, step: int, model: torch.nn.Module) -> None:
    """Write `model` as a run's state at `step`, its average and all; refuses to replace a run."""
    if state.exists():
        raise FileExistsError(f"{state} holds a run already; move it away first")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    save_state(state, step, model=model, optimizer=optimizer, ema=WeightAverage(model, decay=0.999))
