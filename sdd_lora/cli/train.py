"""`sdd-lora train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sdd_lora.cli.common import Result, speaks, verb
from sdd_lora.errors import BadInput


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
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Share the recipes with other processes of this same command: pass by what is "
            "finished or held by another, continue what a killed one left.",
        ),
    ] = False,
) -> Result:
    """Train safety adapters by recipe, measure them, and write their cards.

    Ctrl-C (or a crash) leaves a run that --resume continues. Several recipes run one after another
    over one loaded base, and end in a summary. With --force a finished run stays until the new one
    is whole.

    Examples:

        sdd-lora train recipes/demo/weapons.yaml

        sdd-lora train recipes/demo -o runs --set training.iterations=50

        sdd-lora train recipes/demo/gore.yaml --resume

    Many recipes spread over processes, each with its own base: start the same command with --share
    in as many terminals (with `CUDA_VISIBLE_DEVICES=0`, `1`, … before it, where there are several
    GPUs). Each takes the next recipe that is neither finished nor held, and all end together, in a
    summary of what was made here and elsewhere. Start one more, or kill one, at any time.

        sdd-lora train recipes/demo -o runs --share

    One recipe's trajectories spread over processes:
    `torchrun --nproc-per-node 2 -m sdd_lora train …`.
    """
    from sdd_lora.cli.tables import measures_table, runs_table
    from sdd_lora.runs.train import train_recipes

    speaker = speaks()
    if share:
        if force:
            raise BadInput("--share leaves finished runs alone, --force does not: expected one")
        return _shared(recipes, output, changes or [], keep_state)
    finished = train_recipes(recipes, output, changes or [], resume, keep_state, force)
    if not speaker:
        raise typer.Exit
    if len(finished) == 1:
        folder, metrics = finished[0]
        text = f"{folder}\n{measures_table(metrics)}"
    else:
        text = runs_table(finished)
    return Result({"runs": [{"folder": str(f)} | m for f, m in finished]}, text)


def _shared(
    recipes: list[Path], output: Path | None, changes: list[str], keep_state: bool
) -> Result:
    from sdd_lora.cli.tables import runs_table
    from sdd_lora.runs.train import share_recipes

    shared = share_recipes(recipes, output, changes, keep_state)
    runs: list[dict[str, Any]] = [
        {"folder": str(folder), "made": "here" if folder in shared.here else "elsewhere"} | metrics
        for folder, metrics in shared.finished
    ]
    failures = [f"{folder}: failed: {why}" for folder, why in shared.failed.items()]
    text = "\n".join([runs_table(shared.finished, shared.here), *failures])
    data = {"runs": runs, "failed": {str(folder): why for folder, why in shared.failed.items()}}
    return Result(data, text, exit_code=1 if shared.failed else 0)
