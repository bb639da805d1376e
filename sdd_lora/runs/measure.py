"""A result's files: weights or adapter, the numbers measured with them, card, metrics."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.card import (
    black_note,
    picture_of,
    render_card,
    render_weights_card,
    write_sidecar,
)
from sdd_lora.adapter.metadata import ENTRY_KEY, Metadata, TrainedOn
from sdd_lora.adapter.metrics import (
    METRICS_FILE,
    FileNumbers,
    Metrics,
    TrainingReport,
    TransferRows,
)
from sdd_lora.adapter.thumbnail import with_thumbnail
from sdd_lora.adapter.weighted import AdapterLike, as_adapter
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import atomic_output, sha256_of, write_text
from sdd_lora.io.safetensors import serialize
from sdd_lora.progress import say, warn
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after
from sdd_lora.runs.folder import (
    ADAPTER,
    CARD,
    PEFT_TWIN,
    PICTURE,
    WEIGHTS,
    check_folder,
    lock,
    replacement,
)
from sdd_lora.runs.seen import folder_of_seen, forget_seen
from sdd_lora.runs.under_attack import check_attacks, withstood
from sdd_lora.version import __version__

_VERSIONS_OF = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "bitsandbytes",
    "numpy",
)


def measure(
    adapter: AdapterLike, recipe: Recipe | str | Path, out_dir: str | Path, *, force: bool = False
) -> dict[str, Any]:
    """Measure an adapter by a recipe's `measure`, whoever made it; returns the metrics.

    The adapter may be a file, a run's folder or a hub id, the recipe a file. The folder is written
    as `train` does, without the numbers of a training: the adapter and its twin, now with the
    measures in their headers, sidecar, card, `metrics.json`, picture. Called again after Ctrl-C, it
    draws what is missing. Raises BadInput where the recipe measures nothing, or the folder holds
    another run or other files.
    """
    adapter, recipe, folder = as_adapter(adapter), Recipe.of(recipe), Path(out_dir)
    with lock(folder):
        check_folder(folder, recipe, force=force)
        if not before_after.wanted(recipe):
            raise BadInput(f"{recipe.name}: expected a recipe that names prompts to measure with")
        before_after.check_measuring(recipe)
        check_attacks(recipe)
        made_by = Metrics(
            measured_by=recipe.name,
            measured_on=recipe.model,
            measured_with=recipe.measure.model_dump(mode="json", exclude={"prompts"}),
            base=adapter.metadata.base or TrainedOn(),
            training=TrainingReport(),
        )
        with replacement(folder) as place, advice_on_interrupt("the same call"):
            finish_adapter(adapter, place, recipe, made_by)
        return Metrics.read(folder).as_json()


def finish_adapter(adapter: Adapter, folder: Path, recipe: Recipe, made_by: Metrics) -> Adapter:
    """Write the adapter, measure it as written, write it again with its numbers, and its card; the
    metrics last, which add to `made_by`: a training's numbers, or how it was measured."""
    _write_adapter(adapter, folder)
    seen = folder_of_seen(adapter.identity)
    metrics, preview = _measured(made_by, recipe, folder, seen, adapter=ADAPTER)
    if preview is not None:
        metadata = adapter.metadata | {"measures": metrics.as_json()["measures"]}
        adapter = Adapter(adapter.factors, with_thumbnail(metadata, preview))
        _write_adapter(adapter, folder)
    metrics |= {"adapter": _file_numbers(folder / ADAPTER, adapter.parameters)}
    write_text(folder / CARD, render_card(adapter, metrics))
    write_text(folder / METRICS_FILE, metrics.to_json())
    forget_seen(seen)
    return adapter


def finish_weights(
    tensors: dict[str, torch.Tensor],
    metadata: Metadata,
    folder: Path,
    recipe: Recipe,
    made_by: Metrics,
) -> None:
    """Write fully trained weights, measure them as written, write their card; the metrics last."""
    write_weights(tensors, metadata, folder / WEIGHTS)
    seen = folder_of_seen(sha256_of(folder / WEIGHTS))
    metrics, _ = _measured(made_by, recipe, folder, seen, weights=WEIGHTS)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    metrics |= {"weights": _file_numbers(folder / WEIGHTS, parameters)}
    write_text(folder / CARD, render_weights_card(metadata, metrics))
    write_text(folder / METRICS_FILE, metrics.to_json())
    forget_seen(seen)


@contextmanager
def advice_on_interrupt(again: str) -> Iterator[None]:
    """Where Ctrl-C stops a measurement, say what goes on with it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted while measuring; {again} draws the images that are missing"
        ) from None


def write_weights(tensors: dict[str, torch.Tensor], metadata: Metadata, path: Path) -> None:
    """Write weights of a UNet by diffusers' names."""
    header = {"format": "pt", ENTRY_KEY: json.dumps(metadata.as_json(), ensure_ascii=False)}
    with atomic_output(path) as file:
        for chunk in serialize({name: t.numpy() for name, t in tensors.items()}, header):
            file.write(chunk)


def versions() -> dict[str, str]:
    """Versions of Python, of sdd_lora and of the libraries that computed the result."""
    found = {"python": platform.python_version(), "sdd_lora": __version__}
    for name in _VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _measured(
    made_by: Metrics,
    recipe: Recipe,
    folder: Path,
    seen: Path,
    adapter: str | None = None,
    weights: str | None = None,
) -> tuple[Metrics, Image.Image | None]:
    """`made_by`, with rows on the recipe's model and on those of `transfer`, whose pictures go into
    the folder; and a preview, None where nothing is measured."""
    metrics = made_by | {"tool": f"sdd_lora {__version__}", "versions": versions()}
    if not before_after.wanted(recipe):
        return metrics | {"measures": [], "transfer": [], "attacks": []}, None
    say("measuring before and after")
    written = None if adapter is None else Adapter.load(folder / adapter)
    file = None if weights is None else folder / weights
    found: dict[str, dict[str, Any]] = {}
    previews = []
    for model in dict.fromkeys((recipe.model, *recipe.measure.transfer)):
        measured = before_after.measure_before_after(recipe, written, model, file, seen)
        picture = PICTURE if model == recipe.model else picture_of(model)
        with atomic_output(folder / picture) as target:
            measured.picture.save(target, "PNG")
        previews.append(measured.preview)
        found[model] = {"measures": measured.rows}
        if measured.black.before or measured.black.after:
            found[model]["black"] = measured.black
            warn(black_note(measured.black))
    rows = found.pop(recipe.model) | {
        "transfer": [TransferRows(model=model, **rows) for model, rows in found.items()],
        "attacks": withstood(recipe, written, file, seen),
    }
    return metrics | rows, previews[0]


def _file_numbers(path: Path, parameters: int) -> FileNumbers:
    return FileNumbers(sha256=sha256_of(path), parameters=parameters, bytes=path.stat().st_size)


def _write_adapter(adapter: Adapter, folder: Path) -> None:
    adapter.save(folder / ADAPTER, dtype="fp16")
    if not adapter.is_portable:
        adapter.save(folder / PEFT_TWIN, format="peft", dtype="fp16")
    write_sidecar(adapter, folder / ADAPTER)
