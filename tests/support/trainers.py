"""Trainers of the tiny UNet, in every way that a recipe can ask for."""

from pathlib import Path
from typing import Any

import torch
from support.small import ddim, embeddings, small_unet

from sdd_lora.recipe import Recipe
from sdd_lora.training.trainer import Trainer

_ESD = {"ema": {"decay": 0.0}}
_FULL = {"parameters": "full", "lora": {}}
WAYS: dict[str, dict[str, Any]] = {
    "8-bit": {},
    "adamw": {"optimizer": {"kind": "adamw"}},
    "points": {"rollout": {"steps": 7, "batch": 2, "points": 3}},
    "accumulation": {
        "rollout": {"steps": 7, "batch": 2, "points": 3},
        "training": {"iterations": 6, "gradient_accumulation": 2},
    },
    "prompts": {"rollout": {"steps": 4, "batch": 2, "prompts": 3}},
    "pictures": {
        "preserve": {"prompts": ["d", "e"]},
        "pictures": {"drawings": 1, "kept_drawings": 1, "batch": 3, "learnt": 2},
        "rollout": {"steps": 4},
        "training": {"iterations": 4, "seed": 3},
    },
    "checkpointing": {"training": {"iterations": 6, "gradient_checkpointing": True}},
    "bf16": {"training": {"iterations": 6, "precision": "bf16", "base_precision": "bf16"}},
    "nf4": {"training": {"iterations": 6, "base_precision": "nf4"}},
    "embeddings": {"parameters": "embeddings"},
    "full": _FULL | {"optimizer": {"learning_rate": 1e-4}},
    "esd-x": _ESD | {"objective": {"kind": "esd-x", "eta": 3.0}},
    "esd-u": _ESD | _FULL | {"objective": {"kind": "esd-u", "eta": 1.0}},
    "leco": _ESD
    | {"objective": {"kind": "leco", "eta": 1.0}, "lora": {"rank": 2, "targets": ["attention"]}},
    "esd-u-lora": _ESD
    | {
        "objective": {"kind": "esd-u", "eta": 1.0},
        "lora": {"targets": ["noxattn"]},
        "training": {"iterations": 6, "base_precision": "nf4", "gradient_checkpointing": True},
    },
}


def recipe(**changes: Any) -> Recipe:
    """Three concepts, six iterations, two trajectories of four steps."""
    fields = {
        "name": "test",
        "model": "none",
        "concepts": ["a", "b", "c"],
        "lora": {"rank": 2},
        "ema": {"decay": 0.9, "warmup": True},
        "rollout": {"steps": 4, "batch": 2},
        "training": {"iterations": 6, "seed": 3},
    }
    return Recipe.model_validate(fields | changes)


def trainer(settings: Recipe, path: Path | None = None, **prompts: int) -> Trainer:
    """A trainer of the tiny UNet; `prompts` are the numbers of `concepts` and `kept` prompts."""
    return Trainer(settings, small_unet(), ddim(), embeddings(**prompts), path)


def result(trained: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trained.teacher_tensors().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
