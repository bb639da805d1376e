"""The command line: one thin file per verb. Importing it imports no torch."""

import importlib
import pkgutil
import sys

from sdd_lora.cli.common import app


def main() -> None:
    """Entry point of `sdd-lora`."""
    if hasattr(sys.stdout, "reconfigure"):  # a narrow code page must not lose a result
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
