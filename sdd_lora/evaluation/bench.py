"""Running a bench: every method on the same prompts and latents, measured; resumable throughout.

An image is on disk before its line in a manifest is, and a measured value is a line too, so that a
killed run goes on where it stopped, with no image twice and none missing.
"""

import datetime
import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from sdd_lora.errors import BadInput
from sdd_lora.evaluation import tables
from sdd_lora.evaluation.attacks.running import Attacking
from sdd_lora.evaluation.bench_file import Bench
from sdd_lora.evaluation.cells import Cell, Conditions, cells_of, draws_with
from sdd_lora.evaluation.lines import append_lines, read_lines
from sdd_lora.evaluation.results import ALL, BENCH, IMAGES, RESULTS, Results, Row
from sdd_lora.evaluation.taking import (
    MEASURES,
    BesideSd,
    Measure,
    OfImages,
    OfSets,
    concept_of,
)
from sdd_lora.evaluation.weights import Train, Weights
from sdd_lora.files import write_text
from sdd_lora.generation.images import MANIFEST, Sampling, generate, processes
from sdd_lora.progress import say

CSV, MARKDOWN = "results.csv", "results.md"
VALUES = "values.jsonl"
_MEASURED_AT_ONCE = 256


def run(
    bench: Bench, folder: Path, train: Train, command: str, versions: dict[str, str]
) -> Results:
    """Draw and measure all cells of a bench into `folder`; returns what is written there.

    `train` makes a recipe's run, as `sdd_lora.runs.train` does. A measure that lacks its weights is
    named in the results' `missing`; the others go on. Raises BadInput where the folder holds
    another bench, or a method lacks what it needs; that is found before anything is drawn.
    """
    if processes().num_processes > 1:
        raise BadInput("a bench runs in one process; start it without torchrun")
    cells = cells_of(bench)
    weights = Weights(bench, train)
    weights.check(cells)
    attacking = Attacking(bench, weights, folder)
    attacking.check(cells)
    measures, missing = load_measures(bench)
    for line in missing:
        say(f"not measured: {line}")
    claim(folder, bench)
    lines: list[tables.Line] = []
    of_sets: list[Row] = []
    costs: dict[tuple[str, str], tuple[float, float]] = {}
    for number, planned in enumerate(cells):
        cell, words = planned, dict[str, torch.Tensor]()
        label = cell.method if cell.variation is None else f"{cell.method}, {cell.setting}"
        say(f"{number + 1}/{len(cells)}: {label}")
        if attack := cell.conditions.attack:
            costs[attack, cell.method] = attacking.cost(cell)
            cell, words = attacking.attacked(cell)
        if cell.variation is None or not cell.usual:
            draw_cell(folder, cell, bench, weights, words)
        lines += measure_cell(folder, cell, measures, usual=cells[0].conditions)
        if cell.variation is None:
            of_sets += measure_set(folder, cell, measures, lines)
    write_text(folder / IMAGES, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    info = {name: told for measure in measures.values() for name, told in measure.info.items()}
    fields = {name: variation.field for name, variation in bench.variations.items()}
    now = datetime.datetime.now(datetime.timezone.utc)
    results = Results(
        bench=bench.name, model=bench.model, date=now.isoformat(timespec="seconds"),
        command=command, versions=versions, rows=tables.rows(lines, info) + of_sets,
        concepts=bench.erased,
        sampling=bench.sampling.model_dump(exclude={"batch"}),
        methods={method: weights.told(method) for method in bench.methods},
        measures=info,
        variations=tables.variations(lines, fields, info),
        attacks=tables.attacks(lines, info, costs),
        collateral=tables.collateral(lines, info, concept_of),
        interference=weights.interference(), missing=missing,
    )  # fmt: skip
    write_text(folder / CSV, results.to_csv())
    write_text(folder / MARKDOWN, results.to_markdown())
    write_text(folder / RESULTS, results.to_json())
    return results


def claim(folder: Path, bench: Bench) -> None:
    """Make the folder this bench's. Raises BadInput where it holds another one's images."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: can't make this folder: {error.strerror}") from error
    path = folder / BENCH
    if path.exists():
        found = Bench.load(path)
        if found.sha256_of_images != bench.sha256_of_images:
            raise BadInput(
                f"{folder}: holds images of another bench, or of another number of them "
                f"({found.name}); choose another folder with -o"
            )
    elif any(folder.iterdir()):
        raise BadInput(f"{folder}: holds something else; choose another folder with -o")
    write_text(path, bench.to_yaml())


class FromDrawings(StableDiffusionImg2ImgPipeline):
    """Starts from pictures that are there already, found by prompt and seed; `redone` is how much
    of each is drawn anew, img2img's strength."""

    pictures: dict[tuple[str, int], Path]
    redone: float

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: Any) -> Any:
        start = [
            Image.open(self.pictures[text, g.initial_seed()]).convert("RGB")
            for text, g in zip(prompt, generator, strict=True)
        ]
        return super().__call__(
            prompt, image=start, strength=self.redone, generator=generator, **options
        )


