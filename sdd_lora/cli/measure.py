"""`sdd-lora measure`."""

from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.common import Result, verb, weighted
from sdd_lora.errors import BadInput


@verb("measure")
def measure(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapter files, runs' folders or hub ids, with optional weights; several are "
            "measured as their exact sum.",
            metavar="A[:w]...",
        ),
    ],
    recipe: Annotated[
        Path, typer.Option("--recipe", help="Whose `measure` section says how, and on what.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for the adapter and its numbers.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field: measure.images=100. Repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Its name [default: its own, or the folder's].")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
) -> Result:
    """Measure adapters that are there already: the same table, card and picture as after training.

    Examples:

        sdd-lora measure runs/weapons --recipe recipes/demo/weapons.yaml -o weapons-again

        sdd-lora measure runs/weapons runs/gore --recipe recipes/demo/unsafe.yaml -o both

        sdd-lora measure my.safetensors:0.7 --recipe gore.yaml --set model=demo-community -o there
    """
    from sdd_lora.adapter.adapter import Adapter, adapter_file
    from sdd_lora.adapter.algebra import stack
    from sdd_lora.cli.tables import measures_table
    from sdd_lora.io.strict_yaml import parse_override
    from sdd_lora.recipe import Recipe
    from sdd_lora.runs import train as runs
    from sdd_lora.runs.folder import ADAPTER, PEFT_TWIN

    settings = Recipe.load(recipe, dict(map(parse_override, changes or [])))
    named = [weighted(adapter) for adapter in adapters]
    for path, _ in named:
        source = adapter_file(path).resolve()
        if source in ((output / ADAPTER).resolve(), (output / PEFT_TWIN).resolve()):
            raise BadInput(f"{source}: is measured and written at once; choose another output")
    parts = [(Adapter.load(path), weight) for path, weight in named]
    if len(parts) == 1 and parts[0][1] == 1:
        measured = parts[0][0]
        if name is not None:
            measured = Adapter(measured.factors, measured.metadata | {"name": name})
    else:
        measured = stack(parts, name or output.name)
    metrics = runs.measure(measured, settings, output, force=force)
    return Result({"folder": str(output)} | metrics, f"{output}\n{measures_table(metrics)}")
