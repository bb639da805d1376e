"""`sdd-lora extract`."""

from typing import TYPE_CHECKING, Annotated

import typer

from sdd_lora.cli.adapters import Dtype, Energy, Force, OutputFile, Rank
from sdd_lora.cli.common import Result, verb

if TYPE_CHECKING:
    from sdd_lora.checkpoint.extract import Extraction


@verb("extract")
def extract(
    tuned: Annotated[
        str,
        typer.Argument(
            help="The fine-tuned model, or some of its weights alone (as ESD publishes them).",
            metavar="TUNED",
        ),
    ],
    base: Annotated[str, typer.Option("--base", help="The model that it was tuned from.")],
    output: OutputFile,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="How to store it.")] = Dtype.fp16,
    force: Force = False,
) -> Result:
    """Make an adapter of what full fine-tuning changed, and say how much of it an adapter holds.

    The two models may differ in layout and dtype. Biases, norms and embeddings can't be held; the
    autoencoder is not compared.

    Examples:

        sdd-lora extract erased.safetensors --base sd15.safetensors -o erased-lora.safetensors --rank 8

        sdd-lora extract esd-weights.safetensors --base diffusers-folder -o esd.safetensors --energy 0.9
    """  # noqa: E501
    from pathlib import Path

    from sdd_lora.checkpoint import extract as difference
    from sdd_lora.checkpoint.locate import locate
    from sdd_lora.cli.adapters import check_outputs, line, write

    check_outputs(force, output)
    tuned_path = Path(locate(tuned))
    found = difference.extract(tuned_path, Path(locate(base)), rank, energy)
    written = write(found.adapter, output, "kohya", dtype.value)
    data = written | {
        "kept_share": found.kept_share,
        "inside_share": found.inside_share,
        "modules": {
            name: {"rank": part.rank, "kept_share": found.kept[name], "norm": found.norms[name]}
            for name, part in found.adapter.factors.items()
        },
        "outside": found.outside,
    }
    return Result(data, f"{_report(found)}\n{line(written)}")


def _report(found: "Extraction") -> str:
    from sdd_lora.cli.tables import table

    rows = [
        [name, str(part.rank), f"{found.norms[name]:.4g}", f"{100 * found.kept[name]:.1f} %"]
        for name, part in found.adapter.factors.items()
    ]
    lines = [
        table(["module", "rank", "norm of the change", "kept"], rows),
        f"kept of the squared change: {100 * found.kept_share:.1f} %",
    ]
    if found.outside:
        worst = max(found.outside, key=lambda name: found.outside[name])
        lines.append(
            f"outside what an adapter holds: {100 * (1 - found.inside_share):.1f} %, in "
            f"{len(found.outside)} parameters, most in {worst}"
        )
    return "\n".join(lines)
