"""One run: train, measure, card, picture; everything in one folder."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.card import render_card, render_weights_card, write_sidecar
from sdd_lora.adapter.factors import Factors
from sdd_lora.adapter.metadata import ENTRY_KEY, Metadata, TrainedOn
from sdd_lora.errors import BadInput, Busy, SddLoraError
from sdd_lora.io.atomic import atomic_output, sha256_of, write_text
from sdd_lora.io.distributed import processes
from sdd_lora.io.safetensors import serialize
from sdd_lora.io.strict_yaml import parse_override
from sdd_lora.progress import say, warn
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after
from sdd_lora.runs.folder import (
    ADAPTER,
    CARD,
    METRICS,
    PEFT_TWIN,
    PICTURE,
    RECIPE,
    STATE,
    WEIGHTS,
    check,
    claim,
    held,
    is_finished,
    is_left,
    move_in,
    place_of_new,
    replacement,
    require_same,
    settle,
    under_way,
)
from sdd_lora.sd.model import TrainingParts, load_training_parts
from sdd_lora.sd.prompts import embed, join_concepts
from sdd_lora.training.trainer import Embeddings, Report, Trainer, memory_advice
from sdd_lora.version import __version__

_LOOK_AGAIN_S = 5.0  # after what other processes hold
_VERSIONS_OF = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors",
                "bitsandbytes", "numpy")  # fmt: skip


def train(
    recipe: Recipe, out_dir: str | Path, *, resume: bool = False, keep_state: bool = False,
    force: bool = False, parts: TrainingParts | None = None,
) -> Adapter | Path:  # fmt: skip
    """Train a recipe's adapter into a run's folder, measure it, and return it.

    With `parameters: full` there is no adapter: what changed of the UNet is written, in fp32 by
    diffusers' names, and the file's path is returned. `resume` continues an unfinished run of the
    same recipe; `force` starts over where the folder holds a run, and a finished one stays as it is
    until the new one is. `parts` is a base already loaded, which comes back as it was. Raises
    BadInput where the folder holds another run or other files, Busy where another process trains;
    SddLoraError where the training fails, KeyboardInterrupt with advice on Ctrl-C.
    """
    folder = Path(out_dir)
    with held(folder) if processes().is_main_process else nullcontext():
        return _train_held(recipe, folder, resume, keep_state, force, parts)


def measure(
    adapter: Adapter, recipe: Recipe, out_dir: str | Path, *, force: bool = False
) -> dict[str, Any]:
    """Measure an adapter by a recipe's `measure`, whoever made it; returns the metrics.

    The folder is written as `train` does, without what only a training knows: the adapter and its
    twin, now with the numbers in their headers, sidecar, card, `metrics.json`, picture. Raises
    BadInput where the recipe measures nothing, or the folder holds another run or other files.
    """
    folder = Path(out_dir)
    with held(folder):
        check(folder, recipe, force=force)
        if not before_after.wanted(recipe):
            raise BadInput(f"{recipe.name}: expected a recipe that names prompts to measure with")
        before_after.check(recipe, load_training_parts(recipe.model).unet)
        made_by = {"measured_by": recipe.name, "measured_on": recipe.model}
        with replacement(folder) as place:
            _finish(adapter, place, recipe, made_by, training={})
        return dict(json.loads((folder / METRICS).read_text("utf-8")))


def _train_held(
    recipe: Recipe, folder: Path, resume: bool, keep_state: bool, force: bool,
    parts: TrainingParts | None,
) -> Adapter | Path:  # fmt: skip
    """`train`, in a folder that the main process holds."""
    state = processes()
    if state.is_main_process:
        check(folder, recipe, resume, force)
        _tell_what_is_not_measured(recipe)
    state.wait_for_everyone()
    place = (under_way(folder) if resume else None) or place_of_new(folder)
    made, metadata, report = _trained(recipe, folder, place, resume, parts)
    if state.is_main_process:
        made_by, numbers = {"recipe_sha256": recipe.sha256}, _training_numbers(report)
        if isinstance(made, Adapter):
            made = _finish(made, place, recipe, made_by, numbers)
        else:
            _finish_weights(made, metadata, place, recipe, made_by, numbers)
        if not keep_state:
            shutil.rmtree(place / STATE)
        move_in(folder, place)
    state.wait_for_everyone()
    return made if isinstance(made, Adapter) else folder / WEIGHTS


def encode(recipe: Recipe, parts: TrainingParts) -> Embeddings:
    """All prompts of a recipe, encoded once."""
    assert parts.text_encoder is not None
    text_encoder = parts.text_encoder

    def encoded(texts: Sequence[str]) -> torch.Tensor:
        return embed(texts, parts.tokenizer, text_encoder)

    return Embeddings(
        empty=encoded([""]),
        concepts=encoded(recipe.concepts),
        joined=encoded(join_concepts(recipe.concepts, parts.tokenizer)),
        kept=encoded(recipe.preserve.prompts) if recipe.preserve.prompts else None,
    )


def _trained(
    recipe: Recipe, folder: Path, place: Path, resume: bool, parts: TrainingParts | None
) -> tuple[Adapter | dict[str, torch.Tensor], Metadata, Report]:
    """What came of the training (an adapter, or whole weights by name), what it says of itself, and
    what it took. The folder's earlier files are touched only when everything else is ready."""
    shared = parts is not None
    parts = parts or load_training_parts(recipe.model)
    before_after.check(recipe, parts.unet)
    embeddings = encode(recipe, parts)
    if not shared:
        parts.text_encoder = None  # its memory is free for training
    path = place / STATE / "state.pt"
    with memory_advice(recipe):
        trainer = Trainer(recipe, parts.unet, parts.scheduler, embeddings, path)
        try:
            trainer.accelerator.wait_for_everyone()  # all have looked at the folder
            if trainer.accelerator.is_main_process and not resume:
                claim(folder, place, recipe)
            trainer.accelerator.wait_for_everyone()
            if resume:
                trainer.resume()
            report = trainer.run()
            metadata = _metadata(recipe, parts.fingerprint)
            if recipe.parameters == "full":
                return trainer.teacher_tensors(), metadata, report
            return _as_adapter(recipe, trainer, metadata), metadata, report
        finally:
            trainer.roles.remove()


