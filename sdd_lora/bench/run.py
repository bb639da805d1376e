"""Running a bench: every method on the same prompts and latents, measured; resumable throughout.

An image is on disk before its line in a manifest is, and a measured value is a line too, so that a
killed run goes on where it stopped, with no image twice and none missing.
"""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdd_lora.bench import tables, text
from sdd_lora.bench.attacked import Armed, Attacking
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.choice import choice_cells, choice_rows, chosen_of, read_choice, write_choice
from sdd_lora.bench.costs import costs_of
from sdd_lora.bench.grid import Cell, Grid, draws_with, grid_of
from sdd_lora.bench.held_out import grouping_of
from sdd_lora.bench.measuring import BASE, Measuring, without_rows
from sdd_lora.bench.methods import Train, Weights
from sdd_lora.bench.ready_made import copy_ready_made, ready_made
from sdd_lora.bench.results import BENCH, IMAGES, RESULTS, ChoiceRow, ImageRecord, Results, Row
from sdd_lora.errors import BadInput
from sdd_lora.generation.images import check_concept, check_sampling, generate
from sdd_lora.generation.img2img import from_images
from sdd_lora.generation.manifest import drawn_in, is_drawn
from sdd_lora.generation.manifest import missing as missing_in
from sdd_lora.generation.sampling import Sampling
from sdd_lora.io.atomic import write_text
from sdd_lora.io.distributed import Shard, processes
from sdd_lora.measures.asked import kept_concept
from sdd_lora.measures.base import MeasureInfo
from sdd_lora.measures.registry import LoadedMeasure, load_measures
from sdd_lora.progress import say

CSV, MARKDOWN = "results.csv", "results.md"


def run(
    bench: Bench, folder: Path, train: Train, command: str, versions: dict[str, str]
) -> Results:
    """Draw and measure all cells of a bench into `folder`; returns what is written there.

    `train` makes a recipe's run, as `sdd_lora.runs.train.train` does. A measure that lacks its
    weights is named in the results' `missing`; the others go on. Raises BadInput where the folder
    holds another bench, or a method lacks what it needs; that is found before anything is drawn.
    Processes of torchrun or accelerate share the drawing; the first one measures.
    """
    state = processes()
    grid, weights, attacking = _prepared(bench, folder, train)
    measures, missing = load_measures(bench.measures, bench.erased, bench.file)
    for line in missing:
        say(f"not measured: {line}")
    if state.is_main_process:
        claim(folder, bench)
    measuring = Measuring(folder, measures, grid.default)
    info = {name: told for m in measures for name, told in m.measure.info.items()}
    choices = _choose(folder, bench, grid, weights, measuring, info)
    records: list[ImageRecord] = []
    set_rows: list[Row] = []
    costs: dict[tuple[str, str], tuple[float, float]] = {}
    for number, planned in enumerate(grid.cells):
        cell, armed = planned, None
        say(f"{number + 1}/{len(grid.cells)}: {cell.label}")
        if attack := cell.conditions.attack:
            costs[attack, cell.method] = attacking.cost(cell)
            armed = attacking.armed(cell)
            cell = armed.cell
        if cell.variation is None or not cell.is_main:
            draw_cell(folder, cell, bench, weights, armed)
        if state.is_main_process:
            records += measuring.records(cell)
            counts = cell.variation is None and cell.drawn_by == cell.method
            set_rows += measuring.set_rows(cell) if counts else []
    methods = {method: weights.report_fields(method) for method in bench.methods}
    if not state.is_main_process:
        state.wait_for_everyone()
        return Results.load(folder)
    write_text(folder / IMAGES, "".join(record.to_line() for record in records))
    for line in measuring.notes:
        say(line)
    results = _results(bench, grid, measures, info, records, set_rows, costs).model_copy(
        update={
            "command": command,
            "versions": versions,
            "methods": methods,
            "costs": costs_of(weights),
            "choices": choices,
            "interference": weights.cosines(),
            "notes": prompt_notes(grid) + measuring.notes,
        }
    )
    missing += without_rows(measures, results.rows)
    results = results.model_copy(update={"missing": missing})
    write_text(folder / CSV, text.to_csv(results))
    write_text(folder / MARKDOWN, text.to_markdown(results))
    write_text(folder / RESULTS, results.to_json())
    state.wait_for_everyone()
    return results


