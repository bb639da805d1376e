"""`sdd-lora evaluate`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdd_lora.cli.common import Result, verb

if TYPE_CHECKING:
    from sdd_lora.bench.results import Results


@verb("evaluate")
def evaluate(
    bench: Annotated[Path, typer.Argument(help="A bench file.", metavar="BENCH")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to fill [default: bench/NAME]."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Only these of the bench's methods; commas between them, or repeated."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="At most so many erased, and so many kept, images a row.", min=1),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The small table that the bench's `quick` describes.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a field: model=my-model.safetensors. Repeatable."),
    ] = None,
) -> Result:
    """Measure every method of a bench on the same prompts and latents.

    What a method needs trained is trained once and kept in ~/.cache/sdd_lora (or $SDD_LORA_CACHE).
    Run again, also after a crash, it draws and measures what is missing and nothing else.

    Examples:

        sdd-lora evaluate recipes/bench/demo-single.yaml --quick

        sdd-lora evaluate recipes/bench/demo-single.yaml -o bench --methods sd,sdd,sdd-preserve

        sdd-lora report bench
    """  # fmt: skip
    from sdd_lora.bench.bench_file import Bench, chosen, limited
    from sdd_lora.io.strict_yaml import parse_override

    overrides = dict(map(parse_override, changes or []))
    wanted = limited(Bench.load(bench, quick=quick, overrides=overrides), limit)
    wanted = chosen(wanted, [m for given in methods or [] for m in given.split(",")])
    folder = output or Path("bench") / (wanted.name + (f"-limit{limit}" if limit else ""))

    from sdd_lora.bench.run import MARKDOWN, run
    from sdd_lora.runs.train import train, versions

    command = shlex.join(["sdd-lora", *sys.argv[1:]])
    try:
        results = run(wanted, folder, train, command, versions())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; run the same command again to go on in {folder}"
        ) from None
    text = f"{_tables(results)}\n\n{folder / MARKDOWN}; sdd-lora report {folder} shows it all"
    return Result({"folder": str(folder)} | results.model_dump(mode="json"), text)


def _tables(results: "Results") -> str:
    from sdd_lora.cli.tables import table

    measures = results.headline()
    rows = [[m, *(results.cell(m, name) for name in measures)] for m in results.method_names()]
    main = table(["method", *(results.heading(name) for name in measures)], rows)
    others = [*results.elsewhere_tables(), *results.attack_tables()]
    return "\n\n".join([main, *(table(*other) for other in others)])
