"""What verbs share: options by name, --json, --debug, -q, exit codes."""

import errno
import functools
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.progress import say
from sdd_lora.version import __version__

if TYPE_CHECKING:
    from sdd_lora.io.strict_yaml import Overrides

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

Model = Annotated[
    str,
    typer.Argument(
        help="demo, demo-community, a diffusers folder, one .safetensors or .ckpt file, or a hub "
        "id.",
        metavar="MODEL",
    ),
]
AdapterFile = Annotated[
    str, typer.Argument(help="An adapter file, a run's folder, or a hub id.", metavar="FILE")
]
WeightedAdapters = Annotated[
    list[str],
    typer.Argument(
        help="Adapter files, runs' folders or hub ids, with optional weights; negative ones take "
        "an adapter away.",
        metavar="A[:w]...",
    ),
]
Recipes = Annotated[
    list[Path], typer.Argument(help="Recipe files, or folders of them.", metavar="RECIPE...")
]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
Resolve = Annotated[
    bool,
    typer.Option(
        "--resolve",
        help="Make an eraser from words anew with the MODEL's own text encoder, where that is "
        "another.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that is there.")]
ForceRun = Annotated[bool, typer.Option("--force", help="Replace a run that is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Do the I-th of N parts of the work, as a job of an array: item k is part k mod N's.",
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: training.iterations=300. Repeatable."),
]
AdapterName = Annotated[
    str | None, typer.Option("--name", help="Its name [default: that of the output].")
]
Dtype = Literal["fp16", "bf16", "fp32"]
Precision = Annotated[
    Dtype | None,
    typer.Option(
        "--precision", help="Number format to draw in [default: fp16 on CUDA, else fp32]."
    ),
]
StoredDtype = Annotated[
    Dtype | None, typer.Option("--dtype", help="How to store it [default: as in FILE].")
]
NewDtype = Annotated[Dtype, typer.Option("--dtype", help="How to store it.")]
HighestRank = Annotated[
    int | None, typer.Option("--rank", min=1, help="The highest rank of a module.")
]
Energy = Annotated[
    float | None, typer.Option("--energy", help="The share of each module's squared norm to keep.")
]

EXIT_INTERRUPTED = 130
LONGEST_MESSAGE = 8000
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sdd-lora {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...


@dataclass
class Result:
    """What a verb found: `data` is printed by --json, `text` otherwise, on stdout."""

    data: dict[str, Any]
    text: str
    exit_code: int = 0


#: headings of `sdd-lora --help`, by the file of a verb
_PANELS = {
    "train": "Erase",
    "plan": "Erase",
    "erase": "Erase",
    "pictures": "Draw and compare",
    "adapters": "Adapters",
    "inspect": "Adapters and checkpoints",
    "checkpoints": "Checkpoints",
}
_SHARED = {
    "json_output": Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Show a traceback when it fails.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and results.")],
}


class _VerbOfRecipes(TyperCommand):
    """Names the field that an unknown option may have meant: --rank, --set lora.rank=…"""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer's, or click's, on which other versions are built
            if type(error).__name__ == "NoSuchOption":
                from sdd_lora.io.strict_yaml import fields_meant
                from sdd_lora.recipe import Recipe

                unknown: Any = error
                name = unknown.option_name.lstrip("-").replace("-", "_")
                fields = [f"--set {field}=…" for field in fields_meant(Recipe, [name])]
                unknown.possibilities = [*(unknown.possibilities or ()), *fields]
            raise


def verb(
    name: str, *, loads_model: bool = False
) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a function that returns a `Result` a verb; its docstring is the help. One that
    `loads_model` says so before the seconds that importing torch takes."""

    def decorate(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, json_output: bool, debug: bool, quiet: bool, **arguments: Any) -> None:
            _set_up_logging(quiet, debug)
            if loads_model and os.environ.get("RANK", "0") == "0":
                say("loading PyTorch and the model")
            try:
                result = function(**arguments)
                _print(result, json_output)
            except KeyboardInterrupt as error:
                _fail(str(error) or "interrupted", EXIT_INTERRUPTED, debug)
            except SddLoraError as error:
                _fail(str(error), error.exit_code, debug)
            except typer.Exit:
                raise
            except Exception as error:
                _fail(*_put_into_words(error), debug)
            else:
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
        panel = _PANELS[function.__module__.rpartition(".")[2]]
        kind = _VerbOfRecipes if name in ("train", "plan") else TyperCommand
        app.command(name, cls=kind, no_args_is_help=False, rich_help_panel=panel)(run)
        return run

    return decorate


def parse_overrides(changes: Sequence[str] | None) -> "Overrides":
    """["ema.decay=0.99"], as --set takes them → {"ema.decay": 0.99}; values are read as YAML."""
    from sdd_lora.io.strict_yaml import read_yaml

    overrides = {}
    for text in changes or ():
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise BadInput(f"--set {text}: expected name=value, such as training.iterations=300")
        overrides[name] = read_yaml(value, f"--set {name}").value
    return overrides


def is_main_process() -> bool:
    """Whether this is the process, of those that torchrun started, that prints. The others fall
    silent, but for warnings."""
    from sdd_lora.io.distributed import processes

    is_main = bool(processes().is_main_process)
    if not is_main:
        logging.getLogger("sdd_lora").setLevel(logging.WARNING)
    return is_main


def _print(result: Result, as_json: bool) -> None:
    text = json.dumps(result.data, indent=2, ensure_ascii=False) if as_json else result.text
    if not text:
        return
    try:
        print(text, flush=True)
    except OSError as error:
        _drop_stdout()
        raise SddLoraError(f"stdout: the result can't be written: {error.strerror}") from error


def _drop_stdout() -> None:
    """Python would try once more at its end to write what could not be written."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _put_into_words(error: Exception) -> tuple[str, int]:
    """What to say of an error that nobody has put into words, and the exit code."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        shown = str(error.filename)[:40]
        return f"{shown}…: no such file or folder: too long a name", BadInput.exit_code
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}", BadInput.exit_code
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's
        return f"{error}: a link to itself; expected a file or folder", BadInput.exit_code
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _fail(message: str, exit_code: int, debug: bool) -> None:
    """Called inside an `except` block."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"sdd-lora: {_harmless(in_options(message))}", file=sys.stderr, flush=True)
    raise typer.Exit(exit_code)


def in_options(message: str) -> str:
    """A message that names parameters of the Python API, with the options of the same names:
    "`force=True`" → "--force", "`overrides["ema.decay"]`" → "--set ema.decay"."""

    def option(found: re.Match[str]) -> str:
        name = "-o" if found[1] == "out" else f"--{found[1].replace('_', '-')}"
        return name if found[2] == "True" else f"{name} {found[2]}"

    value = r"""=['"]?([^`'"]*)['"]?"""
    message = re.sub(r'`overrides\["([^"`]+)"\]`', r"--set \1", message)
    message = re.sub(rf'`overrides\["([^"`]+)"\]{value}`', r"--set \1=\2", message)
    return re.sub(rf"`(\w+){value}`", option, message)


class _Formatter(logging.Formatter):
    """Messages alone, as the command line spells them."""

    def format(self, record: logging.LogRecord) -> str:
        return in_options(super().format(record))


def _harmless(message: str) -> str:
    """Names in files may be anything: none drives the terminal, or fills it."""
    shown = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + " …"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shown)


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
        handler.setFormatter(_Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