def _choose(
    folder: Path,
    bench: Bench,
    grid: Grid,
    weights: Weights,
    measuring: Measuring,
    info: dict[str, MeasureInfo],
) -> list[ChoiceRow]:
    """Choose the snapshots that stand in the table, and tell `weights`; returns all of them."""
    state = processes()
    cells = choice_cells(bench, grid.default, weights.snapshots)
    if not cells:
        return []
    for number, cell in enumerate(cells):
        say(f"choosing, {number + 1}/{len(cells)}: {cell.label}")
        draw_cell(folder, cell, bench, weights)
    if state.is_main_process:
        write_choice(folder, choice_rows(cells, measuring.records, info))
    state.wait_for_everyone()
    rows = read_choice(folder) or []
    weights.chosen |= chosen_of(rows)
    return rows


def draw_shard(bench: Bench, folder: Path, train: Train, shard: Shard) -> int:
    """Train what is needed and draw this shard's share of every cell; returns how many images.

    Shards may fill one folder at once. Cells that start from others' images, attacks, and rows
    whose snapshot is still to be chosen are left for `run`, which also measures. Raises BadInput as
    `run` does.
    """
    grid, weights, _ = _prepared(bench, folder, train)
    claim(folder, bench)
    drawn = left = 0
    choices = read_choice(folder) if bench.choice else []
    weights.chosen |= chosen_of(choices or [])
    later = set(bench.choice.methods) if bench.choice and choices is None else set[str]()
    for cell in choice_cells(bench, grid.default, weights.snapshots):
        drawn += draw_cell(folder, cell, bench, weights, shard=shard)
    for number, cell in enumerate(grid.cells):
        chosen_later = cell.method in later and cell.conditions.snapshot is None
        if cell.conditions.attack or cell.conditions.image or chosen_later:
            left += 1
        elif cell.variation is None or not cell.is_main:
            say(f"{number + 1}/{len(grid.cells)}: {cell.label}, shard {shard.index}/{shard.count}")
            drawn += draw_cell(folder, cell, bench, weights, shard=shard)
    if left:
        say(f"{left} cells start from others' images, attacks or a choice: left for the last call")
    return drawn


def _prepared(bench: Bench, folder: Path, train: Train) -> tuple[Grid, Weights, Attacking]:
    """What is to be drawn, with what, all checked; and a word on prompts that are left out."""
    grid, weights = grid_of(bench), Weights(bench, train)
    attacking = Attacking(bench, weights, folder)
    _check_before_drawing(bench, grid, weights, attacking)
    cells = [
        cell
        for cell in grid.cells
        if not cell.conditions.base_text_encoder or weights.changes_text_encoder(cell.method)
    ]
    grid = replace(grid, cells=cells)
    for line in prompt_notes(grid):
        say(line)
    return grid, weights, attacking


def _check_before_drawing(bench: Bench, grid: Grid, weights: Weights, attacking: Attacking) -> None:
    """Raises BadInput for what can't be drawn or attacked; nothing is written yet."""
    weights.check(grid.cells)
    for cell in grid.cells:
        check_sampling(sampling_of_cell(cell, bench), [spec.job for spec in cell.specs])
    attacking.check(grid.cells)
    choice_cells(bench, grid.default, weights.snapshots)
    for cell in grid.cells:
        if cell.method in bench.images:
            ready_made(bench.file(bench.images[cell.method]), [spec.job for spec in cell.specs])
            continue
        try:
            tokenizer = weights.tokenizer(weights.model_of(cell))
            check_concept(sampling_of_cell(cell, bench), tokenizer)
        except BadInput as error:
            raise BadInput(f"method {cell.method}: {error}") from None


