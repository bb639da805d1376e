"""A bench's results as one HTML file that needs nothing else: no network, no script."""

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdd_lora.attacks.settings import ATTACK_KINDS
from sdd_lora.bench import text
from sdd_lora.bench.charts import Chart, Spot, curves, scatter
from sdd_lora.bench.comparisons import attack_comparisons, robustness, setting_names
from sdd_lora.bench.pictures import PictureGrids
from sdd_lora.bench.results import (
    ALL,
    BENCH,
    ConceptShift,
    Results,
    Row,
    SettingRow,
    Variation,
    find_row,
    pair_of,
)
from sdd_lora.measures.intervals import wilson

REPORT = "report.html"
#: points of a kept rate that a method may lose and still count as keeping
TOLERATED_LOSS = 0.03
#: a rate of fewer images has an interval of 20 points and more
FEW_IMAGES = 60
_SHIFTS_SHOWN = 12


def render_report(folder: Path) -> str:
    """The HTML of the bench in `folder`, from its results.json, images.jsonl and images.

    Raises BadInput where they are missing or damaged.
    """
    from jinja2 import Environment, StrictUndefined

    results = Results.load(folder)
    pictures = PictureGrids(folder, results)
    best = best_that_keeps(results)
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    bench_file = folder / BENCH
    page = environment.from_string(_read_beside("report.html.jinja")).render(
        results=results,
        style=_read_beside("report.css"),
        text=text,
        ALL=ALL,
        find=find_row,
        family=family,
        scales={name: _scale_of(results, name) for name in results.headline()},
        counts={name: results.image_counts(name) for name in results.headline()},
        few=FEW_IMAGES,
        fewest=fewest_images(results),
        best=best,
        headline=headline_pair(results),
        trade=_trade_off_chart(results),
        choice_chart=_choice_chart(results),
        curve_field=curve_field(results),
        groups={name: _groups(results.rows, name) for name in results.measure_names()},
        main_grid=pictures.main(["sd", best[0].method] if best else ["sd"])
        if "sd" in results.method_names()
        else pictures.main([]),
        variations=[
            _variation(v, results) | {"grids": pictures.varied(v)} for v in results.variations
        ],
        robustness=list(robustness(results)),
        attacks=list(attack_comparisons(results)),
        attack_notes=_attack_notes(results),
        attack_grids=pictures.attacked(),
        shifts=_worst_shifts(results),
        bench_text=bench_file.read_text("utf-8", "replace") if bench_file.is_file() else "",
        image_count=pictures.count,
    )
    return page.lstrip()


def _attack_notes(results: Results) -> list[tuple[str, str]]:
    """Title of each kind of attack, and what it does."""
    names = dict.fromkeys(row.attack.partition(" ")[0] for row in results.attacks)
    return [
        (ATTACK_KINDS[name].title, ATTACK_KINDS[name].note)
        for name in names
        if name in ATTACK_KINDS
    ]


def _read_beside(name: str) -> str:
    """A text file that lies beside this module."""
    return resources.files("sdd_lora.bench").joinpath(name).read_text("utf-8")


def family(method: str) -> str:
    """Methods that belong together share a colour: sd, those that only draw differently, ours, …"""
    if method.startswith(("esd", "uce", "leco")):
        return "esd"
    if method.startswith(("sdd", "closed-form", "words", "stack", "baked")):
        return "sdd"
    return "sd" if method == "sd" else "drawing"


def best_that_keeps(results: Results) -> tuple[Row, Row] | None:
    """The row of the lowest rate of what is erased, among methods whose kept rate is at most
    TOLERATED_LOSS below that of `sd`; and the row of `sd`. None where none removes anything."""
    pair = headline_pair(results)
    if pair is None:
        return None
    erased, kept = pair
    base, base_kept = (find_row(results.rows, "sd", name, ALL) for name in (erased, kept))
    if base is None or base_kept is None:
        return None
    candidates = []
    for method in results.method_names():
        removal, keeping = (find_row(results.rows, method, name, ALL) for name in (erased, kept))
        holds = keeping is not None and base_kept.value - keeping.value <= TOLERATED_LOSS + 1e-9
        if removal is not None and holds and removal.value < base.value:
            candidates.append(removal)
    return (min(candidates, key=lambda row: row.value), base) if candidates else None


def headline_pair(results: Results) -> tuple[str, str] | None:
    """The rates of the figure: of what is erased, and of what is kept."""
    return pair_of({name: results.info(name) for name in results.headline()})


def fewest_images(results: Results) -> int:
    """The fewest images that a headline rate of what is erased or kept counts."""
    names = headline_pair(results) or results.headline()
    return min((n for name in names for n in results.image_counts(name)), default=0)


def _scale_of(results: Results, measure: str) -> tuple[float, float]:
    """What the little intervals in the table span: 0 … 1 for rates, else all the intervals."""
    if results.info(measure).kind == "rate":
        return 0.0, 1.0
    rows = [row for row in results.rows if row.measure == measure and row.group == ALL]
    values = [v for row in rows for v in (row.value, *(row.ci95 or ()))]
    return min(values), max(*values, min(values) + 1e-9)


