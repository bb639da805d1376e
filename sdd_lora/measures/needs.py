"""What a measure needs from outside: optional packages, and weights that the user supplies."""

import importlib
from pathlib import Path
from typing import Any

from sdd_lora.errors import BadInput


def package(name: str, extra: str) -> Any:
    """An optional package. Raises BadInput, saying how to install it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            f"needs the package {name} ({error}); pip install 'sdd_lora[{extra}]'"
        ) from error


def supplied(
    path: Path | None, option: str, what: str, source: str, *, folder: bool = False
) -> Path:
    """A file, or folder, of the user's. Raises BadInput, saying what and from where, if missing."""
    if path is None:
        raise BadInput(
            f"expected {what} in the option `{option}`, found none; get it from {source}"
        )
    kind, there = ("folder", path.is_dir()) if folder else ("file", path.is_file())
    if not there:
        found = f"something that is no {kind}" if path.exists() else f"no such {kind}"
        raise BadInput(f"{option}: {path}: expected {what}, found {found}; from {source}")
    return path