def prompt_notes(grid: Grid) -> list[str]:
    """A line for each set of which not every prompt is drawn."""
    return [
        f"{use.set}: {use.used:,} of {use.of:,} prompts are drawn, spread evenly over them"
        for use in grid.prompts
        if 0 < use.used < use.of
    ]


def _results(
    bench: Bench,
    grid: Grid,
    measures: Sequence[LoadedMeasure],
    info: dict[str, MeasureInfo],
    records: Sequence[ImageRecord],
    set_rows: Sequence[Row],
    costs: dict[tuple[str, str], tuple[float, float]],
) -> Results:
    """What the values amount to, and where they come from."""
    fields = {name: variation.field for name, variation in bench.variations.items()}
    now = datetime.datetime.now(datetime.timezone.utc)
    return Results(
        bench=bench.name,
        model=bench.model,
        date=now.isoformat(timespec="seconds"),
        command="",
        versions={},
        rows=[*tables.rows(records, info, grouping_of(bench)), *set_rows],
        concepts=bench.erased,
        sampling=bench.sampling.model_dump(exclude={"batch"}),
        measures=info,
        sources={m.name: m.measure.source for m in measures},
        variations=tables.variations(records, fields, info),
        attacks=tables.attacks(records, info, costs, bench.attacks),
        collateral=tables.concept_shifts(records, info, kept_concept),
        prompts=grid.prompts,
    )


def claim(folder: Path, bench: Bench) -> None:
    """Make the folder this bench's. Raises BadInput where it holds another one's images."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: can't make this folder: {error.strerror}") from error
    path = folder / BENCH
    others = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if path.exists():
        found = Bench.load(path)
        if found.sha256_of_images != bench.sha256_of_images:
            raise BadInput(
                f"{folder}: holds images of another bench, or of another number of them "
                f"({found.name}); choose another folder"
            )
    elif others:
        raise BadInput(f"{folder}: holds something else; choose another folder")
    write_text(path, bench.to_yaml())


def draw_cell(
    folder: Path,
    cell: Cell,
    bench: Bench,
    weights: Weights,
    armed: Armed | None = None,
    shard: Shard | None = None,
) -> int:
    """Draw what a cell, or a shard of it, still lacks; returns how many images. `armed` is the cell
    with what its attack found."""
    conditions, sampling = cell.conditions, sampling_of_cell(cell, bench)
    target, jobs = folder / cell.folder, [spec.job for spec in cell.specs]
    if cell.method in bench.images:
        state, copied = processes(), 0
        if state.is_main_process and (shard is None or shard.index == 1):
            copied = copy_ready_made(bench.file(bench.images[cell.method]), jobs, target, sampling)
        state.wait_for_everyone()
        return copied
    settings = weights.settings(cell)
    if shard is None:
        left = not is_drawn(target, jobs, sampling, settings)
    else:
        left = bool({i for i, _ in missing_in(target, jobs)} & {*shard.take(range(len(jobs)))})
    processes().wait_for_everyone()  # all have looked at the folder
    if not left:
        return 0
    pipeline = armed.pipeline(weights, sampling) if armed else weights.pipeline(cell)
    if conditions.image:
        pipeline = from_images(pipeline, drawn_in(folder / BASE), sampling, conditions.image)
    return generate(pipeline, jobs, sampling, target, settings, shard)


def sampling_of_cell(cell: Cell, bench: Bench) -> Sampling:
    """How a cell's images are drawn."""
    conditions, method = cell.conditions, draws_with(bench, cell.method)
    return Sampling(
        conditions.steps,
        conditions.guidance,
        conditions.scheduler,
        method,
        _concept(method, bench),
        bench.sampling.batch,
    )


def _concept(method: str, bench: Bench) -> str:
    """What a way of drawing works against; the gate compares prompts with each concept."""
    if method == "sdd-gated":
        return ", ".join(bench.erased)
    return "" if method == "sd" else bench.against
