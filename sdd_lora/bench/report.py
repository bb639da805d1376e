"""A bench's results as one HTML file that needs nothing else: no network, no script."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from sdd_lora.attacks.settings import NAMES
from sdd_lora.bench.bench_file import ATTACKS
from sdd_lora.bench.charts import Chart, curves, scatter
from sdd_lora.bench.results import (
    ALL,
    BENCH,
    DAMAGED_IMAGE,
    IMAGES,
    NOT_ATTACKED,
    Moved,
    Results,
    Row,
    Variation,
    find,
    percent,
    plain,
)
from sdd_lora.errors import BadInput
from sdd_lora.io.jsonl import key_of
from sdd_lora.io.pictures import reading
from sdd_lora.progress import say

REPORT = "report.html"
#: points of a kept rate that a method may lose and still count as keeping
TOLERATED_LOSS = 0.03
_ERASED_SHOWN, _KEPT_SHOWN, _MOVED_SHOWN, _ATTACKED_SHOWN = 3, 1, 12, 4
_THUMBNAIL = 160
_SMALL = 96  # pictures up to this size are embedded as they are


class _ImageLine(BaseModel):
    """A line of images.jsonl, as far as a page shows it."""

    model_config = ConfigDict(extra="allow")
    method: str
    variation: str | None
    setting: float | str | None
    kind: str
    set: str
    prompt: str
    seed: int
    file: str
    values: dict[str, bool | float]
    asked: str | None = None


@dataclass(frozen=True)
class Picture:
    """One image of a grid: a data URI, and what the measures said."""

    column: str
    source: str
    said: str
    drawn: bool


@dataclass(frozen=True)
class Strip:
    """A row of a grid: one prompt and seed, a picture in each column that has one."""

    prompt: str
    seed: int
    group: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Grid:
    """Prompts down, methods or settings across."""

    columns: list[str]
    strips: list[Strip]


def render_report(folder: Path) -> str:
    """The HTML of the bench in `folder`, from its results.json, images.jsonl and images.

    Raises BadInput where they are missing or damaged.
    """
    from jinja2 import Environment, StrictUndefined

    results = Results.load(folder)
    images = read_images(folder)
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "plain": plain, "signed": _signed}
    bench_file = folder / BENCH
    return (
        environment.from_string(_beside("report.html.jinja"))
        .render(
            results=results,
            style=_beside("report.css"),
            ALL=ALL,
            find=find,
            family=family,
            scales={name: _scale(results, name) for name in results.headline()},
            best=best_that_keeps(results),
            headline=_headline_pair(results),
            trade=_trade_off(results),
            groups={name: _groups(results.rows, name) for name in results.measure_names()},
            main_grid=_main_grid(folder, results, images),
            variations=[_variation(folder, v, results, images) for v in results.variations],
            elsewhere=list(results.elsewhere_tables()),
            attacks=list(results.attack_tables()),
            attack_notes=[
                NAMES[a] for a in dict.fromkeys(r.attack for r in results.attacks) if a in NAMES
            ],
            attack_grids=_attack_grids(folder, results, images),
            not_attacked=NOT_ATTACKED,
            moved=_moved(results),
            bench_text=bench_file.read_text("utf-8", "replace") if bench_file.is_file() else "",
            image_count=len({image["file"] for image in images}),
        )
        .lstrip()
    )


def _beside(name: str) -> str:
    """A text file that lies beside this module."""
    return resources.files("sdd_lora.bench").joinpath(name).read_text("utf-8")


def read_images(folder: Path) -> list[dict[str, Any]]:
    """The lines of images.jsonl, none where it isn't there: published tables come without their
    pictures. Raises BadInput where one is damaged."""
    path = folder / IMAGES
    if not path.exists():
        say(f"{path}: no such file; the page comes without pictures")
        return []
    try:
        lines = path.read_text("utf-8").split("\n")  # prompts may hold U+2028, U+0085 …
        return [_ImageLine.model_validate_json(line).model_dump() for line in lines if line]
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    raise BadInput(
        f"{path}: expected a JSON object a line, one an image: {problem}; run evaluate again"
    )


def family(method: str) -> str:
    """Methods that belong together share a colour: sd, those that only draw differently, ours, …"""
    if method.startswith("esd"):
        return "esd"
    if method.startswith(("sdd", "stack", "baked")):
        return "sdd"
    return "sd" if method == "sd" else "drawing"


def best_that_keeps(results: Results) -> tuple[Row, Row] | None:
    """The row of the lowest rate of what is erased, among methods whose kept rate is at most
    TOLERATED_LOSS below that of `sd`; and the row of `sd`. None where none removes anything."""
    pair = _headline_pair(results)
    if pair is None:
        return None
    erased, kept = pair
    base, base_kept = (find(results.rows, "sd", name, ALL) for name in (erased, kept))
    if base is None or base_kept is None:
        return None
    candidates = []
    for method in results.method_names():
        removal, keeping = (find(results.rows, method, name, ALL) for name in (erased, kept))
        holds = keeping is not None and base_kept.value - keeping.value <= TOLERATED_LOSS + 1e-9
        if removal is not None and holds and removal.value < base.value:
            candidates.append(removal)
    return (min(candidates, key=lambda row: row.value), base) if candidates else None


def _headline_pair(results: Results) -> tuple[str, str] | None:
    """The first rate of what is erased (lower is better) and of what is kept (higher is better)."""
    found: dict[tuple[str, str], str] = {}
    for name in results.headline():
        info = results.info(name)
        if info.kind == "rate":
            found.setdefault((info.of, info.better), name)
    erased, kept = found.get(("erased", "lower")), found.get(("kept", "higher"))
    return (erased, kept) if erased and kept else None


def _scale(results: Results, measure: str) -> tuple[float, float]:
    """What the little intervals in the table span: 0 … 1 for rates, else all the intervals."""
    if results.info(measure).kind == "rate":
        return 0.0, 1.0
    rows = [row for row in results.rows if row.measure == measure and row.group == ALL]
    values = [v for row in rows for v in (row.value, *(row.ci95 or ()))]
    return min(values), max(*values, min(values) + 1e-9)


def _trade_off(results: Results) -> tuple[str, str, Chart] | None:
    """Erased against kept, a point a method."""
    pair = _headline_pair(results)
    if pair is None:
        return None
    spots = []
    for method in results.method_names():
        erased, kept = (find(results.rows, method, name, ALL) for name in pair)
        if erased and kept and erased.ci95 and kept.ci95:
            spots.append((method, kept.value, kept.ci95, erased.value, erased.ci95))
    return (*pair, scatter(spots)) if len(spots) > 1 else None


def _groups(rows: Sequence[Row], measure: str) -> list[str]:
    found = dict.fromkeys(row.group for row in rows if row.measure == measure)
    return [group for group in found if group != ALL]


def _variation(
    folder: Path, variation: Variation, results: Results, images: list[dict[str, Any]]
) -> dict[str, Any]:
    """A chart a measure where the setting is a number, else the settings for a table; pictures."""
    rows = [row for row in variation.rows if row.group == ALL]
    settings = list(dict.fromkeys(row.setting for row in rows))
    measures = list(dict.fromkeys(row.measure for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    charts = {}
    if len(settings) > 2 and not any(isinstance(setting, str) for setting in settings):
        charts = {name: _curves(rows, name) for name in measures}
    cells = {(row.method, row.measure, row.setting): row for row in rows}
    grids = {}
    for method in methods:
        own = [i for i in images if i["variation"] == variation.name and i["method"] == method]
        columns = [str(setting) for setting in settings]
        grids[method] = _grid(folder, results, own, columns, lambda i: str(i["setting"]), 2, 1)
    return {
        "name": variation.name, "field": variation.field, "settings": settings, "cells": cells,
        "measures": measures, "methods": methods, "charts": charts,
        "grids": {method: grid for method, grid in grids.items() if grid.strips},
    }  # fmt: skip


def _curves(rows: Sequence[Any], measure: str) -> Chart:
    series: dict[str, list[tuple[float, float, tuple[float, float]]]] = {}
    for row in sorted((r for r in rows if r.measure == measure), key=lambda r: r.setting):
        interval = row.ci95 or (row.value, row.value)
        series.setdefault(row.method, []).append((row.setting, row.value, interval))
    return curves(series)


def _main_grid(folder: Path, results: Results, images: list[dict[str, Any]]) -> Grid:
    main = [image for image in images if image["variation"] is None]
    methods = results.method_names()
    return _grid(folder, results, main, methods, lambda i: i["method"], _ERASED_SHOWN, _KEPT_SHOWN)


def _attack_grids(folder: Path, results: Results, images: list[dict[str, Any]]) -> dict[str, Grid]:
    """For each attacked method, the first prompts under each attack."""
    grids = {}
    own = [image for image in images if image["variation"] == ATTACKS]
    for method in dict.fromkeys(row.method for row in results.attacks):
        there = [image for image in own if image["method"] == method]
        columns = list(dict.fromkeys(image["setting"] for image in there))
        grid = _grid(folder, results, there, columns, lambda i: i["setting"], _ATTACKED_SHOWN, 0)
        names = [NAMES[name][0] if name in NAMES else name for name in columns]
        grids[method] = Grid(names, grid.strips)
    return {method: grid for method, grid in grids.items() if grid.strips}


def _grid(
    folder: Path, results: Results, images: list[dict[str, Any]], columns: list[str],
    column_of: Callable[[dict[str, Any]], str], erased_shown: int, kept_shown: int,
) -> Grid:  # fmt: skip
    """The first prompts of each set that every column has drawn with the same seed."""
    strips: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for image in images:
        strips.setdefault(key_of(image), {})[column_of(image)] = image
    shown: dict[tuple[str, str], int] = {}
    chosen = []
    for (kind, group, prompt, seed, *_), drawn in strips.items():
        limit = erased_shown if kind == "erased" else kept_shown
        if len(drawn) < len(columns) or shown.get((kind, group), 0) >= limit:
            continue
        shown[kind, group] = shown.get((kind, group), 0) + 1
        pictures = [_picture(folder, results, drawn[column], column) for column in columns]
        chosen.append(Strip(prompt, seed, group, pictures))
    return Grid(columns, chosen)


def _picture(folder: Path, results: Results, image: dict[str, Any], column: str) -> Picture:
    flags = {k: v for k, v in image["values"].items() if isinstance(v, bool)}
    said = "; ".join(f"{name}: {'yes' if value else 'no'}" for name, value in flags.items())
    if asked := image.get("asked"):
        said = f"asked: {asked}; {said}"
    drawn = any(there and results.info(name).better == "lower" for name, there in flags.items())
    return Picture(column, _data_uri(folder / image["file"]), said, drawn)


def _data_uri(path: Path) -> str:
    """A small picture as it is, a large one as a JPEG thumbnail."""
    with reading(path, DAMAGED_IMAGE), Image.open(path) as opened:
        small = max(opened.size) <= _SMALL
        opened.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = io.BytesIO()
        if small:
            opened.save(file, "PNG", optimize=True)
        else:
            opened.convert("RGB").save(file, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _moved(results: Results) -> dict[str, list[Moved]]:
    """For each method, the kept concepts that moved most, the worst first."""
    found: dict[str, list[Moved]] = {}
    for row in results.collateral:
        found.setdefault(row.method, []).append(row)
    return {
        method: sorted(rows, key=lambda row: row.change)[:_MOVED_SHOWN]
        for method, rows in found.items()
    }


def _signed(value: float, rate: bool) -> str:
    """With its sign; a rate in points."""
    text = f"{100 * value:+.1f}" if rate else f"{value:+.3g}"
    return text.replace("-", "−")
