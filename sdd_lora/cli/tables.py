"""Tables for the terminal, plain text so that they can be piped."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdd_lora.adapter.metrics import CardRow, Metrics
    from sdd_lora.training.erase import Erased

_SHOWN_RANKS = 8


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their width; the first is aligned left, the others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def erased_table(erased: "Erased") -> str:
    """What an eraser from words takes and costs, rank by rank, and the words that go with it."""
    chosen = erased.adapter.rank
    rows = [
        [
            f"{row.rank}{' *' if row.rank == chosen else ''}",
            f"{row.worth:.1f}",
            as_percent(row.left),
            as_percent(row.moved),
        ]
        for row in erased.ranks
    ]
    shown = rows[max(0, chosen - _SHOWN_RANKS) :]
    head = ["rank", "worth", "% left of the difference", "% of it in kept words"]
    near = ", ".join(erased.near) or "none"
    return f"{table(head, shown)}\nwords that go too, being near: {near}"


def as_percent(value: float) -> str:
    return f"{100 * value:.1f}"


def interval(bounds: Sequence[float]) -> str:
    return "{:.1f} … {:.1f}".format(*(100 * bound for bound in bounds))


def measures_table(measures: "Sequence[CardRow]") -> str:
    """The measures of a run: before → after, in percent, with 95 % intervals."""
    if not measures:
        return "nothing was counted: that takes measure.prompts and a measure.detector that counts"
    rows = [
        [
            f"{row.name} ({row.group})",
            str(row.n),
            as_percent(row.before),
            interval(row.ci95_before),
            as_percent(row.after),
            interval(row.ci95_after),
            f"{100 * (row.after - row.before):+.1f}",
            "{:+.1f} … {:+.1f}".format(*(100 * bound for bound in row.ci95_change or ())),
        ]
        for row in measures
    ]
    head = ["% of images", "n", "before", "95 %", "after", "95 %", "change", "95 %"]
    return table(head, rows)


def runs_table(runs: "Sequence[tuple[Path, Metrics]]") -> str:
    """A row a run, of its folder and metrics: each measure before → after, in percent over all its
    images, and the training's passes and minutes."""
    names = list(dict.fromkeys(row.name for _, metrics in runs for row in metrics.measures))
    rows = [
        [
            str(folder),
            *(_pooled(metrics.measures, name) for name in names),
            f"{metrics.training.unet_passes:,}",
            f"{metrics.training.seconds / 60:.1f}",
        ]
        for folder, metrics in runs
    ]
    head = ["run", *(f"{name}, %" for name in names), "UNet passes", "minutes"]
    return table(head, rows)


def _pooled(measures: "Sequence[CardRow]", name: str) -> str:
    """Rates over the images of all groups, which share none."""
    groups = [row for row in measures if row.name == name]
    n = sum(row.n for row in groups)
    if not n:
        return "–"
    before = sum(row.before * row.n for row in groups) / n
    after = sum(row.after * row.n for row in groups) / n
    return f"{as_percent(before)} → {as_percent(after)}"
