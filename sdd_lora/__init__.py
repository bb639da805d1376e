"""Safety adapters for Stable Diffusion 1.x: safe self-distillation with LoRA.

What is public is imported when it is first used, so that `import sdd_lora` is quick.
"""

import importlib
from typing import TYPE_CHECKING

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.version import __version__

_PUBLIC = {
    "Adapter": "sdd_lora.adapter.adapter",
    "adapter_on": "sdd_lora.checkpoint.portable",
    "BakeReport": "sdd_lora.checkpoint.bake",
    "Erased": "sdd_lora.training.erase",
    "Extraction": "sdd_lora.checkpoint.extract",
    "Recipe": "sdd_lora.recipe",
    "Resized": "sdd_lora.adapter.algebra",
    "bake": "sdd_lora.checkpoint.bake",
    "erase": "sdd_lora.training.erase",
    "extract": "sdd_lora.checkpoint.extract",
    "load_pipeline": "sdd_lora.sd.pipeline",
    "measure": "sdd_lora.runs.measure",
    "resize": "sdd_lora.adapter.algebra",
    "solve": "sdd_lora.training.erase",
    "stack": "sdd_lora.adapter.algebra",
    "train": "sdd_lora.runs.train",
    "unbake": "sdd_lora.checkpoint.undo",
}
__all__ = [
    "Adapter",
    "BadInput",
    "BakeReport",
    "Erased",
    "Extraction",
    "Recipe",
    "Resized",
    "SddLoraError",
    "__version__",
    "adapter_on",
    "bake",
    "erase",
    "extract",
    "load_pipeline",
    "measure",
    "resize",
    "solve",
    "stack",
    "train",
    "unbake",
]

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.algebra import Resized, resize, stack
    from sdd_lora.checkpoint.bake import BakeReport, bake
    from sdd_lora.checkpoint.extract import Extraction, extract
    from sdd_lora.checkpoint.portable import adapter_on
    from sdd_lora.checkpoint.undo import unbake
    from sdd_lora.recipe import Recipe
    from sdd_lora.runs.measure import measure
    from sdd_lora.runs.train import train
    from sdd_lora.sd.pipeline import load_pipeline
    from sdd_lora.training.erase import Erased, erase, solve


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
