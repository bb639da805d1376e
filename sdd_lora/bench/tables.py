"""From values of single images to rows with intervals, paired with `sd` on the same seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sdd_lora.bench.bench_file import ATTACKS
from sdd_lora.bench.results import ALL, AttackRow, Moved, Row, SettingRow, Variation
from sdd_lora.io.jsonl import key_of
from sdd_lora.measures.base import MeasureInfo
from sdd_lora.measures.intervals import (
    bootstrap_maximum,
    bootstrap_mean,
    expected_maximum,
    paired_difference,
    wilson,
)

#: one line of images.jsonl
Line = dict[str, Any]
Info = dict[str, MeasureInfo]
_PAIRED_WITH = "sd"


def rows(lines: Sequence[Line], info: Info) -> list[Row]:
    """The main table: every method, measure and group."""
    main = [line for line in lines if line["variation"] is None]
    found = _by(main, lambda line: line["method"])
    base = found.get(_PAIRED_WITH, [])
    return [Row(**row) for method, own in found.items() for row in _rows(method, own, base, info)]


def variations(lines: Sequence[Line], fields: Mapping[str, str], info: Info) -> list[Variation]:
    """The same for each variation and setting. Pairs are with `sd` under the same setting where it
    was drawn, else with the main table's. `fields` says what each variation varies."""
    usual = [x for x in lines if x["variation"] is None and x["method"] == _PAIRED_WITH]
    varied = _by(lines, lambda line: line["variation"])
    out = []
    for name, field in fields.items():
        cells = _by(varied.get(name, []), lambda line: (line["setting"], line["method"]))
        found = [
            SettingRow(**row, setting=setting)
            for (setting, method), own in cells.items()
            for row in _rows(method, own, cells.get((setting, _PAIRED_WITH), usual), info)
        ]
        out.append(Variation(name=name, field=field, rows=found))
    return out


def attacks(
    lines: Sequence[Line], info: Info, costs: Mapping[tuple[str, str], tuple[float, float]]
) -> list[AttackRow]:
    """For each attack, method, and rate of what is erased: before and after on the same seeds.

    `costs` are seconds and UNet passes a prompt, of what (attack, method).
    """
    cells = _by(
        [line for line in lines if line["variation"] == ATTACKS],
        lambda line: (line["setting"], line["method"]),
    )
    rates = [
        name for name, i in info.items()
        if i.kind == "rate" and i.of != "kept" and i.better == "lower" and not i.maximum_of
    ]  # fmt: skip
    out = []
    for (attack, method), (seconds, passes) in costs.items():
        for measure in rates:
            there = {key_of(x): x["values"] for x in cells["none", method]}
            own = [x for x in cells[attack, method] if measure in x["values"]]
            before = [there[key_of(x)][measure] for x in own]
            after = [x["values"][measure] for x in own]
            n = len(own)
            if not n:
                continue
            change, low, high = paired_difference(before, after)
            out.append(
                AttackRow(
                    attack=attack, method=method, measure=measure, n=n,
                    before=sum(before) / n, ci95_before=wilson(sum(before), n),
                    after=sum(after) / n, ci95_after=wilson(sum(after), n),
                    change=change, ci95_change=(low, high), seconds=seconds, unet_passes=passes,
                )
            )  # fmt: skip
    return out


def collateral(lines: Sequence[Line], named_by: Mapping[str, Callable[[str], str]]) -> list[Moved]:
    """For each method, how each kept concept moved against `sd`, the worst first. `named_by`:
    measure → the concept of which it says whether a prompt's image shows it."""
    moved = [row for measure, name in named_by.items() for row in _moved(lines, measure, name)]
    return sorted(moved, key=lambda row: row.change)


def _moved(
    lines: Sequence[Line], measure: str, concept_of: Callable[[str], str]
) -> Iterable[Moved]:
    kept = [
        line for line in lines
        if line["variation"] is None and line["kind"] == "kept" and measure in line["values"]
    ]  # fmt: skip
    base = {
        key_of(line): line["values"][measure] for line in kept if line["method"] == _PAIRED_WITH
    }
    for (method, group, concept), own in _by(
        kept, lambda line: (line["method"], line["set"], concept_of(line["prompt"]))
    ).items():
        pairs = [(base[key_of(x)], x["values"][measure]) for x in own if key_of(x) in base]
        if method == _PAIRED_WITH or not pairs:
            continue
        before, after = [b for b, _ in pairs], [a for _, a in pairs]
        change, low, high = paired_difference(before, after)
        n = len(pairs)
        yield Moved(
            method=method, concept=concept, group=group, before=sum(before) / n,
            after=sum(after) / n, change=change, ci95_change=(low, high), n=n,
        )  # fmt: skip


def _rows(
    method: str, own: Sequence[Line], base: Sequence[Line], info: Info
) -> Iterable[dict[str, Any]]:
    for measure in info:
        of = info[measure].maximum_of
        counted = [line for line in own if (of or measure) in line["values"]]
        sets = list(dict.fromkeys(line["set"] for line in counted))
        categories = sorted({name for line in counted for name in _categories(line)})
        for group in [ALL, *(sets if len(sets) > 1 else []), *categories]:
            chosen = [x for x in counted if group in (ALL, x["set"], *_categories(x))]
            if group == ALL and info[measure].of == "all":  # not diluted by what is kept
                chosen = [x for x in chosen if x["kind"] == "erased"] or chosen
            if of and (group != ALL or len(sets) == 1):
                yield from _maximum_row(method, measure, group, chosen, of)
            elif chosen and not of:
                yield _row(method, measure, group, chosen, base, info[measure].kind == "rate")


def _categories(line: Line) -> list[str]:
    """The groups within its set that a line counts for: those of I2P overlap."""
    return [f"{line['set']}: {name}" for name in line.get("categories", ())]


def _maximum_row(
    method: str, measure: str, group: str, chosen: Sequence[Line], of: str
) -> Iterable[dict[str, Any]]:
    """The expected maximum of a rate over prompts, of one set; `n` is the number of prompts. None
    where a prompt has a single image: its rate is 0 or 1, and the maximum soon 1."""
    prompts = _by(chosen, lambda line: line["prompt"])
    rates = [sum(x["values"][of] for x in lines) / len(lines) for lines in prompts.values()]
    if min(map(len, prompts.values())) > 1:
        yield {
            "method": method, "measure": measure, "group": group, "n": len(rates),
            "value": expected_maximum(rates), "ci95": bootstrap_maximum(rates),
        }  # fmt: skip


def _row(
    method: str, measure: str, group: str, chosen: Sequence[Line], base: Sequence[Line], rate: bool
) -> dict[str, Any]:
    values = [line["values"][measure] for line in chosen]
    n = len(values)
    row: dict[str, Any] = {"method": method, "measure": measure, "group": group, "n": n}
    row |= {"value": sum(values) / n, "ci95": wilson(sum(values), n) if rate else
            bootstrap_mean(values)}  # fmt: skip
    there = {key_of(line): line["values"][measure] for line in base if measure in line["values"]}
    pairs = [(there[k], v) for k, v in zip(map(key_of, chosen), values, strict=True) if k in there]
    if method == _PAIRED_WITH or len(pairs) < n:
        return row
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    if rate:
        change, *bounds = paired_difference(before, after)
    else:
        differences = [a - b for b, a in pairs]
        change, bounds = sum(differences) / n, list(bootstrap_mean(differences))
    return row | {"difference": change, "ci95_difference": tuple(bounds)}


def _by(lines: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found
