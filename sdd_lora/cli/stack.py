"""`sdd-lora stack`."""

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdd_lora.cli.adapters import Dtype, Force, OutputFile, Rank
from sdd_lora.cli.common import Result, verb, weighted

if TYPE_CHECKING:
    from sdd_lora.adapter.interference import Interference

SHOWN_PAIRS = 10


class How(str, Enum):
    sum = "sum"


@verb("stack")
def stack(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapter files, runs' folders or hub ids, with optional weights; negative ones "
            "take an adapter away.",
            metavar="A[:w]...",
        ),
    ],
    output: OutputFile,
    rank: Rank = None,
    how: Annotated[How, typer.Option("--how", help="sum: Σ wᵢ·ΔWᵢ, exactly.")] = How.sum,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="How to store it.")] = Dtype.fp16,
    name: Annotated[
        str | None, typer.Option("--name", help="Its name [default: that of the output file].")
    ] = None,
    heat_map: Annotated[
        Path | None, typer.Option("--heat-map", help="Draw the cosines between adapters as a PNG.")
    ] = None,
    force: Force = False,
) -> Result:
    """Make several adapters one, exactly, and say how they stand to each other.

    Ranks add up; --rank cuts the sum to size afterwards and states the error. The report compares
    the adapters' changes: a cosine near 0 means that they don't meet, and overdriven modules are
    changed more strongly than any of the adapters was tested at.

    Examples:

        sdd-lora stack weapons.safetensors gore.safetensors -o safe.safetensors

        sdd-lora stack runs/weapons runs/gore:0.8 ink.safetensors:-0.5 -o mix.safetensors --rank 16
    """
    from sdd_lora.adapter import algebra as compose
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.interference import draw_heat_map, interference
    from sdd_lora.cli.adapters import check_outputs, line, write
    from sdd_lora.io.atomic import atomic_output
    from sdd_lora.progress import warn

    check_outputs(force, output, *([heat_map] if heat_map else []))
    parts = [(Adapter.load(path), weight) for path, weight in map(weighted, adapters)]
    total = compose.stack(parts, name or output.stem)
    report = interference(parts)
    data: dict = {"how": how.value, "interference": report.as_json(), "relative_error": 0.0}
    if rank is not None:
        smaller = compose.resize(total, rank=rank)
        total, data["relative_error"] = smaller.adapter, smaller.error
    with ExitStack() as pending:  # the picture appears after the adapter, or neither does
        if heat_map is not None:
            draw_heat_map(report, pending.enter_context(atomic_output(heat_map)))
            data["heat_map"] = str(heat_map)
        data |= write(total, output, "kohya", dtype.value)
    if report.overdriven:
        warn(_overdrive(report))
    lines = [_report(report), line(data)]
    if rank is not None:
        lines.append(f"cut to rank {rank}: relative error {100 * data['relative_error']:.2f} %")
    return Result(data, "\n".join(lines))


def _report(report: "Interference") -> str:
    from sdd_lora.cli.tables import table

    parts = zip(report.labels, report.weights, report.norms, strict=True)
    rows = [[name, f"{weight:g}", f"{norm:.4g}"] for name, weight, norm in parts]
    rows.append(["the stack", "", f"{report.norm:.4g}"])
    sections = [table(["adapter", "weight", "norm"], rows)]
    labels, count = report.labels, len(report.names)
    pairs = [(report.cosine[i, j], i, j) for i in range(count) for j in range(i)]
    if pairs:
        strongest = sorted(pairs, key=lambda pair: -abs(pair[0]))[:SHOWN_PAIRS]
        named = [[f"{labels[j]} and {labels[i]}", f"{c:+.3f}"] for c, i, j in strongest]
        sections.append(table(["the pairs that meet most", "cosine"], named))
    return "\n\n".join(sections) + "\n"


def _overdrive(report: "Interference") -> str:
    worst = report.overdriven[0]
    return (
        f"overdrive: {len(report.overdriven)} of {len(report.modules)} modules are changed more "
        f"strongly than by any adapter at weight 1, {worst.module} {worst.drive:.1f} times; "
        "measure the stack, or lower the weights"
    )
