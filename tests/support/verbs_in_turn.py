"""Calls of the command line, one after another in one process: a JSON list of arguments each."""

import json
import sys

from sdd_lora.cli import app

for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as end:
        if end.code:
            raise
