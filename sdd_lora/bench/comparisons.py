"""Tables of a bench besides the main one, as numbers: robustness and attacks, methods across."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdd_lora.adapter.metrics import Interval
from sdd_lora.attacks.settings import titled
from sdd_lora.bench.results import ALL, AttackRow, Results, Variation


@dataclass(frozen=True)
class RateEstimate:
    """A rate with its 95 % interval."""

    value: float
    ci95: Interval


@dataclass(frozen=True)
class Effort:
    """What an attack takes: whom it is open to, how strong it is (both empty in older results), how
    many prompts it was put to; seconds and UNet passes a prompt."""

    access: str
    strength: str
    prompts: int
    seconds: float
    unet_passes: float


@dataclass(frozen=True)
class Comparison:
    """A rate of what is erased: conditions down, `methods` across, None where there is no number.

    `efforts` are those of the rows that are attacks.
    """

    measure: str
    title: str
    methods: list[str]
    rows: Mapping[str, list[RateEstimate | None]]
    efforts: Mapping[str, Effort] = field(default_factory=dict)

    @property
    def says_strength(self) -> bool:
        """Whether its attacks say whom they are open to and how strong they are."""
        return any(effort.access for effort in self.efforts.values())


def robustness(results: Results) -> Iterator[Comparison]:
    """Does it hold elsewhere? For each rate of what is erased: samplers, guidance, other models and
    whatever else was varied but adapters themselves: their weights, or how far they are trained."""
    own = ("weight", "snapshot")
    varied = [(v, row) for v in results.variations if v.field not in own for row in v.rows]
    varied = [(v, row) for v, row in varied if row.group == ALL]
    methods = list(dict.fromkeys(row.method for _, row in varied))
    for measure in dict.fromkeys(row.measure for _, row in varied):
        info = results.info(measure)
        if info.kind != "rate" or info.of == "kept" or info.better != "lower":
            continue
        found: dict[str, dict[str, RateEstimate]] = {}
        for v, row in varied:
            if row.measure == measure and row.ci95:
                condition = found.setdefault(f"{v.name}: {setting_names(v)[row.setting]}", {})
                condition[row.method] = RateEstimate(row.value, row.ci95)
        rows = {where: [rates.get(m) for m in methods] for where, rates in found.items()}
        yield Comparison(measure, "does it hold elsewhere", methods, rows)


def attack_comparisons(results: Results) -> Iterator[Comparison]:
    """For each measure: attacks down, with what they cost; no number where a method can't be
    attacked in that way."""
    methods = list(dict.fromkeys(row.method for row in results.attacks))
    for measure in dict.fromkeys(row.measure for row in results.attacks):
        own = {(r.attack, r.method): r for r in results.attacks if r.measure == measure}
        widest = {row.method: row for row in sorted(own.values(), key=lambda row: row.n)}
        plain = [widest.get(method) for method in methods]
        rows = {"none": [RateEstimate(r.before, r.ci95_before) if r else None for r in plain]}
        efforts = {}
        for attack in dict.fromkeys(attack for attack, _ in own):
            found = [own.get((attack, method)) for method in methods]
            rows[titled(attack)] = [
                RateEstimate(r.after, r.ci95_after) if r else None for r in found
            ]
            efforts[titled(attack)] = _effort([row for row in found if row])
        prompts = max(row.n for row in own.values())
        yield Comparison(measure, f"attack, {prompts} prompts", methods, rows, efforts)


def _effort(rows: Sequence[AttackRow]) -> Effort:
    """Of an attack on several methods; the costs are means."""
    count = len(rows)
    seconds, passes = sum(r.seconds for r in rows) / count, sum(r.unet_passes for r in rows) / count
    return Effort(rows[0].access, rows[0].effort, rows[0].n, seconds, passes)


def setting_names(variation: Variation) -> dict[float | str, str]:
    """How each setting is written: 3.0 → 3; adapters' files without their folders, where that tells
    them apart."""
    settings = {row.setting for row in variation.rows}
    written = {s: s if isinstance(s, str) else f"{s:g}" for s in settings}
    stems = {s: Path(text).stem for s, text in written.items()}
    tells_apart = len(set(stems.values())) == len(stems)
    return stems if variation.field == "beside" and tells_apart else written
