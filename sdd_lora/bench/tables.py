"""From values of single images to rows with intervals, paired with `sd` on the same seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sdd_lora.attacks.settings import Attacks
from sdd_lora.bench.bench_file import ATTACK_VARIATION
from sdd_lora.bench.results import (
    ALL,
    AttackRow,
    ConceptShift,
    ImageRecord,
    Row,
    SettingRow,
    Variation,
)
from sdd_lora.measures.base import MeasureInfo
from sdd_lora.measures.intervals import (
    bootstrap_groups,
    bootstrap_maximum,
    bootstrap_mean,
    expected_maximum,
    paired_difference,
    wilson,
)

Records = Sequence[ImageRecord]
Info = Mapping[str, MeasureInfo]
#: groups of a kept image besides its set
Grouping = Callable[[ImageRecord], Sequence[str]]
Key = TypeVar("Key")
_PAIRED_WITH = "sd"


def rows(records: Records, info: Info, grouping: Grouping = lambda _: ()) -> list[Row]:
    """The main table: every method, measure and group."""
    main = _by([r for r in records if r.variation is None], lambda r: r.method)
    base = main.get(_PAIRED_WITH, [])
    return [row for own in main.values() for row in _measured_rows(own, base, info, grouping)]


def variations(records: Records, fields: Mapping[str, str], info: Info) -> list[Variation]:
    """The same for each variation and setting. Pairs are with `sd` under the same setting where it
    was drawn, else with the main table's. `fields` says what each variation varies."""
    default = [r for r in records if r.variation is None and r.method == _PAIRED_WITH]
    varied = _by(records, lambda r: r.variation)
    out = []
    for name, field in fields.items():
        cells = _by(varied.get(name, []), lambda r: (r.setting, r.method))
        found = [
            SettingRow.model_validate(row.model_dump() | {"setting": setting})
            for (setting, _), own in cells.items()
            for row in _measured_rows(own, cells.get((setting, _PAIRED_WITH), default), info)
        ]
        out.append(Variation(name=name, field=field, rows=found))
    return out


def attacks(
    records: Records,
    info: Info,
    costs: Mapping[tuple[str, str], tuple[float, float]],
    settings: Attacks | None = None,
) -> list[AttackRow]:
    """For each attack, method, and rate of what is erased: before and after on the same seeds.

    `costs` are seconds and UNet passes a prompt, of what (attack, method); `settings` say whom each
    attack is open to, and how strong it is.
    """
    chosen = settings.chosen if settings else {}
    cells = _by(
        [r for r in records if r.variation == ATTACK_VARIATION],
        lambda r: (str(r.setting), r.method),
    )
    rates = [
        name
        for name, i in info.items()
        if i.kind == "rate" and i.of != "kept" and i.better == "lower" and not i.maximum_of
    ]
    found = []
    for (attack, method), (seconds, passes) in costs.items():
        for measure in rates:
            pairs = _paired_values(cells["none", method], cells[attack, method], measure)
            if pairs:
                found.append(
                    AttackRow(
                        attack=attack,
                        method=method,
                        measure=measure,
                        **_rates_before_and_after(pairs),
                        ci95_before=wilson(sum(before for before, _ in pairs), len(pairs)),
                        ci95_after=wilson(sum(after for _, after in pairs), len(pairs)),
                        seconds=seconds,
                        unet_passes=passes,
                        access=chosen[attack].access if attack in chosen else "",
                        effort=chosen[attack].effort if attack in chosen else "",
                    )
                )
    return found


def concept_shifts(
    records: Records, info: Info, concept_of: Callable[[str, str], str | None]
) -> list[ConceptShift]:
    """For each method, how each kept concept moved against `sd`, the worst first. `concept_of`
    (measure, prompt) says which concept a measure looks for; None for other measures."""
    kept = [r for r in records if r.variation is None and r.kind == "kept"]
    base = [r for r in kept if r.method == _PAIRED_WITH]
    found = []
    for measure in info:
        cells: dict[tuple[str, str, str], list[ImageRecord]] = {}
        for r in kept:
            concept = concept_of(measure, r.prompt)
            if measure in r.values and r.method != _PAIRED_WITH and concept is not None:
                cells.setdefault((r.method, r.set, concept), []).append(r)
        for (method, group, concept), own in cells.items():
            if pairs := _paired_values(base, own, measure):
                rates = _rates_before_and_after(pairs)
                found.append(ConceptShift(method=method, concept=concept, group=group, **rates))
    return sorted(found, key=lambda row: row.change)


