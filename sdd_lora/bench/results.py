"""What a bench found: `results.json`, and the same as CSV and Markdown."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from sdd_lora.attacks.settings import NAMES
from sdd_lora.errors import BadInput
from sdd_lora.measures.base import Interval, MeasureInfo, _Part

RESULTS, IMAGES, BENCH = "results.json", "images.jsonl", "bench.yaml"
DAMAGED_IMAGE = "can't read this image; delete it and run evaluate again, which draws it anew"


#: the group of a row that counts all of a measure's images
ALL = "all"
#: why a cell of an attack's row is empty
NOT_ATTACKED = (
    "not attacked in this way: the method changes how pictures are drawn, not the UNet's weights, "
    "so that no gradient leads through it"
)


class Row(_Part):
    """One number: a rate (fraction of `n` images) or a mean of `n` values, with its 95 % interval.

    `difference` is to `sd` on the same seeds. Both intervals are missing where a measure has none.
    """

    method: str
    measure: str
    group: str
    value: float
    ci95: Interval | None
    n: int
    difference: float | None = None
    ci95_difference: Interval | None = None


class SettingRow(Row):
    """A row of a variation: drawn with another `setting`, compared with `sd` under the same one."""

    setting: float | str


class Variation(_Part):
    """The same measures while one field of the sampling varies."""

    name: str
    field: str
    rows: list[SettingRow]


class AttackRow(_Part):
    """A rate of what is erased, of a method, without (`before`) and under an attack (`after`): `n`
    prompts, the same seeds. The cost is of finding what to ask, and a prompt's: seconds, and
    samples forward through a UNet (those of gradients go backward too)."""

    attack: str
    method: str
    measure: str
    before: float
    ci95_before: Interval
    after: float
    ci95_after: Interval
    change: float
    ci95_change: Interval
    n: int
    seconds: float
    unet_passes: float


class Moved(_Part):
    """A kept concept under a method: the rate at which it is drawn, without (`before`) and with."""

    method: str
    concept: str
    group: str
    before: float
    after: float
    change: float
    ci95_change: Interval
    n: int


class Interference(_Part):
    """Cosines between the adapters' changes, (n, n)."""

    names: list[str]
    cosine: list[list[float]]

    @model_validator(mode="after")
    def _is_square(self) -> "Interference":
        sides = {len(self.names), len(self.cosine), *map(len, self.cosine)}
        if len(sides) > 1:
            raise ValueError("expected as many rows, and columns, as names")
        return self


