"""Verbs that train and measure by recipe: demo, train, measure."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdd_lora.cli.common import (
    AdapterName,
    Changes,
    ForceRun,
    Precision,
    Recipes,
    Result,
    Resume,
    ShardOption,
    WeightedAdapters,
    is_main_process,
    parse_overrides,
    verb,
)
from sdd_lora.cli.tables import measures_table, runs_table
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.progress import warn


@verb("demo", loads_model=True)
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
    precision: Precision = None,
    resume: Resume = False,
    force: ForceRun = False,
) -> Result:
    """Train an eraser on the embedded model, measure it, and draw before and after.

    Nothing is downloaded. Needs a few minutes on two CPU cores.

    Examples:

        sdd-lora demo

        sdd-lora demo --recipe substances -o my-run --seed 1
    """
    from sdd_lora.io.strict_yaml import Overrides
    from sdd_lora.runs.folder import ADAPTER, PICTURE
    from sdd_lora.runs.many import packaged_recipe, train_recipes

    overrides: Overrides = {"training.seed": seed}
    if quick:
        overrides |= {"training.iterations": 4, "measure.images": 2}
    if images is not None:
        overrides["measure.images"] = images
    if precision is not None:
        overrides["measure.precision"] = precision
    path = packaged_recipe(f"demo/{recipe}")
    folder = output or Path("runs") / f"demo-{recipe}"
    speaker = is_main_process()
    ((folder, metrics),) = train_recipes([path], folder, overrides, resume, force=force)
    if not speaker:
        raise typer.Exit
    text = (
        f"{measures_table(metrics.measures)}\n\nadapter  {folder / ADAPTER} "
        f"({(folder / ADAPTER).stat().st_size / 1000:.0f} kB, "
        f"{metrics.training.seconds:.0f} s of training, "
        f"{metrics.training.unet_passes} UNet passes)\npicture  {folder / PICTURE}"
    )
    return Result({"folder": str(folder)} | metrics.as_json(), text)


def _print_reference(wanted: bool) -> None:
    if wanted:
        from sdd_lora.recipe.reference import reference

        print(reference(), end="")
        raise typer.Exit


_KeepState = Annotated[
    bool,
    typer.Option(
        "--keep-state",
        help="Keep the state of a finished run: --resume --set training.iterations=N then "
        "trains it on.",
    ),
]
_PredictionOfModel = Annotated[
    Literal["epsilon", "v", "v_prediction"] | None,
    typer.Option(
        help="What the UNet predicts, where the model's files don't say [--set prediction=…]."
    ),
]
_HelpRecipe = Annotated[
    bool,
    typer.Option(
        "--help-recipe",
        is_eager=True,
        callback=_print_reference,
        help="Print what each field of a recipe means, and exit.",
    ),
]


@verb("train", loads_model=True)
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
    keep_state: _KeepState = False,
    force: ForceRun = False,
    shard: ShardOption = None,
    prediction: _PredictionOfModel = None,
    help_recipe: _HelpRecipe = False,
) -> Result:
    """Train safety adapters by recipe, measure them, and write their cards.

    Ctrl-C (or a crash) leaves a run that --resume continues. Several recipes run one after another
    over one loaded base, and end in a summary; one that fails doesn't stop the others. With --force
    a finished run stays until the new one is whole. LECO's config or prompts, sliders' and
    ai-toolkit's (type slider) are read as recipes where they erase; differences are printed.

    Examples:

        sdd-lora train recipes/demo/weapons.yaml

        sdd-lora train recipes/demo -o runs --set training.iterations=50

        sdd-lora train recipes/demo/gore.yaml --resume

        sdd-lora train leco/prompts.yaml --set model=demo

    Many recipes spread over the jobs of an array (SLURM, Kubernetes, GNU parallel), each with its
    own GPU: every job trains its shard of them. With --resume a job that is started again passes
    by its finished runs and continues the unfinished one.

        sdd-lora train recipes/demo -o runs --resume --shard 1/4

    One recipe's trajectories spread over processes:
    `torchrun --nproc-per-node 2 -m sdd_lora train …`.
    """
    from sdd_lora.checkpoint.locate import EMBEDDED
    from sdd_lora.io.distributed import Shard
    from sdd_lora.runs.many import train_recipes

    speaker = is_main_process()
    part = None if shard is None else Shard.parse(shard)
    failed: dict[str, str] = {}

    def note(folder: Path, error: SddLoraError) -> None:
        failed[str(folder)] = str(error)
        warn(f"{folder}: failed: {error}\ngoing on with the other recipes")

    set_by_option = {} if prediction is None else {"prediction": prediction}
    overrides = parse_overrides(changes) | set_by_option
    finished = train_recipes(
        recipes, output, overrides, resume, keep_state, force, part, on_failure=note
    )
    if not speaker:
        raise typer.Exit
    if len(finished) == 1:
        folder, metrics = finished[0]
        text = f"{folder}\n{measures_table(metrics.measures)}"
        if metrics.adapter and metrics.base.model not in EMBEDDED:
            text += f"\nfor A1111, ComfyUI, …: sdd-lora convert {folder} -o THEIR/FOLDER/OF/LORAS"
    elif finished:
        text = runs_table(finished)
    else:
        text = "no recipe trained" if failed else f"no recipe falls to shard {shard}"
    if failed:
        text += f"\nfailed: {', '.join(failed)}; the messages above say why"
    data: dict[str, Any] = {"runs": [{"folder": str(f)} | m.as_json() for f, m in finished]}
    return Result(data | ({"failed": failed} if failed else {}), text, int(bool(failed)))


@verb("measure", loads_model=True)
def measure(
    adapters: WeightedAdapters,
    recipe: Annotated[
        Path, typer.Option("--recipe", help="Whose `measure` section says how, and on what.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for the adapter and its numbers.")
    ],
    changes: Changes = None,
    name: AdapterName = None,
    precision: Precision = None,
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
    from sdd_lora.adapter.metrics import Metrics
    from sdd_lora.adapter.weighted import weighted
    from sdd_lora.recipe import Recipe
    from sdd_lora.runs import measure as runs
    from sdd_lora.runs.folder import ADAPTER, PEFT_TWIN

    chosen = {} if precision is None else {"measure.precision": precision}
    settings = Recipe.load(recipe, parse_overrides(changes) | chosen)
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
    told = measures_table(Metrics(**metrics).measures)
    return Result({"folder": str(output)} | metrics, f"{output}\n{told}")
