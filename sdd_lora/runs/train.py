"""One run: train, measure, card, picture; everything in one folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from sdd_lora.adapter.adapter import Adapter, adapter_file
from sdd_lora.adapter.factors import EmbeddingFactors, Factors
from sdd_lora.adapter.metadata import Metadata, TrainedOn
from sdd_lora.adapter.metrics import Metrics
from sdd_lora.errors import SddLoraError
from sdd_lora.io.atomic import write_text
from sdd_lora.io.distributed import processes
from sdd_lora.progress import warn
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after
from sdd_lora.runs.folder import (
    RECIPE,
    STATE,
    STATE_FILE,
    WEIGHTS,
    check_folder,
    lock,
    move_in,
    place_of_new,
    snapshot_file,
    take,
    take_finished,
    under_way,
)
from sdd_lora.runs.measure import (
    advice_on_interrupt,
    finish_adapter,
    finish_weights,
    versions,
    write_weights,
)
from sdd_lora.runs.samples import Samples
from sdd_lora.runs.under_attack import check_attacks
from sdd_lora.sd.model import TrainingParts, load_training_parts
from sdd_lora.sd1 import EMBEDDINGS
from sdd_lora.training.embeddings import encode_prompts
from sdd_lora.training.memory import memory_advice
from sdd_lora.training.roles import FactorRoles
from sdd_lora.training.trainer import Callback, Trainer
from sdd_lora.version import __version__

#: a closed form with 3 kept prompts ruined the embedded model, one with 290 hardly changed it
FEW_KEPT_PROMPTS = 50


def train(
    recipe: Recipe | str | Path,
    out_dir: str | Path | None = None,
    *,
    resume: bool = False,
    keep_state: bool = False,
    force: bool = False,
    parts: TrainingParts | None = None,
    callback: Callback | None = None,
) -> Adapter | Path:
    """Train a recipe's adapter into a run's folder, measure it, and return it.

    `recipe` may be a file; `out_dir` is runs/NAME where it isn't given. With `parameters: full`
    there is no adapter: the changed weights of the UNet are written, in fp32 by diffusers' names,
    and the file's path is returned. `resume` continues an unfinished run of the same recipe, or
    one that is finished and kept its state (`keep_state`) for more iterations. `force` starts over
    where the folder holds a run; a finished one stays as it is until the new one is. `parts` is a
    base already loaded, which comes back as it was.

    `callback(iteration, losses)` is called after each iteration, in every process: the number of
    iterations done, and {"loss": the iteration's}. A KeyboardInterrupt that it raises stops the
    training as Ctrl-C does.

    Raises BadInput where the folder holds another run or other files, Busy where another process
    trains; SddLoraError where the training fails, KeyboardInterrupt with advice on Ctrl-C.
    """
    recipe = Recipe.of(recipe)
    folder = Path("runs") / recipe.name if out_dir is None else Path(out_dir)
    state = processes()
    with lock(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            check_folder(folder, recipe, resume, force)
            _warn_of_prompts(recipe)
        before_after.check_measuring(recipe)
        check_attacks(recipe)
        if recipe.lora.starts_from is not None:
            adapter_file(recipe.lora.starts_from)  # now, not after the model is loaded
        state.wait_for_everyone()
        place = (under_way(folder) if resume else None) or place_of_new(folder)
        result, metadata, made_by = _run_training(recipe, folder, place, resume, parts, callback)
        if state.is_main_process:
            with _measuring_advice(place), advice_on_interrupt("`resume=True`"):
                if isinstance(result, Adapter):
                    result = finish_adapter(result, place, recipe, made_by)
                else:
                    finish_weights(result, metadata, place, recipe, made_by)
            if not keep_state:
                shutil.rmtree(place / STATE)
            move_in(folder, place)
        state.wait_for_everyone()
        return result if isinstance(result, Adapter) else folder / WEIGHTS


@contextmanager
def _measuring_advice(place: Path) -> Iterator[None]:
    """Where measuring fails after a training, say how to measure without training again."""
    try:
        yield
    except SddLoraError as error:
        raise type(error)(
            f"{error}\nThe training is finished, its result is in {place}: `resume=True` measures "
            "it without training again, by another `measure` section too"
        ) from error


def _warn_of_prompts(recipe: Recipe) -> None:
    prompts, kept = recipe.measure.prompts, len(recipe.preserve.prompts)
    if (prompts.concept or prompts.kept) and recipe.measure.detector == "none":
        warn("measure.prompts: nothing is drawn or counted, since measure.detector is none")
    kept += recipe.preserve.vocabulary or 0
    if recipe.lora.init == "closed-form" and kept < FEW_KEPT_PROMPTS:
        warn(
            f"preserve.prompts: lora.init: closed-form changes all prompts but the kept ones, and "
            f"keeps {kept}; name {FEW_KEPT_PROMPTS} or more of what the model is to draw as "
            "before, near the concepts and far from them"
        )


def _run_training(
    recipe: Recipe,
    folder: Path,
    place: Path,
    resume: bool,
    parts: TrainingParts | None,
    callback: Callback | None,
) -> tuple[Adapter | dict[str, torch.Tensor], Metadata, Metrics]:
    """The training's result (an adapter, or whole weights by name), its metadata, and what it took.
    The folder's earlier files are touched only when everything else is ready."""
    shared = parts is not None
    parts = parts or load_training_parts(recipe.model, recipe.prediction)
    embeddings = encode_prompts(recipe, parts)
    sample = Samples(recipe, parts, place) if recipe.measure.every else None
    if not shared:
        parts.text_encoder = None  # its memory is free for training
    path, goes_on = place / STATE / STATE_FILE, resume and under_way(folder) is not None
    with memory_advice(recipe):
        trainer = Trainer(recipe, parts.unet, parts.scheduler, embeddings, path)
        try:
            trainer.accelerator.wait_for_everyone()  # all have looked at the folder
            if trainer.accelerator.is_main_process and not goes_on:
                (take_finished if resume else take)(folder, place, recipe)
            trainer.accelerator.wait_for_everyone()
            if resume:
                trainer.resume()
                if trainer.accelerator.is_main_process:  # it may measure in another way now
                    write_text(place / RECIPE, recipe.to_yaml())
            metadata = _metadata(recipe, parts.fingerprint)
            if trainer.started_from is not None:
                metadata |= {"started_from": trainer.started_from}

            def keep(trainer: Trainer) -> None:
                result = _result(trainer, metadata)
                if not trainer.accelerator.is_main_process:
                    return
                path = snapshot_file(place, trainer.iteration)
                path.parent.mkdir(exist_ok=True)
                if isinstance(result, Adapter):
                    result.save(path, dtype="fp16")
                else:
                    write_weights(result, metadata, path)

            report = trainer.run(keep, callback, sample)
            made_by = Metrics(
                recipe_sha256=recipe.sha256, base=metadata.base or TrainedOn(), training=report
            )
            if trainer.snapshots:
                made_by |= {"snapshots": trainer.snapshots}
            return _result(trainer, metadata), metadata, made_by
        finally:
            trainer.roles.remove()


def _result(trainer: Trainer, metadata: Metadata) -> Adapter | dict[str, torch.Tensor]:
    """What has been trained so far: an adapter, or whole weights by name."""
    tensors = trainer.teacher_tensors()
    if isinstance(trainer.roles, FactorRoles):
        return _adapter(tensors, trainer.recipe.lora.alpha, metadata)
    return tensors


def _adapter(tensors: dict[str, torch.Tensor], alpha: float, metadata: Metadata) -> Adapter:
    """An adapter of factors named "module.lora_A" (r, in) and "module.lora_B" (out, r); of a
    convolution (r, in, h, w) and (out, r, 1, 1)."""
    factors = {}
    for name, down in tensors.items():
        module, _, side = name.rpartition(".")
        if side == "lora_A":
            up = tensors[f"{module}.lora_B"]
            kernel = (down.shape[2], down.shape[3]) if down.ndim == 4 else None
            kind = EmbeddingFactors if module == EMBEDDINGS else Factors
            factors[module] = kind(down.flatten(1).numpy(), up.flatten(1).numpy(), alpha, kernel)
    return Adapter(factors, metadata)


def _metadata(recipe: Recipe, base_fingerprint: str) -> Metadata:
    """The metadata of a result: its recipe, its base, the tool."""
    return Metadata(
        name=recipe.name,
        concepts=recipe.concepts,
        recipe=recipe.content(),
        recipe_sha256=recipe.sha256,
        base=TrainedOn(model=recipe.model, fingerprint=base_fingerprint),
        tool=f"sdd_lora {__version__}",
        versions=versions(),
    )
