"""Which snapshot of a trained row stands in the table: one rule, on prompts and seeds apart."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdd_lora.bench.bench_file import CHOICE_VARIATION, Bench
from sdd_lora.bench.grid import Cell, Conditions, image_specs
from sdd_lora.bench.results import ChoiceRow, ImageRecord, pair_of
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import write_text
from sdd_lora.measures.base import MeasureInfo

CHOICE = "choice.json"


def choice_cells(
    bench: Bench, default: Conditions, snapshots: Callable[[str], list[int]]
) -> list[Cell]:
    """A cell for each snapshot, and the result, of each row to choose for. Raises BadInput where a
    prompt or seed is the table's too."""
    if bench.choice is None:
        return []
    own = {"prompts": bench.choice.prompts, "seeds": bench.choice.seeds}
    specs, _ = image_specs(bench.model_copy(update=own))
    table, _ = image_specs(bench)
    prompts = {spec.prompt for spec in table} & {spec.prompt for spec in specs}
    seeds = {spec.job.seed for spec in table} & {spec.job.seed for spec in specs}
    if prompts or seeds:
        both = [*sorted(prompts)[:3], *map(str, sorted(seeds)[:3])]
        raise BadInput(
            f"choice: {', '.join(both)}: the table's too; expected prompts and seeds of its own"
        )
    return [
        Cell(
            method, CHOICE_VARIATION, iteration, replace(default, snapshot=iteration), specs, False
        )
        for method in bench.choice.methods
        for iteration in snapshots(method)
    ]


def choice_rows(
    cells: Sequence[Cell],
    records: Callable[[Cell], list[ImageRecord]],
    info: Mapping[str, MeasureInfo],
) -> list[ChoiceRow]:
    """Each snapshot's rates; `chosen` is, of a method's, the one of the greatest kept less drawn,
    of equals the earliest. Raises BadInput where no measure gives both rates."""
    pair = pair_of(info)
    if cells and pair is None:
        raise BadInput("choice: expected a measure of what is drawn, and one of what is kept")
    rows: dict[str, list[ChoiceRow]] = {}
    for cell in cells:
        assert pair is not None and cell.conditions.snapshot is not None
        found = records(cell)
        drawn, kept = ([r.values[name] for r in found if name in r.values] for name in pair)
        if not drawn or not kept:
            raise BadInput("choice: expected images of what is erased, and of what is kept")
        row = ChoiceRow(
            method=cell.method,
            iteration=cell.conditions.snapshot,
            drawn=sum(drawn) / len(drawn),
            kept=sum(kept) / len(kept),
            n=(len(drawn), len(kept)),
            chosen=False,
        )
        rows.setdefault(cell.method, []).append(row)
    for own in rows.values():
        best = max(own, key=lambda row: (row.kept - row.drawn, -row.iteration))
        own[own.index(best)] = best.model_copy(update={"chosen": True})
    return [row for own in rows.values() for row in own]


def write_choice(folder: Path, rows: Sequence[ChoiceRow]) -> None:
    """Keep the rows for other processes, and for shards."""
    told = [row.model_dump(mode="json") for row in rows]
    write_text(folder / CHOICE, json.dumps(told, indent=1) + "\n")


def read_choice(folder: Path) -> list[ChoiceRow] | None:
    """The rows that a run has left, if one has."""
    path = folder / CHOICE
    if not path.exists():
        return None
    told: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return [ChoiceRow.model_validate(row) for row in told]


def chosen_of(rows: Sequence[ChoiceRow]) -> dict[str, int]:
    """Methods → the iteration of the snapshot that was chosen."""
    return {row.method: row.iteration for row in rows if row.chosen}