def _tell_what_is_not_measured(recipe: Recipe) -> None:
    prompts = recipe.measure.prompts
    if (prompts.concept or prompts.kept) and recipe.measure.detector == "none":
        warn("measure.prompts: nothing is drawn or counted, since measure.detector is none")


def _as_adapter(recipe: Recipe, trainer: Trainer, metadata: Metadata) -> Adapter:
    factors = {
        name: Factors(
            down.flatten(1).numpy(), up.flatten(1).numpy(), recipe.lora.alpha, _kernel(down)
        )
        for name, (down, up) in trainer.teacher_factors().items()
    }
    return Adapter(factors, metadata)


def _kernel(down: torch.Tensor) -> tuple[int, int] | None:
    """The (height, width) of a convolution's factor (r, in, height, width); None of a matrix."""
    return (down.shape[2], down.shape[3]) if down.ndim == 4 else None


def _metadata(recipe: Recipe, base_fingerprint: str) -> Metadata:
    """What a result says of itself."""
    return Metadata(
        name=recipe.name,
        concepts=recipe.concepts,
        recipe=recipe.content(),
        recipe_sha256=recipe.sha256,
        base=TrainedOn(model=recipe.model, fingerprint=base_fingerprint),
        tool=f"sdd_lora {__version__}",
        versions=versions(),
    )


def _finish(
    adapter: Adapter, folder: Path, recipe: Recipe, made_by: dict[str, Any],
    training: dict[str, Any],
) -> Adapter:  # fmt: skip
    """Write the adapter, measure it as written, write it again with its numbers, and its card; the
    metrics last."""
    _write(adapter, folder)
    measured = _measured(recipe, folder, adapter=ADAPTER)
    if measured["measures"]:
        metadata = adapter.metadata | {"measures": measured["measures"]}
        adapter = Adapter(adapter.factors, metadata)
        _write(adapter, folder)
    result = {"adapter": _file_numbers(folder / ADAPTER, adapter.parameters)}
    metrics = _metrics(made_by, adapter.metadata.base, result, training, measured)
    write_text(folder / CARD, render_card(adapter, metrics))
    _write_metrics(folder, metrics)
    return adapter


