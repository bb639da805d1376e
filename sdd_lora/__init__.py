"""Safety adapters for Stable Diffusion 1.x: safe self-distillation with LoRA."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "Adapter": "sdd_lora.adapter.adapter",
    "stack": "sdd_lora.adapter.compose",
    "bake": "sdd_lora.checkpoint.bake",
    "Recipe": "sdd_lora.recipe",
    "train": "sdd_lora.runs",
    "load_pipeline": "sdd_lora.generation.pipeline",
}
__all__ = ["Adapter", "Recipe", "bake", "load_pipeline", "stack", "train"]

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.compose import stack
    from sdd_lora.checkpoint.bake import bake
    from sdd_lora.generation.pipeline import load_pipeline
    from sdd_lora.recipe import Recipe
    from sdd_lora.runs import train


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
