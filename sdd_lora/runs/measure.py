"""A result's files: weights or adapter, the numbers measured with them, card, metrics."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
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
    METRICS,
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
        made_by = {
            "measured_by": recipe.name,
            "measured_on": recipe.model,
            "measured_with": recipe.measure.model_dump(mode="json", exclude={"prompts"}),
        }
        with replacement(folder) as place, advice_on_interrupt("the same call"):
            finish_adapter(adapter, place, recipe, made_by, training={})
        return read_metrics(folder)


def finish_adapter(
    adapter: Adapter,
    folder: Path,
    recipe: Recipe,
    made_by: dict[str, Any],
    training: dict[str, Any],
) -> Adapter:
    """Write the adapter, measure it as written, write it again with its numbers, and its card; the
    metrics last."""
    _write_adapter(adapter, folder)
    seen = folder_of_seen(adapter.identity)
    measured, preview = _measured(recipe, folder, seen, adapter=ADAPTER)
    if preview is not None:
        metadata = adapter.metadata | {"measures": measured["measures"]}
        adapter = Adapter(adapter.factors, with_thumbnail(metadata, preview))
        _write_adapter(adapter, folder)
    result = {"adapter": _file_numbers(folder / ADAPTER, adapter.parameters)}
    metrics = _metrics(made_by, adapter.metadata.base, result, training, measured)
    write_text(folder / CARD, render_card(adapter, metrics))
    _write_metrics(folder, metrics)
    forget_seen(seen)
    return adapter


def finish_weights(
    tensors: dict[str, torch.Tensor],
    metadata: Metadata,
    folder: Path,
    recipe: Recipe,
    made_by: dict[str, Any],
    training: dict[str, Any],
) -> None:
    """Write fully trained weights, measure them as written, write their card; the metrics last."""
    write_weights(tensors, metadata, folder / WEIGHTS)
    seen = folder_of_seen(sha256_of(folder / WEIGHTS))
    measured, _ = _measured(recipe, folder, seen, weights=WEIGHTS)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    result = {"weights": _file_numbers(folder / WEIGHTS, parameters)}
    metrics = _metrics(made_by, metadata.base, result, training, measured)
    write_text(folder / CARD, render_weights_card(metadata, metrics))
    _write_metrics(folder, metrics)
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


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run."""
    return dict(json.loads((folder / METRICS).read_text("utf-8")))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that computed the result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _measured(
    recipe: Recipe,
    folder: Path,
    seen: Path,
    adapter: str | None = None,
    weights: str | None = None,
) -> tuple[dict[str, Any], Image.Image | None]:
    """Rows on the recipe's model and on those of `transfer`, whose pictures go into the folder; and
    a preview, None where nothing is measured."""
    if not before_after.wanted(recipe):
        return {"measures": [], "transfer": [], "attacks": []}, None
    say("measuring before and after")
    written = None if adapter is None else Adapter.load(folder / adapter)
    file = None if weights is None else folder / weights
    pictures = {recipe.model: PICTURE} | {
        model: picture_of(model) for model in recipe.measure.transfer
    }
    found: dict[str, dict[str, Any]] = {}
    previews = []
    for model, picture in pictures.items():
        measured = before_after.measure_before_after(recipe, written, model, file, seen)
        _save_picture(measured.picture, folder / picture)
        previews.append(measured.preview)
        found[model] = {"measures": [asdict(row) for row in measured.rows]}
        if measured.black["before"] or measured.black["after"]:
            found[model]["black"] = measured.black
            warn(black_note(measured.black))
    rows = found.pop(recipe.model) | {
        "transfer": [{"model": model} | rows for model, rows in found.items()],
        "attacks": [asdict(row) for row in withstood(recipe, written, file, seen)],
    }
    return rows, previews[0]


def _file_numbers(path: Path, parameters: int) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "parameters": parameters, "bytes": path.stat().st_size}


def _metrics(
    made_by: dict[str, Any],
    base: TrainedOn | None,
    result: dict[str, Any],
    training: dict[str, Any],
    measured: dict[str, Any],
) -> dict[str, Any]:
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


def _save_picture(picture: Image.Image, path: Path) -> None:
    with atomic_output(path) as file:
        picture.save(file, "PNG")


def _write_adapter(adapter: Adapter, folder: Path) -> None:
    adapter.save(folder / ADAPTER, dtype="fp16")
    if not adapter.is_portable:
        adapter.save(folder / PEFT_TWIN, format="peft", dtype="fp16")
    write_sidecar(adapter, folder / ADAPTER)
