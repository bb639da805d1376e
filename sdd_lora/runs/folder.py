"""A run's folder: its owner, the training under way in it, how a new run replaces an earlier one.

A training under way has its recipe and `state/`; `metrics.json` is the last file that a run writes.
A run that replaces a finished one, and every measurement, is made in a hidden folder inside this
one, and moved when it is whole; a move that a kill cut short is finished by the next call.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdd_lora.adapter import hub
from sdd_lora.adapter.metrics import METRICS_FILE
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import locked, sync_folder, sync_tree, write_text
from sdd_lora.recipe import Recipe

ADAPTER, PEFT_TWIN = hub.ADAPTER_FILE, hub.PEFT_TWIN_FILE
CARD, RECIPE = hub.CARD_FILE, hub.RECIPE_FILE
STATE, TRACKER_LOGS, SNAPSHOTS, SAMPLES = hub.RUN_FOLDERS
WEIGHTS, PICTURE, STATE_FILE = "weights.safetensors", "before-after.png", "state.pt"
_FILES = (WEIGHTS, *hub.PUBLISHED[:-1], *hub.RUN_FOLDERS, METRICS_FILE)
#: inside a run's folder: a run being made, and a finished one on its way to its place
_NEW, _MOVING = ".sdd-lora-new", ".sdd-lora-moving"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a run's folder against other processes.

    A missing folder is made, and removed again where it stays empty. Raises Busy where another
    process has locked it, BadInput where it can't be made.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise BadInput(f"{folder}: is a file; expected a folder, or a name for one") from error
    except OSError as error:
        raise BadInput(f"{folder}: can't make this folder: {error.strerror}") from error
    with locked(folder):
        try:
            _complete_move(folder)
            yield
        finally:
            for path in missing:
                with suppress(OSError):  # not empty
                    path.rmdir()


def finish_move(folder: Path) -> None:
    """Finish a move that a killed call began. Raises Busy where another process has the folder."""
    if folder.is_dir():
        with lock(folder):
            pass


def check_folder(folder: Path, recipe: Recipe, resume: bool = False, force: bool = False) -> None:
    """Raises BadInput where a run may not be made here, or not be resumed; writes nothing."""
    if resume and force:
        raise BadInput(
            "`resume=True` continues a run, `force=True` starts it over; expected one of them"
        )
    if resume:
        _check_resumable(folder, recipe)
        return
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInput(f"{folder}: is a file; expected a folder, or a name for one")
    if not _occupied(folder):
        return
    if not is_finished(folder) and not _is_resumable(folder):
        raise BadInput(f"{folder}: holds other files; choose another folder")
    if not force:
        can_go_on = _is_resumable(folder) or has_more_to_train(folder, recipe)
        advice = "add `resume=True` to continue it, " if can_go_on else ""
        raise BadInput(
            f"{folder}: holds another run; {advice}choose another folder or add `force=True`"
        )


def require_same(written: Path, recipe: Recipe, *, to_resume: bool = False) -> None:
    """Raises BadInput where the recipe in a run's folder is another one; with `to_resume`, where
    they differ in more than `measure` and the number of iterations."""
    there = Recipe.load(written)
    if to_resume:
        there = there.with_iterations(recipe.training.iterations)
        there = there.model_copy(update={"measure": recipe.measure})
    if there.sha256 != recipe.sha256:
        raise BadInput(
            f"{written}: belongs to another recipe (or other values in it) than the one given; "
            "resume with that one, or train into another folder"
        )


def has_more_to_train(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a finished, shorter run of the recipe, with its state."""
    if not is_finished(folder) or not (folder / STATE / STATE_FILE).is_file():
        return False
    try:
        require_same(folder / RECIPE, recipe, to_resume=True)
    except BadInput:
        return False
    return Recipe.load(folder / RECIPE).training.iterations < recipe.training.iterations


def snapshot_file(folder: Path, iteration: int) -> Path:
    """Where a run keeps its result after some iterations."""
    return folder / SNAPSHOTS / f"{iteration:06d}.safetensors"