def _paired_values(before: Records, after: Records, measure: str) -> list[tuple[Any, Any]]:
    """A measure's values of the images of `after`, each with that of the same key in `before`."""
    there = {r.key: r.values[measure] for r in before if measure in r.values}
    return [
        (there[r.key], r.values[measure]) for r in after if r.key in there and measure in r.values
    ]


def _rates_before_and_after(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Rates before and after, and the paired difference."""
    before, after = zip(*pairs, strict=True)
    n = len(pairs)
    change, low, high = paired_difference(before, after)
    rates = {"before": sum(before) / n, "after": sum(after) / n}
    return rates | {"change": change, "ci95_change": (low, high), "n": n}


def _measured_rows(
    own: Records, base: Records, info: Info, grouping: Grouping = lambda _: ()
) -> Iterable[Row]:
    """The rows of a method's images."""
    for measure, told in info.items():
        counted = [r for r in own if (told.maximum_of or measure) in r.values]
        sets = list(dict.fromkeys(r.set for r in counted))
        categories = sorted({name for r in counted for name in r.groups[1:]})
        further = {name for r in counted for name in grouping(r)} if told.of == "kept" else set()
        further = further if len(further) > 1 else set()
        for group in [ALL, *(sets if len(sets) > 1 else []), *categories, *sorted(further)]:
            chosen = [r for r in counted if group in (ALL, *r.groups, *grouping(r))]
            if group == ALL and told.of == "all":  # not diluted by what is kept
                chosen = [r for r in chosen if r.kind == "erased"] or chosen
            if told.maximum_of:
                if group != ALL or len(sets) == 1:
                    yield from _maximum_row(measure, group, chosen, told.maximum_of)
            elif chosen:
                yield _measured_row(measure, group, chosen, base, told.kind)


def _maximum_row(measure: str, group: str, chosen: Records, of: str) -> Iterable[Row]:
    """The expected maximum of a rate over prompts, of one set; `n` is the number of prompts. None
    where a prompt has a single image: its rate is 0 or 1, and the maximum soon 1."""
    prompts = list(_by(chosen, lambda r: r.prompt).values())
    rates = [sum(r.values[of] for r in part) / len(part) for part in prompts]
    if min(map(len, prompts)) > 1:
        yield Row(
            method=chosen[0].method,
            measure=measure,
            group=group,
            n=len(rates),
            value=expected_maximum(rates),
            ci95=bootstrap_maximum(rates),
        )


def _measured_row(measure: str, group: str, chosen: Records, base: Records, kind: str) -> Row:
    """A rate, mean or total of images; its difference to `sd` where every image has its pair."""
    values = [r.values[measure] for r in chosen]
    trainings = _by(chosen, lambda r: r.training)
    n, scale = len(values), len(values) if kind == "total" else 1
    if len(trainings) > 1:
        own = [[r.values[measure] for r in part] for part in trainings.values()]
        interval = _scaled(bootstrap_groups(own), scale)
    elif kind == "rate":
        interval = wilson(int(sum(values)), n)
    else:
        interval = _scaled(bootstrap_mean(values), scale)
    row = Row(
        method=chosen[0].method,
        measure=measure,
        group=group,
        value=sum(values) / n * scale,
        ci95=interval,
        n=n,
    )
    pairs = _paired_values(base, chosen, measure)
    if row.method == _PAIRED_WITH or len(pairs) < n:
        return row
    if len(trainings) > 1:
        change = sum(after - before for before, after in pairs) / n * scale
        moved = [[b - a for a, b in _paired_values(base, p, measure)] for p in trainings.values()]
        interval = _scaled(bootstrap_groups(moved), scale)
    elif kind == "rate":
        change, *bounds = paired_difference(*map(list, zip(*pairs, strict=True)))
        interval = (bounds[0], bounds[1])
    else:
        differences = [after - before for before, after in pairs]
        change = sum(differences) / n * scale
        interval = _scaled(bootstrap_mean(differences), scale)
    return row.model_copy(update={"difference": change, "ci95_difference": interval})


def _scaled(interval: tuple[float, float], scale: int) -> tuple[float, float]:
    return interval[0] * scale, interval[1] * scale


def _by(
    items: Iterable[ImageRecord], key: Callable[[ImageRecord], Key]
) -> dict[Key, list[ImageRecord]]:
    found: dict[Key, list[ImageRecord]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
