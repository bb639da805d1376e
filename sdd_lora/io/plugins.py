"""A user's own code by name: `package.module:name`, or `file.py:name` beside what says so."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from sdd_lora.errors import BadInput

_NAME = re.compile(r"(?P<place>[\w.]+|.+\.py):(?P<name>[A-Za-z_]\w*)")


def is_plugin(text: str) -> bool:
    """Whether a text names code: `module:name` or `file.py:name`."""
    return _NAME.fullmatch(text) is not None


def load_plugin(text: str, folder: Path) -> Any:
    """What `module:name` or `file.py:name` names; files are looked for in `folder`, modules there,
    too. It runs that code. Raises BadInput where it is not there or can't be imported."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise BadInput(f"{text}: expected module:name or file.py:name")
    place, name = match["place"], match["name"]
    try:
        module = _from_file(folder / place) if place.endswith(".py") else _imported(place, folder)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise BadInput(f"{text}: can't import it: {type(error).__name__}: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise BadInput(f"{text}: {place} has no {name}") from None


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sdd_lora_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _imported(module: str, folder: Path) -> Any:
    sys.path.insert(0, str(folder.resolve()))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder.resolve()))
