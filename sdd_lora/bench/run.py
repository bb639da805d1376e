"""Running a bench: every method on the same prompts and latents, measured; resumable throughout.

An image is on disk before its line in a manifest is, and a measured value is a line too, so that a
killed run goes on where it stopped, with no image twice and none missing.
"""

import datetime
import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from sdd_lora.bench import tables
from sdd_lora.bench.attacked import Attacking
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.grid import Cell, Conditions, cells_of, draws_with
from sdd_lora.bench.methods import Train, Weights
from sdd_lora.bench.results import ALL, BENCH, DAMAGED_IMAGE, IMAGES, RESULTS, Results, Row
from sdd_lora.errors import BadInput
from sdd_lora.generation.images import check_concept, check_sampling, generate
from sdd_lora.generation.img2img import from_images
from sdd_lora.generation.manifest import as_entry, drawn_in, is_drawn, job_in
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.atomic import write_text
from sdd_lora.io.distributed import processes
from sdd_lora.io.jsonl import append_lines, read_lines
from sdd_lora.io.pictures import reading
from sdd_lora.measures.base import MeasureInfo
from sdd_lora.measures.registry import (
    MEASURES,
    NAMED_BY,
    BesideSd,
    Measure,
    OfImages,
    OfSets,
)
from sdd_lora.progress import say

CSV, MARKDOWN = "results.csv", "results.md"
#: where `sd` draws what others start from, or are compared with
BASE = Path("images") / "sd"
VALUES, VALUES_OF_SETS = "values.jsonl", "values-of-sets.jsonl"
_MEASURED_AT_ONCE = 256


