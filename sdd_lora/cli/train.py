"""Verbs that train and measure by recipe: demo, train, measure."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdd_lora.cli.common import (
    Changes,
    ForceRun,
    Name,
    Recipes,
    Result,
    Resume,
    WeightedAdapters,
    is_main_process,
    verb,
    weighted,
)
from sdd_lora.cli.tables import measures_table, runs_table
from sdd_lora.errors import BadInput


@verb("demo")
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder [default: runs/demo-RECIPE]."),
    ] = None,
    recipe: Annotated[
        Literal["weapons", "substances", "gore", "unsafe", "style"],
        typer.Option(
            help="What to erase: a group of nouns, all three unsafe groups at once "
            "(unsafe), or one drawing style."
        ),
    ] = "weapons",
    seed: Annotated[int, typer.Option(help="Seed of the training.", min=0)] = 0,
    images: Annotated[
        int | None,
        typer.Option(
            help="Images drawn of each kind of prompt to measure with [default: the recipe's].",
            min=1,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A few iterations and images: does it run? They say little of how well."
        ),
    ] = False,
    resume: Resume = False,
    force: ForceRun = False,
) -> Result:
    """Train an eraser on the embedded model, measure it, and draw before and after.

    Nothing is downloaded. Needs a few minutes on two CPU cores.

    Examples:

        sdd-lora demo

        sdd-lora demo --recipe substances -o my-run --seed 1
    """
    from sdd_lora.runs.train import PICTURE, packaged_recipe, train_recipes

    changes = [f"training.seed={seed}"]
    if quick:
        changes += ["training.iterations=4", "measure.images=2"]
    if images is not None:
        changes.append(f"measure.images={images}")
    path = packaged_recipe(f"demo/{recipe}")
    folder = output or Path("runs") / f"demo-{recipe}"
    speaker = is_main_process()
    ((folder, metrics),) = train_recipes([path], folder, changes, resume=resume, force=force)
    if not speaker:
        raise typer.Exit
    text = (
        f"{measures_table(metrics)}\n\nadapter  {folder / 'adapter.safetensors'} "
        f"({metrics['adapter']['bytes'] / 1000:.0f} kB, "
        f"{metrics['training']['seconds']:.0f} s of training, "
        f"{metrics['training']['unet_passes']} UNet passes)\npicture  {folder / PICTURE}"
    )
    return Result({"folder": str(folder)} | metrics, text)


@verb("train")
def train(
    recipes: Recipes,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The run's folder [default: runs/NAME]. With several "
            "recipes, the folder that holds one folder each.",
        ),
    ] = None,
    changes: Changes = None,
    resume: Resume = False,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Keep the training state of a finished run.")
    ] = False,
    force: ForceRun = False,
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
    from sdd_lora.runs.train import train_recipes

    speaker = is_main_process()
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


@verb("measure")
def measure(
    adapters: WeightedAdapters,
    recipe: Annotated[
        Path, typer.Option("--recipe", help="Whose `measure` section says how, and on what.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for the adapter and its numbers.")
    ],
    changes: Changes = None,
    name: Name = None,
    force: ForceRun = False,
) -> Result:
    """Measure adapters that are there already: the same table, card and picture as after training.

    Examples:

        sdd-lora measure runs/weapons --recipe recipes/demo/weapons.yaml -o weapons-again

        sdd-lora measure runs/weapons runs/gore --recipe recipes/demo/unsafe.yaml -o both

        sdd-lora measure my.safetensors:0.7 --recipe gore.yaml --set model=demo-community -o there
    """
    from sdd_lora.adapter.adapter import Adapter, adapter_file
    from sdd_lora.adapter.algebra import stack
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