class Results(_Part):
    """All of `results.json`. `methods` says for each row what drew it: recipe, adapters, training;
    `sources` for each measure whose weights, or which package, made its numbers; `missing` which
    measures could not be taken, and why."""

    bench: str
    model: str
    date: str
    command: str
    versions: dict[str, str]
    rows: list[Row]
    concepts: list[str] = []
    sampling: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    measures: dict[str, MeasureInfo] = {}
    sources: dict[str, str] = {}
    variations: list[Variation] = []
    attacks: list[AttackRow] = []
    collateral: list[Moved] = []
    interference: Interference | None = None
    missing: list[str] = []

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read a bench's results. Raises BadInput where they are missing or broken."""
        path = folder / RESULTS
        try:
            return cls.model_validate_json(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"{path}: expected the results of `sdd-lora evaluate`, can't read them: {error}"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise BadInput(
                f"{path}: damaged, or of another version: {name}: {first['msg']}"
            ) from None

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """Every row, those of variations and attacks too, a line each."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(
            ["method", "measure", "group", "variation", "setting", "value", "ci95_low",
             "ci95_high", "n", "difference", "difference_low", "difference_high"]
        )  # fmt: skip
        varied = [(v.name, row.setting, row) for v in self.variations for row in v.rows]
        for variation, setting, row in [*(("", "", row) for row in self.rows), *varied]:
            low, high = row.ci95 or ("", "")
            below, above = row.ci95_difference or ("", "")
            change = "" if row.difference is None else row.difference
            lines.writerow(
                [row.method, row.measure, row.group, variation, setting, row.value, low, high,
                 row.n, change, below, above]
            )  # fmt: skip
        for found in self.attacks:
            lines.writerow(
                [found.method, found.measure, ALL, "attacks", found.attack, found.after,
                 *found.ci95_after, found.n, found.change, *found.ci95_change]
            )  # fmt: skip
        return text.getvalue()

    def to_markdown(self) -> str:
        """Methods down, measures across, over all images; 95 % intervals in brackets. Below it, for
        each rate of what is erased, other conditions, and attacks, down and methods across."""
        measures = self.headline()
        heads = ["method", *(self.heading(name) for name in measures)]
        rows = [[m, *(self.cell(m, name) for name in measures)] for m in self.method_names()]
        elsewhere = [_markdown(*found) for found in self.elsewhere_tables()]
        attacks = [_markdown(*found) for found in self.attack_tables()]
        notes = [f"–: {NOT_ATTACKED}\n"] if attacks else []
        notes += [f"Not measured: {line}\n" for line in self.missing]
        return "\n".join([_markdown(heads, rows), *elsewhere, *attacks, *notes])

    def elsewhere_tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        """For each rate of what is erased, heads and rows: samplers, guidance, other models and
        whatever else was varied, but adapters' weights, down; methods across. – where a method was
        not drawn so."""
        varied = [(v, row) for v in self.variations if v.field != "weight" for row in v.rows]
        varied = [(v, row) for v, row in varied if row.group == ALL]
        methods = list(dict.fromkeys(row.method for _, row in varied))
        for measure in dict.fromkeys(row.measure for _, row in varied):
            info = self.info(measure)
            if info.kind != "rate" or info.of == "kept" or info.better != "lower":
                continue
            rates: dict[str, dict[str, str]] = {}
            for v, row in varied:
                if row.measure == measure and row.ci95:
                    told = rates.setdefault(f"{v.name}: {_short(v)[row.setting]}", {})
                    told[row.method] = _rate(row.value, row.ci95)
            yield (
                [f"does it hold elsewhere: {self.heading(measure)}", *methods],
                [[where, *(told.get(m, "–") for m in methods)] for where, told in rates.items()],
            )

    def attack_tables(self) -> Iterator[tuple[list[str], list[list[str]]]]:
        """For each measure, heads and rows: attacks down, methods across, their cost beside. Where
        a method can't be attacked in that way, –."""
        methods = list(dict.fromkeys(row.method for row in self.attacks))
        for measure in dict.fromkeys(row.measure for row in self.attacks):
            own = {(r.attack, r.method): r for r in self.attacks if r.measure == measure}
            first = {row.method: row for row in reversed(own.values())}
            plain = [first.get(method) for method in methods]
            rates = [_rate(row.before, row.ci95_before) if row else "–" for row in plain]
            rows = [["none", *rates, "–", "–"]]
            for attack in dict.fromkeys(attack for attack, _ in own):
                found = [own.get((attack, method)) for method in methods]
                there = [row for row in found if row]
                cost = [sum(r.seconds for r in there), sum(r.unet_passes for r in there)]
                rates = [_rate(row.after, row.ci95_after) if row else "–" for row in found]
                seconds, passes = (total / len(there) for total in cost)
                rows.append(
                    [NAMES.get(attack, (attack,))[0], *rates, f"{seconds:.1f}", f"{passes:,.0f}"]
                )
            prompts = max(row.n for row in own.values())
            yield (
                [f"attack, {prompts} prompts: {self.heading(measure)}", *methods,
                 "seconds a prompt", "UNet passes a prompt"], rows,
            )  # fmt: skip

    def heading(self, measure: str) -> str:
        """The measure, its unit, and which way is better."""
        info = self.info(measure)
        unit = " %" if info.kind == "rate" else ""
        return f"{measure}{unit}{_ARROWS[info.better]}"

    def cell(self, method: str, measure: str) -> str:
        """The number over all images, with its interval in brackets."""
        row = find(self.rows, method, measure, ALL)
        if row is None:
            return "–"
        number = percent if self.info(measure).kind == "rate" else plain
        if row.ci95 is None:
            return number(row.value)
        return f"{number(row.value)} ({number(row.ci95[0])}–{number(row.ci95[1])})"

    def info(self, measure: str) -> MeasureInfo:
        return self.measures.get(measure, MeasureInfo(kind="mean", of="all", better="neither"))

    def headline(self) -> list[str]:
        """Measures that have a row over all images, in order of appearance."""
        return list(dict.fromkeys(row.measure for row in self.rows if row.group == ALL))

    def measure_names(self) -> list[str]:
        return list(dict.fromkeys(row.measure for row in self.rows))

    def method_names(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows))


_ARROWS = {"lower": " ↓", "higher": " ↑", "neither": ""}


def _rate(value: float, interval: Interval) -> str:
    return f"{percent(value)} ({percent(interval[0])}–{percent(interval[1])})"


def _short(variation: Variation) -> dict[float | str, str]:
    """How each setting is told: 3.0 → 3; adapters' files without their folders, where that tells
    them apart."""
    settings = {row.setting for row in variation.rows}
    told = {s: s if isinstance(s, str) else f"{s:g}" for s in settings}
    stems = {s: Path(text).stem for s, text in told.items()}
    tells_apart = len(set(stems.values())) == len(stems)
    return stems if variation.field == "beside" and tells_apart else told


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in [heads, *rows]]
    head, *body = [f"| {' | '.join(cells)} |\n" for cells in lines]
    return f"{head}{'|---' * len(heads)}|\n{''.join(body)}"


def find(rows: Sequence[Row], method: str, measure: str, group: str) -> Row | None:
    """The row of these three, if there is one."""
    wanted = (method, measure, group)
    return next((r for r in rows if (r.method, r.measure, r.group) == wanted), None)


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def plain(value: float) -> str:
    return f"{value:.4g}"