def draw_cell(
    folder: Path, cell: Cell, bench: Bench, weights: Weights, words: dict[str, torch.Tensor]
) -> None:
    """Draw what a cell still lacks; `words` are new ones in its prompts, with embeddings (d,)."""
    pipeline = weights.pipeline(cell)
    if words:
        pipeline.load_textual_inversion(list(words.values()), token=list(words))
    conditions, method = cell.conditions, draws_with(cell.method)
    if conditions.image:
        parts = pipeline.components
        pipeline = FromDrawings(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.redone, pipeline.pictures = conditions.image, _drawn_by_sd(folder)
    sampling = Sampling(
        conditions.steps, conditions.guidance, conditions.scheduler, method,
        _concept(method, bench), bench.sampling.batch,
    )  # fmt: skip
    target = folder / cell.folder
    generate(pipeline, [s.job for s in cell.shots], sampling, target, weights.settings(cell))


def _concept(method: str, bench: Bench) -> str:
    """What a way of drawing works against; the gate compares prompts with each concept."""
    if method == "sdd-gated":
        return ", ".join(bench.erased)
    return "" if method == "sd" else bench.against


def _drawn_by_sd(folder: Path) -> dict[tuple[str, int], Path]:
    usual = folder / "images" / "sd"
    lines = read_lines(usual, MANIFEST)
    return {(line["prompt"], line["seed"]): usual / line["file"] for line in lines}


def load_measures(bench: Bench) -> tuple[dict[str, Measure], list[str]]:
    """The bench's measures by their name and options, and a line for each that can't be taken.

    Raises BadInput for a name that is none, and where no measure is left.
    """
    found: dict[str, Measure] = {}
    missing = []
    for name, options in bench.measures.items():
        if name not in MEASURES:
            raise BadInput(f"measure {name}: expected one of {', '.join(MEASURES)}")
        measure = MEASURES[name]
        known = list(inspect.signature(measure).parameters)[1:]
        if unknown := [option for option in options if option not in known]:
            raise BadInput(
                f"measures.{name}: unknown option {', '.join(unknown)}; "
                f"expected {', '.join(known) or 'none'}"
            )
        files = {x: bench.file(options[x]) for x in getattr(measure, "files", ()) if x in options}
        try:
            found[f"{name} {json.dumps(options, sort_keys=True)}"] = measure(
                bench.erased, **options | files
            )
        except BadInput as error:
            missing.append(f"{name}: {error}")
    if not found:
        raise BadInput("no measure can be taken:\n" + "\n".join(missing))
    return found, missing


def measure_cell(
    folder: Path, cell: Cell, measures: dict[str, Measure], usual: Conditions
) -> list[tables.Line]:
    """A line for each of a cell's images, with its values; what was measured before is kept.

    `usual` are the conditions under which `sd` drew what images are compared with.
    """
    target = folder / cell.folder
    files = {(line["prompt"], line["seed"]): line["file"] for line in read_lines(target, MANIFEST)}
    lines: list[tables.Line] = [
        {
            "method": cell.method, "variation": cell.variation, "setting": cell.setting,
            "kind": shot.kind, "set": shot.set, "prompt": shot.prompt, "seed": shot.job.seed,
            "file": (cell.folder / files[shot.job.prompt, shot.job.seed]).as_posix(), "values": {},
        } | ({"asked": shot.job.prompt} if shot.wanted else {})
        for shot in cell.shots
    ]  # fmt: skip
    known = {(x["measure"], x["file"]): x["values"] for x in read_lines(target, VALUES)}
    paired = cell.method != "sd" and replace(cell.conditions, weight=1.0) == usual
    base = _drawn_by_sd(folder) if paired else {}
    for name, measure in measures.items():
        key = f"{name} beside sd" if base and isinstance(measure, BesideSd) else name
        todo = [line for line in lines if (key, line["file"]) not in known]
        for start in range(0, len(todo), _MEASURED_AT_ONCE):
            part = todo[start : start + _MEASURED_AT_ONCE]
            values = _taken(measure, part, folder, base)
            append_lines(
                target / VALUES,
                [{"measure": key, "file": line["file"], "values": v}
                 for line, v in zip(part, values, strict=True)],
            )  # fmt: skip
            known |= {(key, x["file"]): v for x, v in zip(part, values, strict=True)}
        for line in lines:
            line["values"] |= known[key, line["file"]]
    return lines


def _taken(
    measure: Measure, lines: Sequence[tables.Line], folder: Path, base: dict[tuple[str, int], Path]
) -> list[dict[str, bool | float]]:
    """A measure's values of single images; beside `sd`'s too, where those are there."""
    values: list[dict[str, bool | float]] = [{} for _ in lines]
    if not isinstance(measure, (OfImages, BesideSd)):
        return values
    images = [_image(folder / line["file"]) for line in lines]
    if isinstance(measure, OfImages):
        values = measure.values(lines, images)
    if isinstance(measure, BesideSd) and base:
        others = [_image(base[line["prompt"], line["seed"]]) for line in lines]
        more = measure.beside(lines, images, others)
        values = [{**a, **b} for a, b in zip(values, more, strict=True)]
    return values


def measure_set(
    folder: Path, cell: Cell, measures: dict[str, Measure], lines: Sequence[tables.Line]
) -> list[Row]:
    """Rows of the measures that take all of a method's kept images at once; without interval."""
    files = [
        folder / line["file"] for line in lines
        if line["kind"] == "kept" and line["method"] == cell.method and line["variation"] is None
    ]  # fmt: skip
    return [
        Row(method=cell.method, measure=name, group=ALL, value=value, ci95=None, n=len(files))
        for measure in measures.values() if isinstance(measure, OfSets) and files
        for name, value in measure.of_set(map(_image, files)).items()
    ]  # fmt: skip


def _image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
