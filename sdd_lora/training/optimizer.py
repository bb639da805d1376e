"""The optimizer, and its learning rate as a pure function of progress."""

import math
from typing import Any

import torch

from sdd_lora.progress import warn
from sdd_lora.recipe import Optimizer as OptimizerSettings

#: bitsandbytes keeps the states of smaller tensors in 32 bits unless told otherwise
_ALWAYS_8BIT = 1


def make_optimizer(
    settings: OptimizerSettings, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """8-bit AdamW of bitsandbytes, its states 8-bit for small tensors too; or torch's AdamW."""
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            warn(f"bitsandbytes is missing ({error}): using AdamW with 32-bit states instead")
        else:
            return bitsandbytes.optim.AdamW8bit(parameters, min_8bit_size=_ALWAYS_8BIT, **arguments)
    return torch.optim.AdamW(parameters, **arguments)


def learning_rate(iteration: int, iterations: int, settings: OptimizerSettings) -> float:
    """The learning rate of an iteration (from 0): linear warm-up, then the schedule."""
    highest, warmup = settings.learning_rate, settings.warmup_iterations
    if iteration < warmup:
        return highest * ((iteration + 1) / warmup)
    progress = (iteration - warmup) / max(1, iterations - warmup)
    if settings.schedule == "linear":
        return highest * (1 - progress)
    if settings.schedule == "cosine":
        return highest * (0.5 * (1 + math.cos(math.pi * progress)))
    return highest
