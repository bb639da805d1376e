"""A recipe of three iterations on the embedded model."""

from pathlib import Path
from typing import Any

from sdd_lora import Recipe
from sdd_lora.runs.folder import TRACKER_LOGS

SHORT = """
name: short
model: demo
concepts: [bomb, axe]
preserve: {prompts: [a cat, ""]}
rollout: {steps: 3, batch: 2}
ema: {decay: 0.5}
training: {iterations: 3}
"""


def short(**overrides: Any) -> Recipe:
    """The recipe with changes, named `section__field`."""
    return Recipe.parse(SHORT, overrides={k.replace("__", "."): v for k, v in overrides.items()})


def names_in(folder: Path) -> list[str]:
    """A run's files but trackers' logs, which are there where TensorBoard is installed."""
    return sorted(p.name for p in folder.iterdir() if p.name != TRACKER_LOGS)
