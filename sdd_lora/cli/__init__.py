"""The command line: a file a family of verbs. Importing it imports no torch."""

import sys

# in the order in which --help lists the verbs
from sdd_lora.cli import train, erase, plan, pictures, adapters, inspect, checkpoints  # isort: skip  # noqa: F401
from sdd_lora.cli.common import app


def main() -> None:
    """Entry point of `sdd-lora`."""
    if hasattr(sys.stdout, "reconfigure"):  # a narrow code page must not lose a result
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
