"""What each row took: passes, seconds, parameters, bytes, and what its method was told."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from sdd_lora.adapter.metrics import FileNumbers, Metrics, Snapshot, TrainingReport
from sdd_lora.bench.grid import draws_with
from sdd_lora.bench.methods import Weights
from sdd_lora.bench.results import Cost
from sdd_lora.io.safetensors import read_header


def costs_of(weights: Weights) -> list[Cost]:
    """A row a method of the table."""
    return [_cost(weights, method) for method in weights.bench.methods]


def _cost(weights: Weights, method: str) -> Cost:
    bench = weights.bench
    elsewhere = (bench.images, bench.code, bench.weights, bench.models)
    if any(method in named for named in elsewhere):
        return Cost(method=method, told="not known here")
    if weights.is_uce(method):
        assert bench.uce is not None
        named = [_count(bench.uce.concepts or bench.erased, "word")]
        named += [f"{_count(bench.uce.preserve, 'word')} to keep"] if bench.uce.preserve else []
        return _of_file(method, weights.uce(), ", ".join(named))
    if method in bench.recipes:
        return _of_training(weights, method, method)
    if method in bench.words:
        row = bench.words[method]
        concepts = [c for part in row.solved for c in bench.words[part].concepts] or row.concepts
        told = _count(concepts or bench.erased, "word")
        return _of_file(method, weights.from_words(method), told)
    if method in bench.adapters:
        return _of_adapters(weights, method)
    words = [] if draws_with(bench, method) == "sd" else bench.against.split(",")
    told = _count(words, "word") if words else "nothing"
    return Cost(method=method, unet_passes=0, seconds=0.0, parameters=0, bytes=0, told=told)


def _of_training(weights: Weights, name: str, method: str) -> Cost:
    """Of a recipe, up to its chosen snapshot."""
    metrics = Metrics.read(weights.trained(name))
    spent: TrainingReport | Snapshot = metrics.training
    for snapshot in metrics.snapshots:
        if snapshot.iteration == weights.chosen.get(name):
            spent = snapshot
    file = metrics.adapter or metrics.weights or FileNumbers()
    recipe, seeds = weights.bench.recipe(name), len(weights.bench.trainings_of(name))
    told = [_count(recipe.concepts, "phrase")]
    if recipe.preserve.vocabulary:
        told.append("the tokenizer's words to keep")
    if recipe.preserve.prompts:
        told.append(f"{_count(recipe.preserve.prompts, 'phrase')} to keep")
    if seeds > 1:
        told.append(f"{seeds} trainings of which each took that")
    return Cost(
        method=method,
        unet_passes=spent.unet_passes,
        seconds=spent.seconds,
        parameters=file.parameters,
        bytes=file.bytes,
        told=", ".join(told),
    )


def _of_adapters(weights: Weights, method: str) -> Cost:
    """Of a row that carries others' adapters: the sum of what is known of them."""
    names = weights.bench.adapters[method]
    trained = [_of_training(weights, n, method) for n in names if n in weights.bench.recipes]
    adapters = [adapter for adapter, _ in weights.parts(method)]
    known = len(trained) == len(names)
    return Cost(
        method=method,
        unet_passes=sum(c.unet_passes or 0 for c in trained) if known else None,
        seconds=round(sum(c.seconds or 0 for c in trained), 2) if known else None,
        parameters=sum(adapter.parameters for adapter in adapters),
        bytes=sum(c.bytes or 0 for c in trained) if known else None,
        told=f"as {', '.join(names)}",
    )


def _of_file(method: str, path: Path, told: str) -> Cost:
    """Of a file that no training made; the seconds stand beside it."""
    parameters = sum(math.prod(info.shape) for info in read_header(path).tensors.values())
    beside = path.with_suffix(".json")
    seconds = json.loads(beside.read_text("utf-8"))["seconds"] if beside.exists() else None
    return Cost(
        method=method,
        unet_passes=0,
        seconds=seconds,
        parameters=parameters,
        bytes=path.stat().st_size,
        told=told,
    )


def _count(named: Sequence[str], what: str) -> str:
    return f"{len(named)} {what}{'' if len(named) == 1 else 's'}"
