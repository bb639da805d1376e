"""A build stage's resumable state: one file, replaced whole."""

import os
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, step: int, **parts: Any) -> None:
    """Write `step` and every part's `state_dict()`."""
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step} | {k: part.state_dict() for k, part in parts.items()}, temporary)
    os.replace(temporary, path)


def load_state(path: Path, **parts: Any) -> int:
    """Read back into the parts; returns the step, 0 where there is no file yet."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])
