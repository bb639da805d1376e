"""`sdd-lora demo`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.common import Result, speaks, verb


class DemoRecipe(str, Enum):
    """Recipes under recipes/demo/."""

    weapons = "weapons"
    substances = "substances"
    gore = "gore"
    unsafe = "unsafe"
    style = "style"


@verb("demo")
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder [default: runs/demo-RECIPE]."),
    ] = None,
    recipe: Annotated[
        DemoRecipe,
        typer.Option(
            help="What to erase: a group of nouns, all three unsafe groups at once "
            "(unsafe), or one drawing style."
        ),
    ] = DemoRecipe.weapons,
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
) -> Result:
    """Train an eraser on the embedded model, measure it, and draw before and after.

    Nothing is downloaded. Needs a few minutes on two CPU cores.

    Examples:

        sdd-lora demo

        sdd-lora demo --recipe substances -o my-run --seed 1
    """  # fmt: skip
    from sdd_lora.cli.tables import measures_table
    from sdd_lora.runs.train import PICTURE, packaged_recipe, train_recipes

    changes = [f"training.seed={seed}"]
    if quick:
        changes += ["training.iterations=4", "measure.images=2"]
    if images is not None:
        changes.append(f"measure.images={images}")
    path = packaged_recipe(f"demo/{recipe.value}")
    folder = output or Path("runs") / f"demo-{recipe.value}"
    speaker = speaks()
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
