"""The command line: one thin file per verb. Importing it imports no torch."""

import importlib
import pkgutil

from sdd_lora.cli.common import app


def main() -> None:
    """Entry point of `sdd-lora`."""
    app()


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
