"""`sdd-lora train`."""

from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.common import Result, speaks, verb


@verb("train")
def train(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipe files, or folders of them.", metavar="RECIPE...")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The run's folder [default: runs/NAME]. With several "
            "recipes, the folder that holds one folder each.",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field: training.iterations=300. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Keep the training state of a finished run.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
) -> Result:
    """Train safety adapters by recipe, measure them, and write their cards.

    Ctrl-C (or a crash) leaves a run that --resume continues. Several recipes run one after another
    over one loaded base, and end in a summary. With --force a finished run stays until the new one
    is whole.

    Examples:

        sdd-lora train recipes/demo/weapons.yaml

        sdd-lora train recipes/demo -o runs --set training.iterations=50

        sdd-lora train recipes/demo/gore.yaml --resume

    Several processes share each recipe's trajectories:
    `torchrun --nproc-per-node 2 -m sdd_lora train …`.
    """
    from sdd_lora.cli.tables import measures_table, runs_table
    from sdd_lora.runs import train_recipes

    speaker = speaks()
    finished = train_recipes(recipes, output, changes or [], resume, keep_state, force)
    if not speaker:
        raise typer.Exit
    if len(finished) == 1:
        folder, metrics = finished[0]
        text = f"{folder}\n{measures_table(metrics)}"
    else:
        text = runs_table(finished)
    return Result({"runs": [{"folder": str(f)} | m for f, m in finished]}, text)
