"""What every verb shares: --json, --debug, -q, exit codes."""

import functools
import inspect
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sdd_lora.errors import BadInput, SddLoraError

app = typer.Typer(
    name="sdd-lora",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a Stable Diffusion 1.x model not to draw something: train, share, stack and bake "
    "safety adapters.",
)

EXIT_INTERRUPTED = 130
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


@dataclass
class Result:
    """What a verb found: `data` is printed by --json, `text` otherwise, on stdout."""

    data: dict[str, Any]
    text: str
    exit_code: int = 0


_SHARED = {
    "json_output": Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Show a traceback when it fails.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and results.")],
}


def verb(name: str) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a function that returns a `Result` a verb; its docstring is the help."""

    def decorate(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, json_output: bool, debug: bool, quiet: bool, **arguments: Any) -> None:
            _set_up_logging(quiet, debug)
            try:
                result = function(**arguments)
            except KeyboardInterrupt as error:
                _fail(str(error) or "interrupted", EXIT_INTERRUPTED, debug)
            except SddLoraError as error:
                _fail(str(error), error.exit_code, debug)
            except typer.Exit:
                raise
            except Exception as error:
                _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, debug)
            else:
                _print(result, json_output)
                raise typer.Exit(result.exit_code)

        signature = inspect.signature(function)
        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for key, kind in _SHARED.items()
        ]
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *shared], return_annotation=None
        )
        run.__annotations__ = {**function.__annotations__, **_SHARED}
        app.command(name, no_args_is_help=False)(run)
        return run

    return decorate


def _print(result: Result, as_json: bool) -> None:
    text = json.dumps(result.data, indent=2, ensure_ascii=False) if as_json else result.text
    if text:
        print(text, flush=True)


def _fail(message: str, exit_code: int, debug: bool) -> None:
    """Called inside an `except` block."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"sdd-lora: {message}", file=sys.stderr, flush=True)
    raise typer.Exit(exit_code)


def _set_up_logging(quiet: bool, debug: bool) -> None:
    if not debug:  # the libraries' own bars and notices; ours say what a person needs
        for variable, value in _QUIET_LIBRARIES.items():
            os.environ.setdefault(variable, value)
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    log = logging.getLogger("sdd_lora")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False


def weighted(argument: str) -> tuple[str, float]:
    """ "A[:w]" → (A, w); the weight is 1 where none is given. Windows drives are left alone."""
    head, colon, tail = argument.rpartition(":")
    if not colon or len(head) <= 1 or "/" in tail or "\\" in tail:
        return argument, 1.0
    try:
        weight = float(tail)
    except ValueError:
        raise BadInput(f"{argument}: expected A or A:weight, found the weight {tail!r}") from None
    if not math.isfinite(weight):
        raise BadInput(f"{argument}: expected a finite weight, found {tail}")
    return head, weight
