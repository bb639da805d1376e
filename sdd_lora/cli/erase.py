"""The verb that needs no training: erase."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdd_lora.cli.adapters import check_outputs, line, write
from sdd_lora.cli.common import AdapterName, Force, NewDtype, OutputFile, Result, verb
from sdd_lora.cli.tables import erased_table
from sdd_lora.progress import warn


@verb("erase", loads_model=True)
def erase(
    concepts: Annotated[
        list[str],
        typer.Argument(
            help="What to erase, in words: things, people, styles; or .txt files, one a line.",
            metavar="CONCEPT...",
        ),
    ],
    output: OutputFile,
    model: Annotated[
        str, typer.Option("--model", help="The MODEL whose text encoder reads the words.")
    ] = "demo",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            help="A word or .txt file of what must stay, beside the tokenizer's words, which all "
            "stay; together as heavy as these. Repeatable.",
            metavar="FILE|WORD",
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option("--into", help="What is drawn instead [default: other words' mean]."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Directions to take out [default: found].")
    ] = None,
    format: Annotated[
        Literal["portable", "lora"],
        typer.Option(
            "--format",
            "--form",
            help="portable: a few kB, for every model of this text encoder; lora: for MODEL, "
            "loaded by every program.",
        ),
    ] = "portable",
    dtype: NewDtype = "fp16",
    name: AdapterName = None,
    force: Force = False,
) -> Result:
    """Make an eraser from words alone, in seconds.

    It changes what the model reads, not how it draws: no picture is made and no UNet is loaded.
    Everything else that the tokenizer knows is kept; words that are too near to it go too, and are
    named. The table shows for each rank what its last direction is worth, what is left of the
    concepts' difference from other words, and how much of it moves kept words.

    Examples:

        sdd-lora erase bomb "kitchen knife" dagger --model demo -o no-weapons.safetensors

        sdd-lora erase "pencil sketch" --model demo --format lora -o no-sketches.safetensors

        sdd-lora erase axe --keep chopper --into "a flower" -o axes-to-flowers.safetensors
    """
    from sdd_lora.checkpoint.portable import adapter_on
    from sdd_lora.training.erase import erase as make_eraser

    check_outputs(force, output)
    erased = make_eraser(
        _phrases(concepts),
        model,
        keep=_phrases(keep or []),
        into=into,
        rank=rank,
        name=name or output.stem,
    )
    adapter = erased.adapter if format == "portable" else adapter_on(erased.adapter, model)
    written = write(adapter, output, adapter.own_format, dtype)
    return Result(erased.as_json() | written, f"{erased_table(erased)}\n{line(written)}")


def _phrases(arguments: list[str]) -> list[str]:
    """Words as they are given, and those of files, one a line."""
    from sdd_lora.generation.prompt_files import read_prompts

    found: list[str] = []
    for argument in arguments:
        is_file = argument.endswith(".txt")
        found += [p.text for p in read_prompts(Path(argument))] if is_file else [argument]
    for phrase in found:
        if "," in phrase:
            apart = " ".join(shlex.quote(part.strip()) for part in phrase.split(","))
            warn(f"{phrase!r} is one phrase; if you mean several words, give them apart: {apart}")
    return found