def _trade_off_chart(results: Results) -> tuple[str, str, Chart] | None:
    """Erased against kept: a point a method, and a curve over its training where snapshots were
    drawn, else over the weight where that was varied."""
    pair = headline_pair(results)
    if pair is None:
        return None
    spots = [
        spot
        for method in results.method_names()
        if (spot := _spot(method, *(find_row(results.rows, method, name, ALL) for name in pair)))
    ]
    curves_of: dict[str, list[tuple[float, float]]] = {}
    for variation in results.variations:
        if variation.field == curve_field(results):
            curves_of |= _settings_curves(variation, pair)
    return (*pair, scatter(spots, curves_of)) if len(spots) > 1 else None


def _choice_chart(results: Results) -> Chart | None:
    """Each training on the prompts that its snapshot was chosen by; the chosen one is a point."""
    chosen = [row for row in results.choices if row.chosen]
    spots, paths = [], {}
    for row in chosen:
        drawn, kept = (
            wilson(round(rate * n), n) for rate, n in zip((row.drawn, row.kept), row.n, strict=True)
        )
        spots.append((row.method, row.kept, kept, row.drawn, drawn))
        own = [r for r in results.choices if r.method == row.method]
        paths[row.method] = [(r.kept, r.drawn) for r in own]
    return scatter(spots, paths) if spots and headline_pair(results) else None


def _spot(label: str, erased: Row | None, kept: Row | None) -> Spot | None:
    if erased is None or kept is None or erased.ci95 is None or kept.ci95 is None:
        return None
    return label, kept.value, kept.ci95, erased.value, erased.ci95


def curve_field(results: Results) -> str:
    """What the figure's curves go over: the training's snapshots, or the adapters' weight."""
    fields = {variation.field for variation in results.variations}
    return "snapshot" if "snapshot" in fields else "weight"


def _settings_curves(
    variation: Variation, pair: tuple[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """For each method, (kept, erased) by rising setting."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for row in variation.rows:
        if row.group == ALL and row.measure in pair and not isinstance(row.setting, str):
            place = found.setdefault(row.method, {}).setdefault(row.setting, {})
            place[row.measure] = row.value
    erased, kept = pair
    return {
        method: [
            (values[kept], values[erased])
            for _, values in sorted(by_setting.items())
            if len(values) == len(pair)
        ]
        for method, by_setting in found.items()
    }


def _groups(rows: Sequence[Row], measure: str) -> list[str]:
    found = dict.fromkeys(row.group for row in rows if row.measure == measure)
    return [group for group in found if group != ALL]


def _variation(variation: Variation, results: Results) -> dict[str, Any]:
    """A chart a measure where the setting is a number, else the settings for a table."""
    rows = [row for row in variation.rows if row.group == ALL]
    settings = list(dict.fromkeys(row.setting for row in rows))
    measures = list(dict.fromkeys(row.measure for row in rows))
    charts = {}
    along = variation.field == "snapshot"

    def place(row: SettingRow) -> float:
        return _passes_at(results, row) if along else float(row.setting)

    if len(settings) > 2 and not any(isinstance(setting, str) for setting in settings):
        charts = {name: _curves(rows, name, place) for name in measures}
    return {
        "name": variation.name,
        "field": variation.field,
        "axis": "UNet passes" if along else variation.field,
        "settings": settings,
        "setting_names": setting_names(variation),
        "cells": {(row.method, row.measure, row.setting): row for row in rows},
        "measures": measures,
        "methods": list(dict.fromkeys(row.method for row in rows)),
        "charts": charts,
    }


def _passes_at(results: Results, row: SettingRow) -> float:
    """The UNet passes that a row's method had taken at its snapshot; iterations where its run
    doesn't tell."""
    told = results.methods.get(row.method, {})
    spent = {s["iteration"]: s["unet_passes"] for s in told.get("snapshots", [])}
    if training := told.get("training"):
        spent[training["iterations"]] = training["unet_passes"]
    return float(spent.get(row.setting, row.setting))


def _curves(
    rows: Sequence[SettingRow], measure: str, place: Callable[[SettingRow], float]
) -> Chart:
    series: dict[str, list[tuple[float, float, tuple[float, float]]]] = {}
    own = [row for row in rows if row.measure == measure]
    for row in sorted(own, key=lambda row: row.setting):
        interval = row.ci95 or (row.value, row.value)
        series.setdefault(row.method, []).append((place(row), row.value, interval))
    return curves(series)


def _worst_shifts(results: Results) -> dict[str, list[ConceptShift]]:
    """For each method, the kept concepts that moved most, the worst first."""
    found: dict[str, list[ConceptShift]] = {}
    for row in results.collateral:
        found.setdefault(row.method, []).append(row)
    return {
        method: sorted(rows, key=lambda row: row.change)[:_SHIFTS_SHOWN]
        for method, rows in found.items()
    }
