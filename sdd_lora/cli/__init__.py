"""The command line: one thin file per verb. Importing it imports no torch."""

import importlib
import pkgutil
import sys

from sdd_lora.cli import common


def main() -> None:
    """Entry point of `sdd-lora`."""
    if hasattr(sys.stdout, "reconfigure"):  # a narrow code page must not lose a result
        sys.stdout.reconfigure(errors="backslashreplace")
    _import_verbs(*sys.argv[1:2])
    common.app()


def __getattr__(name: str) -> object:
    """`app`, with all verbs."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_verbs()
    return common.app


def _import_verbs(wanted: str = "") -> None:
    """The one that is wanted, so that it starts at once; all where none is, for the help."""
    files = [module.name for module in pkgutil.iter_modules(__path__)]
    for file in [file for file in files if file.rstrip("_") == wanted] or files:
        importlib.import_module(f"{__name__}.{file}")