def _finish_weights(
    tensors: dict[str, torch.Tensor], metadata: Metadata, folder: Path, recipe: Recipe,
    made_by: dict[str, Any], training: dict[str, Any],
) -> None:  # fmt: skip
    """Write fully trained weights, measure them as written, write their card; the metrics last."""
    header = {"format": "pt", ENTRY_KEY: json.dumps(metadata.as_json(), ensure_ascii=False)}
    with atomic_output(folder / WEIGHTS) as file:
        for chunk in serialize({name: t.numpy() for name, t in tensors.items()}, header):
            file.write(chunk)
    measured = _measured(recipe, folder, weights=WEIGHTS)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    result = {"weights": _file_numbers(folder / WEIGHTS, parameters)}
    metrics = _metrics(made_by, metadata.base, result, training, measured)
    write_text(folder / CARD, render_weights_card(metadata, metrics))
    _write_metrics(folder, metrics)


def _measured(
    recipe: Recipe, folder: Path, adapter: str | None = None, weights: str | None = None
) -> dict[str, Any]:
    """Rows on the recipe's model and on those of `transfer`; their pictures go into the folder."""
    if not before_after.wanted(recipe):
        return {"measures": [], "transfer": []}
    say("measuring before and after")
    written = None if adapter is None else Adapter.load(folder / adapter)
    file = None if weights is None else folder / weights
    pictures = {recipe.model: PICTURE} | {
        model: f"before-after-{_file_name(model)}.png" for model in recipe.measure.transfer
    }
    rows = {}
    for model, picture in pictures.items():
        measured = before_after.measure(recipe, written, model, file)
        _save_picture(measured.picture, folder / picture)
        rows[model] = [asdict(row) for row in measured.rows]
    return {
        "measures": rows.pop(recipe.model),
        "transfer": [{"model": model, "measures": found} for model, found in rows.items()],
    }


def _file_numbers(path: Path, parameters: int) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "parameters": parameters, "bytes": path.stat().st_size}