def sample_file(folder: Path, iteration: int) -> Path:
    """Where a run draws what it has reached after some iterations."""
    return folder / SAMPLES / f"{iteration:06d}.png"


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a whole run: the metrics that this tool writes last."""
    try:
        tool = json.loads((folder / METRICS_FILE).read_text("utf-8"))["tool"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return str(tool).startswith("sdd_lora ")


def under_way(folder: Path) -> Path | None:
    """The place in the folder of an unfinished training; None where there is none."""
    for place in (folder / _NEW, folder):
        started = (place / RECIPE).is_file() and (place / STATE).is_dir()
        if started and not (place / METRICS_FILE).exists():
            return place
    return None


def place_of_new(folder: Path) -> Path:
    """The place in the folder for a new training: beside a finished run, or the folder itself."""
    return folder / _NEW if is_finished(folder) else folder


def take(folder: Path, place: Path, recipe: Recipe) -> None:
    """Start a recipe's run in `place`; the files of an unfinished run in it go."""
    _remove(folder / _NEW)
    for path in _run_files(place):
        _remove(path)
    (place / STATE).mkdir(parents=True)
    write_text(place / RECIPE, recipe.to_yaml())


def take_finished(folder: Path, place: Path, recipe: Recipe) -> None:
    """Start in `place` where the folder's finished run ended, for more iterations of it."""
    take(folder, place, recipe)
    for name in hub.RUN_FOLDERS:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, place / name, dirs_exist_ok=True)


@contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """An empty place in the folder for a new run, which replaces an earlier one when the block ends
    well; nothing is changed otherwise."""
    place = folder / _NEW
    _remove(place)
    place.mkdir()
    try:
        yield place
        move_in(folder, place)
    finally:
        _remove(place)


def move_in(folder: Path, place: Path) -> None:
    """Put a finished run into the place of an earlier one; other files stay."""
    if place == folder:
        return
    sync_tree(place)
    for path in _run_files(folder):  # the metrics last
        if path.is_dir() or path.name == METRICS_FILE or not (place / path.name).exists():
            _remove(path)
    os.replace(place, folder / _MOVING)
    _complete_move(folder)


def _complete_move(folder: Path) -> None:
    """Move the files of a finished run to their place, its metrics last."""
    moving = folder / _MOVING
    if not moving.is_dir():
        return
    for path in sorted(moving.iterdir(), key=lambda path: path.name == METRICS_FILE):
        os.replace(path, folder / path.name)
    moving.rmdir()
    sync_folder(folder)


def _check_resumable(folder: Path, recipe: Recipe) -> None:
    place = under_way(folder)
    if place is None and not is_finished(folder):
        raise BadInput(f"{folder}: holds no run to resume; leave `resume=True` away")
    if place is not None:
        require_same(place / RECIPE, recipe, to_resume=True)
        return
    if has_more_to_train(folder, recipe):
        return
    done, asked = Recipe.load(folder / RECIPE).training.iterations, recipe.training.iterations
    require_same(folder / RECIPE, recipe, to_resume=done < asked)
    if done < asked:
        raise BadInput(
            f"{folder}: holds a finished run of {done} iterations, whose training state was not "
            "kept (`keep_state=True` keeps it); set lora.init to this folder and train "
            f"{asked - done} iterations into another one, or start over with `force=True`"
        )
    raise BadInput(f"{folder}: holds a finished run; nothing to resume")


def _is_resumable(folder: Path) -> bool:
    place = under_way(folder)
    try:
        return place is not None and bool(Recipe.load(place / RECIPE))
    except BadInput:
        return False


def _occupied(folder: Path) -> bool:
    """Whether the folder holds anything besides leftovers of a run killed before it wrote
    anything."""

    def leftover(path: Path) -> bool:
        return path.name == _NEW or (
            path.name == STATE and path.is_dir() and not any(path.iterdir())
        )

    return not all(map(leftover, folder.iterdir()))


def _run_files(folder: Path) -> list[Path]:
    """A run's files and folders that are there, its metrics last."""
    named = [folder / name for name in _FILES if (folder / name).exists()]
    return [*folder.glob(hub.PICTURE_FILES), *named]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
