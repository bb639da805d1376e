"""Recipes: what to erase, from what, how; YAML files, strict and typed."""

from sdd_lora.recipe.presets import IMPLIED, PRESETS
from sdd_lora.recipe.recipe import Recipe
from sdd_lora.recipe.sections import (
    ATTENTION,
    KINDS,
    NOXATTN,
    Lora,
    MeasurePrompts,
    MeasureSettings,
    ObjectiveSettings,
    Optimizer,
    Preserve,
    RolloutSettings,
    Training,
)

__all__ = [
    "ATTENTION",
    "IMPLIED",
    "KINDS",
    "NOXATTN",
    "PRESETS",
    "Lora",
    "MeasurePrompts",
    "MeasureSettings",
    "ObjectiveSettings",
    "Optimizer",
    "Preserve",
    "Recipe",
    "RolloutSettings",
    "Training",
]