def _metrics(
    made_by: dict[str, Any], base: TrainedOn | None, result: dict[str, Any],
    training: dict[str, Any], measured: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {
        "tool": f"sdd_lora {__version__}",
        "versions": versions(),
        **made_by,
        "base": base.as_json() if base else {},
        **result,
        "training": training,
        **measured,
    }


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    write_text(folder / METRICS, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


def _training_numbers(report: Report) -> dict[str, Any]:
    return asdict(report) | {"seconds": round(report.seconds, 2)}


def _save_picture(picture: Image.Image, path: Path) -> None:
    with atomic_output(path) as file:
        picture.save(file, "PNG")


def _file_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model)


def _write(adapter: Adapter, folder: Path) -> None:
    adapter.save(folder / ADAPTER, format="kohya", dtype="fp16")
    adapter.save(folder / PEFT_TWIN, format="peft", dtype="fp16")
    write_sidecar(adapter, folder / ADAPTER)


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def train_recipes(
    paths: Sequence[Path], output: Path | None, changes: Sequence[str],
    resume: bool = False, keep_state: bool = False, force: bool = False,
) -> list[tuple[Path, dict[str, Any]]]:  # fmt: skip
    """Train recipes one after another over one loaded base; returns each run's folder and metrics.

    All recipes are read, and their errors reported, before the first one starts. Of several,
    `resume` leaves finished ones alone, continues the one under way and starts the others.
    """
    asked = _recipes_and_folders(paths, output, changes)
    several = len(asked) > 1
    state = processes()
    if state.is_main_process:
        for _, folder in asked:
            settle(folder)
    state.wait_for_everyone()
    todo = []
    for recipe, folder in asked:
        continues = resume and (not several or under_way(folder) is not None)
        if resume and several and not continues and is_finished(folder):
            require_same(folder / RECIPE, recipe)
            say(f"{folder}: finished already")
            continue
        check(folder, recipe, continues, force)
        todo.append((recipe, folder, continues))
    state.wait_for_everyone()  # all have looked at the folders
    loaded: dict[tuple, TrainingParts] = {}
    for recipe, folder, continues in todo:
        train(
            recipe, folder, resume=continues, keep_state=keep_state, force=force,
            parts=_base_of(recipe, loaded) if several else None,
        )  # fmt: skip
    return [_finished_run(folder) for _, folder in asked]


@dataclass
class Shared:
    """What came of recipes that several processes trained.

    `finished` holds each run's folder and metrics, `here` the folders of those that this process
    made; `failed` says why what nobody finished failed here.
    """

    finished: list[tuple[Path, dict[str, Any]]]
    here: set[Path]
    failed: dict[Path, str]


def share_recipes(
    paths: Sequence[Path], output: Path | None, changes: Sequence[str], keep_state: bool = False
) -> Shared:
    """Train recipes beside other processes that do the same, over a base that each loads once.

    Each walks through all recipes and passes by what is finished and what another process holds;
    what a killed one left, whoever comes next continues. A recipe that fails stops no other one.
    Returns when nothing is left to train or to wait for. Raises BadInput, before anything starts,
    where a folder is another recipe's or holds other files.
    """
    if os.name == "nt":
        raise BadInput("--share tells processes apart by locks, which this tool has not on Windows")
    if processes().num_processes > 1:
        raise BadInput("--share is for processes started one by one; torchrun's share each recipe")
    asked = _recipes_and_folders(paths, output, changes)
    for recipe, folder in asked:
        if folder.exists():
            with suppress(Busy), held(folder):
                is_left(folder, recipe)
    here: set[Path] = set()
    failed: dict[Path, str] = {}
    loaded: dict[tuple, TrainingParts] = {}
    left, told = asked, 0
    while left:
        busy = []
        for recipe, folder in left:
            try:
                if _trained_here(recipe, folder, keep_state, loaded):
                    here.add(folder)
            except Busy:
                busy.append((recipe, folder))
            except SddLoraError as error:
                warn(f"{folder}: {error}")
                failed[folder] = str(error)
                loaded.clear()  # whatever state it is in
        if busy:
            if len(busy) != told:
                say(f"waiting for other processes: {len(busy)} of {len(asked)} runs")
            told = len(busy)
            time.sleep(_LOOK_AGAIN_S)
        left = busy
    folders = [folder for _, folder in asked]
    return Shared(
        [_finished_run(folder) for folder in folders if is_finished(folder)], here,
        {folder: why for folder, why in failed.items() if not is_finished(folder)},
    )  # fmt: skip


def _trained_here(
    recipe: Recipe, folder: Path, keep_state: bool, loaded: dict[tuple, TrainingParts]
) -> bool:
    """Train a recipe unless it is finished; was it trained? Raises Busy where another process is at
    it: first the lock, then the look, so that nothing changes in between."""
    with held(folder):
        if not is_left(folder, recipe):
            return False
        say(f"{folder}: training")
        resume, parts = under_way(folder) is not None, _base_of(recipe, loaded)
        _train_held(recipe, folder, resume, keep_state, force=False, parts=parts)
        return True


def _recipes_and_folders(
    paths: Sequence[Path], output: Path | None, changes: Sequence[str]
) -> list[tuple[Recipe, Path]]:
    """Each recipe, and the folder of its run."""
    overrides = dict(map(parse_override, changes))
    recipes = [Recipe.load(path, overrides) for path in recipe_files(paths)]
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise BadInput(f"recipes of the same name, which would share a folder: {', '.join(twice)}")
    root, several = output or Path("runs"), len(recipes) > 1
    return [(r, root / r.name if several or output is None else root) for r in recipes]


def _base_of(recipe: Recipe, loaded: dict[tuple, TrainingParts]) -> TrainingParts:
    """The recipe's base, which stays in `loaded`, alone, for the next recipe of its kind."""
    training = recipe.training
    kind = (  # what training leaves changed in the UNet besides its adapters
        recipe.model, training.precision, training.base_precision,
        training.gradient_checkpointing,
    )  # fmt: skip
    if kind not in loaded:
        loaded.clear()
        loaded[kind] = load_training_parts(recipe.model)
    return loaded[kind]


def _finished_run(folder: Path) -> tuple[Path, dict[str, Any]]:
    return folder, json.loads((folder / METRICS).read_text("utf-8"))


def packaged_recipe(name: str) -> Path:
    """The recipe that travels with the package, such as "demo/weapons".

    In a wheel the recipes lie inside the package; in a checkout, beside it.
    """
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return (inside if inside.is_dir() else package.parent / "recipes") / f"{name}.yaml"


def recipe_files(paths: Sequence[Path]) -> list[Path]:
    """Recipe files, and those in folders by name. Raises BadInput for a folder without any."""
    found = []
    for path in paths:
        inside = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
        if not inside:
            raise BadInput(f"{path}: a folder without recipes (*.yaml)")
        found += inside
    return found
