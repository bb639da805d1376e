"""Several recipes, one after another over one loaded base; a shard of them for a job array."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from sdd_lora.adapter.metrics import Metrics
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.distributed import Shard, processes
from sdd_lora.io.strict_yaml import Overrides
from sdd_lora.progress import say
from sdd_lora.recipe import Recipe
from sdd_lora.runs.folder import (
    RECIPE,
    check_folder,
    finish_move,
    has_more_to_train,
    is_finished,
    require_same,
    under_way,
)
from sdd_lora.runs.train import train
from sdd_lora.sd.model import TrainingParts, load_training_parts


def train_recipes(
    paths: Sequence[Path],
    output: Path | None,
    overrides: Overrides | None = None,
    resume: bool = False,
    keep_state: bool = False,
    force: bool = False,
    shard: Shard | None = None,
    on_failure: Callable[[Path, SddLoraError], None] | None = None,
) -> list[tuple[Path, Metrics]]:
    """Train recipes one after another over one loaded base; returns each run's folder and metrics.

    All recipes are read, and their errors reported, before the first one starts. Of several,
    `resume` leaves finished ones alone, continues the one under way and starts the others; `shard`
    trains its part of them alone. `on_failure` is told the folder of a recipe that failed, one of
    several in one process, and the others go on; else the failure is raised.
    """
    everything = _recipes_and_folders(paths, output, overrides)
    several = len(everything) > 1
    asked = everything if shard is None else shard.take(everything)
    state = processes()
    if state.is_main_process:
        for _, folder in asked:
            finish_move(folder)
    state.wait_for_everyone()
    todo = []
    for recipe, folder in asked:
        can_go_on = under_way(folder) is not None or has_more_to_train(folder, recipe)
        continues = resume and (not several or can_go_on)
        if resume and several and not continues and is_finished(folder):
            require_same(folder / RECIPE, recipe)
            say(f"{folder}: finished already")
            continue
        check_folder(folder, recipe, continues, force)
        todo.append((recipe, folder, continues))
    state.wait_for_everyone()  # all have looked at the folders
    loaded: dict[Hashable, TrainingParts] = {}
    failed = set()
    for recipe, folder, continues in todo:
        try:
            train(
                recipe,
                folder,
                resume=continues,
                keep_state=keep_state,
                force=force,
                parts=_base_of(recipe, loaded) if several else None,
            )
        except SddLoraError as error:
            if on_failure is None or not several or state.num_processes > 1:
                raise
            on_failure(folder, error)
            failed.add(folder)
    return [(folder, Metrics.read(folder)) for _, folder in asked if folder not in failed]


def recipe_files(paths: Sequence[Path]) -> list[Path]:
    """Recipe files, and those in folders by name. Raises BadInput for a folder without any."""
    found = []
    for path in paths:
        inside = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
        if not inside:
            raise BadInput(f"{path}: a folder without recipes (*.yaml)")
        found += inside
    return found


def packaged_recipe(name: str) -> Path:
    """The recipe that travels with the package, such as "demo/weapons".

    In a wheel the recipes lie inside the package; in a checkout, beside it.
    """
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return (inside if inside.is_dir() else package.parent / "recipes") / f"{name}.yaml"


def _recipes_and_folders(
    paths: Sequence[Path], output: Path | None, overrides: Overrides | None
) -> list[tuple[Recipe, Path]]:
    """Each recipe, and the folder of its run."""
    recipes = [Recipe.load(path, overrides) for path in recipe_files(paths)]
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise BadInput(f"recipes of the same name, which would share a folder: {', '.join(twice)}")
    root, several = output or Path("runs"), len(recipes) > 1
    return [(r, root / r.name if several or output is None else root) for r in recipes]


def _base_of(recipe: Recipe, loaded: dict[Hashable, TrainingParts]) -> TrainingParts:
    """The recipe's base, which stays in `loaded`, alone, for the next recipe of its kind."""
    training = recipe.training
    changes_that_stay = (  # of the UNet, when a training has removed its adapters
        recipe.model,
        recipe.prediction,
        training.precision,
        training.base_precision,
        training.gradient_checkpointing,
    )
    if changes_that_stay not in loaded:
        loaded.clear()
        loaded[changes_that_stay] = load_training_parts(recipe.model, recipe.prediction)
    return loaded[changes_that_stay]
