"""`sdd-lora report`."""

from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.common import Result, verb


@verb("report")
def report(
    folder: Annotated[
        Path, typer.Argument(help="The folder that `sdd-lora evaluate` filled.", metavar="DIR")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write [default: DIR/report.html]."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that is there.")] = False,
) -> Result:
    """Show a bench's results as one HTML file: table, pictures, curves, how to repeat it.

    The file needs nothing else: no network, no script; phones, dark mode and keyboards are served.

    Examples:

        sdd-lora report bench/demo-single

        sdd-lora report bench/demo-single -o table.html --force
    """  # fmt: skip
    from sdd_lora.bench.report import REPORT, render_report
    from sdd_lora.io.atomic import refuse_existing, write_text

    target = output or folder / REPORT
    refuse_existing(target, force)
    write_text(target, render_report(folder))
    size = target.stat().st_size
    return Result({"report": str(target), "bytes": size}, f"{target} ({size / 1e6:.1f} MB)")
