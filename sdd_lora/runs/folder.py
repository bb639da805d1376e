"""A run's folder: whose it is, what is under way in it, how a new run takes an earlier one's place.

A training under way has its recipe and `state/`; `metrics.json` is the last file that a run writes.
What takes the place of a finished run, and every measurement, is made in a hidden folder inside
this one, and moved when it is whole; a move that a kill cut short is finished by the next call.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import locked, sync_folder, sync_tree, write_text
from sdd_lora.recipe import Recipe

ADAPTER, PEFT_TWIN, SIDECAR = "adapter.safetensors", "adapter.peft.safetensors", "adapter.json"
WEIGHTS = "weights.safetensors"
CARD, RECIPE, METRICS, PICTURE = "README.md", "recipe.yaml", "metrics.json", "before-after.png"
STATE, TRACKER_LOGS = "state", "tensorboard"
_FILES = (ADAPTER, PEFT_TWIN, SIDECAR, WEIGHTS, CARD, RECIPE, STATE, TRACKER_LOGS, METRICS)
_PICTURES = "before-after*.png"
#: inside a run's folder: what is being made, and what is whole and on its way to its place
_NEW, _MOVING = ".sdd-lora-new", ".sdd-lora-moving"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes.

    It is made where it is missing, and goes again where nothing came of it. Raises Busy where
    another process holds it, BadInput where it can't be made.
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
            _finish_moving(folder)
            yield
        finally:
            for path in missing:
                with suppress(OSError):  # not empty: something came of it
                    path.rmdir()


def settle(folder: Path) -> None:
    """Finish what a killed call was doing to a folder. Raises Busy where a process is at it."""
    if folder.is_dir():
        with held(folder):
            pass


def check(folder: Path, recipe: Recipe, resume: bool = False, force: bool = False) -> None:
    """Raises BadInput where a run may not be made here, or not be resumed; writes nothing."""
    if resume and force:
        raise BadInput("--resume continues a run, --force starts it over; expected one of them")
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
        advice = "add --resume to continue it, " if _is_resumable(folder) else ""
        raise BadInput(f"{folder}: holds another run; {advice}choose another folder or add --force")


def is_left(folder: Path, recipe: Recipe) -> bool:
    """Has the recipe still to be trained, from its start or on, in a folder that is held?

    Raises BadInput where the folder is another recipe's, or holds other files.
    """
    unfinished = under_way(folder) is not None
    if is_finished(folder) and not unfinished:
        require_same(folder / RECIPE, recipe)
        return False
    check(folder, recipe, resume=unfinished)
    return True


def require_same(written: Path, recipe: Recipe) -> None:
    """Raises BadInput where the recipe in a run's folder is another one."""
    if Recipe.load(written).sha256 != recipe.sha256:
        raise BadInput(
            f"{written}: belongs to another recipe (or other --set values) than the one given; "
            "resume with that one, or train into another folder"
        )


def is_finished(folder: Path) -> bool:
    """Does the folder hold a whole run: the metrics that this tool writes last?"""
    try:
        tool = json.loads((folder / METRICS).read_text("utf-8"))["tool"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return str(tool).startswith("sdd_lora ")


def under_way(folder: Path) -> Path | None:
    """Where in the folder the training lies that is not finished; None where there is none."""
    for place in (folder / _NEW, folder):
        started = (place / RECIPE).is_file() and (place / STATE).is_dir()
        if started and not (place / METRICS).exists():
            return place
    return None


def place_of_new(folder: Path) -> Path:
    """Where in the folder a new training is made: beside a finished run, or in its own place."""
    return folder / _NEW if is_finished(folder) else folder


def claim(folder: Path, place: Path, recipe: Recipe) -> None:
    """Make `place` the recipe's. What an unfinished run left in it goes."""
    _remove(folder / _NEW)
    for path in _run_files(place):
        _remove(path)
    (place / STATE).mkdir(parents=True)
    write_text(place / RECIPE, recipe.to_yaml())


@contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """An empty place in the folder; what is put there takes the place of an earlier run when the
    block ends well, and nothing is changed otherwise."""
    place = folder / _NEW
    _remove(place)
    place.mkdir()
    try:
        yield place
        move_in(folder, place)
    finally:
        _remove(place)


def move_in(folder: Path, place: Path) -> None:
    """Put a run that is whole into the place of an earlier one; other files stay."""
    if place == folder:
        return
    sync_tree(place)
    for path in _run_files(folder):  # the metrics last
        if path.is_dir() or path.name == METRICS or not (place / path.name).exists():
            _remove(path)
    os.replace(place, folder / _MOVING)
    _finish_moving(folder)


def _finish_moving(folder: Path) -> None:
    """Move what is whole to its place, its metrics last."""
    moving = folder / _MOVING
    if not moving.is_dir():
        return
    for path in sorted(moving.iterdir(), key=lambda path: path.name == METRICS):
        os.replace(path, folder / path.name)
    moving.rmdir()
    sync_folder(folder)


def _check_resumable(folder: Path, recipe: Recipe) -> None:
    place = under_way(folder)
    if place is None and not is_finished(folder):
        raise BadInput(f"{folder}: holds no run to resume; leave --resume away")
    require_same((place or folder) / RECIPE, recipe)
    if place is None:
        raise BadInput(f"{folder}: holds a finished run; nothing to resume")


def _is_resumable(folder: Path) -> bool:
    place = under_way(folder)
    try:
        return place is not None and bool(Recipe.load(place / RECIPE))
    except BadInput:
        return False


def _occupied(folder: Path) -> bool:
    """Does a folder hold anything? What a kill at a run's very beginning left there is nothing."""

    def nothing(path: Path) -> bool:
        return path.name == _NEW or (
            path.name == STATE and path.is_dir() and not any(path.iterdir())
        )

    return not all(map(nothing, folder.iterdir()))


def _run_files(folder: Path) -> list[Path]:
    """A run's files and folders that are there, its metrics last."""
    named = [folder / name for name in _FILES if (folder / name).exists()]
    return [*folder.glob(_PICTURES), *named]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
