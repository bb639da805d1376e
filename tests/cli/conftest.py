"""The command line in this process: a new one takes seconds to import torch and diffusers."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from sdd_lora.cli import app


@pytest.fixture
def call(capsys) -> Callable[..., Any]:
    """Call `sdd-lora` with arguments; stdout and stderr of what it printed."""

    def run(*arguments: object, code: int = 0) -> Any:
        logging.getLogger("sdd_lora").handlers.clear()  # they hold an earlier call's stderr
        with pytest.raises(SystemExit) as ended:
            app(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
        return printed

    return run


@pytest.fixture
def ask(call) -> Callable[..., Any]:
    """The one JSON object that a verb prints."""
    return lambda *arguments, code=0: json.loads(call(*arguments, "--json", code=code).out)


@pytest.fixture
def refused(call) -> Callable[..., str]:
    """stderr of a call with bad input: exit code 2, nothing on stdout, no traceback."""

    def run(*arguments: object) -> str:
        printed = call(*arguments, code=2)
        assert printed.out == "" and "Traceback" not in printed.err
        return printed.err

    return run
