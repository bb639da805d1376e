"""Safety adapters for Stable Diffusion 1.x: safe self-distillation with LoRA."""

import importlib
from typing import TYPE_CHECKING

from sdd_lora.version import __version__

_PUBLIC = {
    "Adapter": "sdd_lora.adapter.adapter",
    "stack": "sdd_lora.adapter.algebra",
    "bake": "sdd_lora.checkpoint.bake",
    "Recipe": "sdd_lora.recipe",
    "erase": "sdd_lora.runs.erase",
    "train": "sdd_lora.runs.train",
    "load_pipeline": "sdd_lora.sd.pipeline",
}
__all__ = ["Adapter", "Recipe", "__version__", "bake", "erase", "load_pipeline", "stack", "train"]

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.algebra import stack
    from sdd_lora.checkpoint.bake import bake
    from sdd_lora.recipe import Recipe
    from sdd_lora.runs.erase import erase
    from sdd_lora.runs.train import train
    from sdd_lora.sd.pipeline import load_pipeline


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
