"""Numbers as text: a bench's results as CSV and Markdown, and the cells of all its tables."""

import csv
import io
from collections.abc import Iterator, Sequence

from sdd_lora.bench.comparisons import Comparison, RateEstimate, attack_comparisons, robustness
from sdd_lora.bench.results import ALL, Results, find_row
from sdd_lora.measures.base import MeasureInfo

#: any rate, for numbers that are of no measure of a table
RATE = MeasureInfo(kind="rate", of="all", better="neither")
#: why a cell of an attack's row is empty
NOT_ATTACKED = (
    "not attacked in this way: the method has nothing that the attack changes, or it changes how "
    "pictures are drawn, not the UNet's weights, so that no gradient leads through it"
)
MISSING = "–"
_ARROWS = {"lower": " ↓", "higher": " ↑", "neither": ""}
_CSV_HEADS = [
    "method",
    "measure",
    "group",
    "variation",
    "setting",
    "value",
    "ci95_low",
    "ci95_high",
]
_CSV_HEADS += ["n", "difference", "difference_low", "difference_high"]
Table = tuple[list[str], list[list[str]]]


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def plain(value: float) -> str:
    return f"{value:.4g}"


def number(info: MeasureInfo, value: float) -> str:
    """A value of a measure: a rate in %, a total as a whole number, a mean as it is."""
    if info.kind == "total":
        return f"{value:,.0f}"
    return percent(value) if info.kind == "rate" else plain(value)


def signed(info: MeasureInfo, value: float) -> str:
    """A difference, with its sign; a rate's in points."""
    text = f"{100 * value:+.1f}" if info.kind == "rate" else f"{value:+.3g}"
    return text.replace("-", "−")


def heading(results: Results, measure: str) -> str:
    """The measure, its unit, and which way is better."""
    info = results.info(measure)
    return f"{measure}{' %' if info.kind == 'rate' else ''}{_ARROWS[info.better]}"


def cell(results: Results, method: str, measure: str) -> str:
    """The number over all images, with its interval in brackets."""
    row, info = find_row(results.rows, method, measure, ALL), results.info(measure)
    if row is None:
        return MISSING
    text = number(info, row.value)
    if row.ci95 is None:
        return text
    return f"{text} ({number(info, row.ci95[0])}–{number(info, row.ci95[1])})"


def main_table(results: Results) -> Table:
    """Methods down, measures across, over all images."""
    measures = results.headline()
    heads = ["method"]
    for name in measures:
        counts = " or ".join(f"{n:,}" for n in results.image_counts(name))
        heads.append(f"{heading(results, name)}, n {counts}")
    return heads, [
        [method, *(cell(results, method, name) for name in measures)]
        for method in results.method_names()
    ]


def cost_table(results: Results) -> Table:
    """Methods down; what each took, and what its method was told."""
    heads = ["method", "UNet passes", "seconds", "trained parameters", "bytes", "told"]
    rows = []
    for cost in results.costs:
        numbers = (cost.unet_passes, cost.seconds, cost.parameters, cost.bytes)
        counted = [MISSING if number is None else f"{number:,.0f}" for number in numbers]
        rows.append([cost.method, *counted, cost.told])
    return heads, rows


def choice_table(results: Results) -> Table:
    """Snapshots down; their rates on the seeds of the choice, and which stand in the table: where
    it is a training's last, a longer one might go on."""
    last = {row.method: row.iteration for row in results.choices}
    heads = ["method, iteration", "drawn %", "kept %", "in the table"]
    rows = [
        [
            f"{row.method}, {row.iteration}",
            f"{percent(row.drawn)} of {row.n[0]}",
            f"{percent(row.kept)} of {row.n[1]}",
            ("yes, the last" if row.iteration == last[row.method] else "yes") if row.chosen else "",
        ]
        for row in results.choices
    ]
    return heads, rows


def comparison_table(results: Results, comparison: Comparison) -> Table:
    """Conditions down, methods across; what an attack takes beside."""
    heads = [f"{comparison.title}: {heading(results, comparison.measure)}", *comparison.methods]
    heads += effort_heads(comparison)
    rows = [
        [condition, *map(_rate_text, estimates), *effort_cells(comparison, condition)]
        for condition, estimates in comparison.rows.items()
    ]
    return heads, rows


def effort_heads(comparison: Comparison) -> list[str]:
    """Heads of the columns that `effort_cells` fills."""
    if not comparison.efforts:
        return []
    strength = ["open to", "strength", "prompts"] if comparison.says_strength else []
    return [*strength, "seconds a prompt", "UNet passes a prompt"]


def effort_cells(comparison: Comparison, condition: str) -> list[str]:
    """What the attack of this row takes; no number where it is none."""
    effort = comparison.efforts.get(condition)
    if effort is None:
        return [MISSING] * len(effort_heads(comparison))
    strength = [effort.access, effort.strength or MISSING, str(effort.prompts)]
    costs = [f"{effort.seconds:.1f}", f"{effort.unet_passes:,.0f}"]
    return [*(strength if comparison.says_strength else []), *costs]


def _rate_text(estimate: RateEstimate | None) -> str:
    if estimate is None:
        return MISSING
    low, high = estimate.ci95
    return f"{percent(estimate.value)} ({percent(low)}–{percent(high)})"


def tables(results: Results) -> Iterator[Table]:
    """The main table, costs and choices, then those of robustness and of attacks."""
    yield main_table(results)
    if results.costs:
        yield cost_table(results)
    if results.choices:
        yield choice_table(results)
    for comparison in (*robustness(results), *attack_comparisons(results)):
        yield comparison_table(results, comparison)


def to_markdown(results: Results) -> str:
    """All tables, and what a reader must know."""
    notes = [f"{MISSING}: {NOT_ATTACKED}\n"] if results.attacks else []
    notes += [f"Not measured: {line}\n" for line in results.missing]
    notes += [f"{line}\n" for line in results.notes]
    return "\n".join([*(_markdown(*table) for table in tables(results)), *notes])


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[text.replace("|", "\\|") for text in cells] for cells in [heads, *rows]]
    head, *body = [f"| {' | '.join(cells)} |\n" for cells in lines]
    return f"{head}{'|---' * len(heads)}|\n{''.join(body)}"


def to_csv(results: Results) -> str:
    """Every row, those of variations and attacks too, a line each."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(_CSV_HEADS)
    varied = [(v.name, row.setting, row) for v in results.variations for row in v.rows]
    for variation, setting, row in [*(("", "", row) for row in results.rows), *varied]:
        place = (row.method, row.measure, row.group, variation, setting)
        value = (row.value, *(row.ci95 or ("", "")), row.n)
        change = "" if row.difference is None else row.difference
        lines.writerow([*place, *value, change, *(row.ci95_difference or ("", ""))])
    for r in results.attacks:
        place = (r.method, r.measure, ALL, "attacks", r.attack)
        lines.writerow([*place, r.after, *r.ci95_after, r.n, r.change, *r.ci95_change])
    return text.getvalue()