def run(
    bench: Bench, folder: Path, train: Train, command: str, versions: dict[str, str]
) -> Results:
    """Draw and measure all cells of a bench into `folder`; returns what is written there.

    `train` makes a recipe's run, as `sdd_lora.runs.train.train` does. A measure that lacks its
    weights is named in the results' `missing`; the others go on. Raises BadInput where the folder
    holds another bench, or a method lacks what it needs; that is found before anything is drawn.
    """
    if processes().num_processes > 1:
        raise BadInput("a bench runs in one process; start it without torchrun")
    cells = cells_of(bench)
    weights = Weights(bench, train)
    weights.check(cells)
    for cell in cells:
        check_sampling(sampling_of(cell, bench), [shot.job for shot in cell.shots])
    attacking = Attacking(bench, weights, folder)
    attacking.check(cells)
    measures, missing = load_measures(bench)
    for line in missing:
        say(f"not measured: {line}")
    for cell in cells:
        try:
            check_concept(sampling_of(cell, bench), weights.tokenizer(cell.conditions.model))
        except BadInput as error:
            raise BadInput(f"method {cell.method}: {error}") from None
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
            of_sets += measure_set(folder, cell, measures)
    write_text(folder / IMAGES, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    info = {name: told for measure in measures.values() for name, told in measure.info.items()}
    rows = tables.rows(lines, info) + of_sets
    for line in without_rows(measures, rows):
        say(f"not measured: {line}")
        missing.append(line)
    fields = {name: variation.field for name, variation in bench.variations.items()}
    now = datetime.datetime.now(datetime.timezone.utc)
    results = Results(
        bench=bench.name, model=bench.model, date=now.isoformat(timespec="seconds"),
        command=command, versions=versions, rows=rows,
        concepts=bench.erased,
        sampling=bench.sampling.model_dump(exclude={"batch"}),
        methods={method: weights.told(method) for method in bench.methods},
        measures=info,
        sources={key.partition(" ")[0]: measure.source for key, measure in measures.items()},
        variations=tables.variations(lines, fields, info),
        attacks=tables.attacks(lines, info, costs),
        collateral=tables.collateral(lines, NAMED_BY),
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


def draw_cell(
    folder: Path, cell: Cell, bench: Bench, weights: Weights, words: dict[str, torch.Tensor]
) -> None:
    """Draw what a cell still lacks; `words` are new ones in its prompts, with embeddings (d,)."""
    conditions, sampling = cell.conditions, sampling_of(cell, bench)
    target, jobs = folder / cell.folder, [shot.job for shot in cell.shots]
    settings = weights.settings(cell)
    if is_drawn(target, jobs, sampling, settings):
        return
    pipeline = weights.pipeline(cell)
    if words:
        pipeline.load_textual_inversion(list(words.values()), token=list(words))
    if conditions.image:
        pipeline = from_images(pipeline, drawn_in(folder / BASE), sampling, conditions.image)
    generate(pipeline, jobs, sampling, target, settings)


def sampling_of(cell: Cell, bench: Bench) -> Sampling:
    """How a cell's images are drawn."""
    conditions, method = cell.conditions, draws_with(cell.method)
    return Sampling(
        conditions.steps, conditions.guidance, conditions.scheduler, method,
        _concept(method, bench), bench.sampling.batch,
    )  # fmt: skip


def _concept(method: str, bench: Bench) -> str:
    """What a way of drawing works against; the gate compares prompts with each concept."""
    if method == "sdd-gated":
        return ", ".join(bench.erased)
    return "" if method == "sd" else bench.against


def load_measures(bench: Bench) -> tuple[dict[str, Measure], list[str]]:
    """The bench's measures, and a line for each that can't be taken. They go by their name, their
    options and whose numbers they are, under which values are kept.

    Raises BadInput for a name that is none, options of a wrong type, numbers of one name from two
    measures, and where no measure is left.
    """
    found: dict[str, Measure] = {}
    missing = []
    for name, options in bench.measures.items():
        if name not in MEASURES:
            raise BadInput(f"measure {name}: expected one of {', '.join(MEASURES)}")
        _check_options(name, options)
        of_files = getattr(MEASURES[name], "files", ())
        files = {option: bench.file(options[option]) for option in of_files if options.get(option)}
        try:
            measure = MEASURES[name](bench.erased, **options | files)
        except BadInput as error:
            missing.append(f"{name}: {error}")
            continue
        told = json.dumps([options, measure.source], sort_keys=True)
        found[f"{name} {hashlib.sha256(told.encode()).hexdigest()[:16]}"] = measure
    if not found:
        raise BadInput("no measure can be taken:\n" + "\n".join(missing))
    _refuse_doubles(found)
    return found, missing


def without_rows(measures: dict[str, Measure], rows: Sequence[Row]) -> list[str]:
    """A line for each measure that has no number, because nothing was drawn that it counts."""
    there = {row.measure for row in rows}
    lines = []
    for key, measure in measures.items():
        if not there & measure.info.keys():
            of = {info.of for info in measure.info.values()} - {"all"}
            beside = " beside sd's" if isinstance(measure, BesideSd) else ""
            name, counted = key.partition(" ")[0], " or ".join(sorted(of))
            lines.append(f"{name}: it takes {counted} images{beside}, and there are none")
    return lines


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raises BadInput for options that a measure has not, or of other types than it takes."""
    _, *known = inspect.signature(MEASURES[name]).parameters.values()
    kinds = {parameter.name: parameter.annotation for parameter in known}
    if unknown := [option for option in options if option not in kinds]:
        raise BadInput(
            f"measures.{name}: unknown option {', '.join(unknown)}; "
            f"expected {', '.join(kinds) or 'none'}"
        )
    for option, value in options.items():
        try:
            TypeAdapter(kinds[option]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise BadInput(f"measures.{name}.{option}: {problem}, found {value!r}") from None


def _refuse_doubles(measures: dict[str, Measure]) -> None:
    """Raises BadInput where two measures give a number of the same name and don't mean the same."""
    info: dict[str, MeasureInfo] = {}
    for measure in measures.values():
        for name, told in measure.info.items():
            if info.setdefault(name, told) != told:
                raise BadInput(
                    f"measures: two give {name}, with other settings ({info[name].note}; "
                    f"{told.note}); expected the same ones, or one of the two measures alone"
                )


def measure_cell(
    folder: Path, cell: Cell, measures: dict[str, Measure], usual: Conditions
) -> list[tables.Line]:
    """A line for each of a cell's images, with its values; what was measured before is kept.

    `usual` are the conditions under which `sd` drew what images are compared with.
    """
    target = folder / cell.folder
    files = drawn_in(target)
    lines: list[tables.Line] = [
        {
            "method": cell.method, "variation": cell.variation, "setting": cell.setting,
            "kind": shot.kind, "set": shot.set, **as_entry(replace(shot.job, prompt=shot.prompt)),
            "file": files[shot.job].relative_to(folder).as_posix(), "values": {},
        } | ({"asked": shot.job.prompt} if shot.wanted else {})
        | ({"categories": shot.categories} if shot.categories else {})
        for shot in cell.shots
    ]  # fmt: skip
    told = read_lines(target, VALUES, {"measure": str, "file": str, "values": dict})
    known = {(x["measure"], x["file"]): x["values"] for x in told}
    paired = cell.method != "sd" and replace(cell.conditions, weight=1.0) == usual
    base = drawn_in(folder / BASE) if paired else {}
    if any(shot.job not in base for shot in cell.shots):
        base = {}  # a run that was killed while `sd` was drawn, and goes on with others
    for name, measure in measures.items():
        key = f"{name} beside sd" if base and isinstance(measure, BesideSd) else name
        todo = [line for line in lines if (key, line["file"]) not in known]
        for start in range(0, len(todo), _MEASURED_AT_ONCE):
            part = todo[start : start + _MEASURED_AT_ONCE]
            values = _taken(measure, part, folder, base)
            _check_finite(name, part, values)
            append_lines(
                target / VALUES,
                [{"measure": key, "file": line["file"], "values": v}
                 for line, v in zip(part, values, strict=True)],
            )  # fmt: skip
            known |= {(key, x["file"]): v for x, v in zip(part, values, strict=True)}
        for line in lines:
            line["values"] |= known[key, line["file"]]
    return lines


def _check_finite(
    measure: str, lines: Sequence[tables.Line], values: Sequence[dict[str, bool | float]]
) -> None:
    """Raises BadInput where a measure gives no number: weights with NaN in them."""
    for line, found in zip(lines, values, strict=True):
        if not all(map(math.isfinite, found.values())):
            raise BadInput(
                f"measure {measure.partition(' ')[0]}: expected finite numbers, found {found} for "
                f"{line['file']}; are its weights sound? What was drawn stays: run again with "
                "others, or without this measure"
            )


def _taken(
    measure: Measure, lines: Sequence[tables.Line], folder: Path, base: dict[Job, Path]
) -> list[dict[str, bool | float]]:
    """A measure's values of single images; beside `sd`'s too, where those are there."""
    values: list[dict[str, bool | float]] = [{} for _ in lines]
    if not isinstance(measure, (OfImages, BesideSd)):
        return values
    images = [_image(folder / line["file"]) for line in lines]
    if isinstance(measure, OfImages):
        values = measure.values(lines, images)
    if isinstance(measure, BesideSd) and base:
        others = [_image(base[job_in(line)]) for line in lines]
        more = measure.beside(lines, images, others)
        values = [{**a, **b} for a, b in zip(values, more, strict=True)]
    return values


def measure_set(folder: Path, cell: Cell, measures: dict[str, Measure]) -> list[Row]:
    """Rows of the measures that take all of a method's kept images at once, without interval; what
    was measured before is kept."""
    target, drawn = folder / cell.folder, drawn_in(folder / cell.folder)
    files = [drawn[shot.job] for shot in cell.shots if shot.kind == "kept"]
    told = read_lines(target, VALUES_OF_SETS, {"measure": str, "values": dict})
    known = {x["measure"]: x["values"] for x in told}
    rows = []
    for key, measure in measures.items():
        if not isinstance(measure, OfSets) or not files:
            continue
        if key not in known:
            known[key] = measure.of_set(map(_image, files))
            append_lines(target / VALUES_OF_SETS, [{"measure": key, "values": known[key]}])
        rows += [
            Row(method=cell.method, measure=name, group=ALL, value=value, ci95=None, n=len(files))
            for name, value in known[key].items()
        ]
    return rows


def _image(path: Path) -> np.ndarray:
    with reading(path, DAMAGED_IMAGE), Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
