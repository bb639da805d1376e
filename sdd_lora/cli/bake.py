"""`sdd-lora bake`."""

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdd_lora.cli.common import Result, verb, weighted

if TYPE_CHECKING:
    from sdd_lora.checkpoint.bake import BakeReport


class Ema(str, Enum):
    patch = "patch"
    drop = "drop"


class RoundingChoice(str, Enum):
    nearest = "nearest"
    stochastic = "stochastic"


@verb("bake")
def bake(
    model: Annotated[
        str,
        typer.Argument(
            help="A diffusers folder, a .safetensors or .ckpt file, a hub id, "
            "demo or demo-community.",
            metavar="MODEL",
        ),
    ],
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapter files or runs' folders, with optional weights.", metavar="A[:w]..."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the baked model goes.")
    ] = None,
    undo: Annotated[
        Path | None,
        typer.Option(
            "--undo",
            help="Keep the original bytes of all that changes here, for `sdd-lora unbake`.",
        ),
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change MODEL itself; an undo file is always kept.")
    ] = False,
    ema: Annotated[
        Ema, typer.Option("--ema", help="EMA copies in MODEL: patched too, or left out.")
    ] = Ema.patch,
    rounding: Annotated[
        RoundingChoice,
        typer.Option(
            "--rounding",
            help="stochastic keeps edits that are smaller than the steps of bf16 or fp8.",
        ),
    ] = RoundingChoice.nearest,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of stochastic rounding [default: 0].")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="The original of MODEL: refuses an adapter that "
            "is in MODEL already, by its weights.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output that is there.")
    ] = False,
) -> Result:
    """Write adapters into a checkpoint, in the time that copying it takes.

    Every byte that they don't change stays as it is, and so do the format and the dtype; a .ckpt
    becomes .safetensors.

    Examples:

        sdd-lora bake model.safetensors weapons.safetensors -o safe.safetensors

        sdd-lora bake model.safetensors weapons.safetensors gore.safetensors:0.8 -o safe.safetensors --undo safe.undo

        sdd-lora bake diffusers-folder runs/weapons --in-place
    """  # noqa: E501
    from sdd_lora.adapter.adapter import Adapter, adapter_file
    from sdd_lora.checkpoint import bake as baking
    from sdd_lora.checkpoint.locate import require_apart
    from sdd_lora.checkpoint.rounding import Rounding
    from sdd_lora.errors import BadInput

    if seed is not None and rounding is not RoundingChoice.stochastic:
        raise BadInput("--seed goes with --rounding stochastic; nothing else is drawn")
    sources = [(adapter_file(path), weight) for path, weight in map(weighted, adapters)]
    read = [path for path, _ in sources] + ([] if base is None else [Path(base)])
    for written in filter(None, (output, undo)):
        require_apart(written, *read)
    parts = [(Adapter.load(path), weight) for path, weight in sources]
    report = baking.bake(
        model, parts, output, in_place=in_place, undo=undo, ema=ema.value,
        rounding=Rounding(rounding.value, seed or 0), base=base, force=force,
    )  # fmt: skip
    return Result(_data(report), _text(report))


def _data(report: "BakeReport") -> dict[str, Any]:
    return {
        "model": str(report.model),
        "output": str(report.output),
        "undo": str(report.undo) if report.undo else None,
        "adapters": [
            {"name": a.name, "identity": a.identity, "weight": a.weight} for a in report.adapters
        ],
        "copies": list(report.copies),
        "dropped_tensors": report.dropped,
        "intended": report.total.intended,
        "realised": report.total.realised,
        "error": report.total.error,
        "tensors": [
            {"module": c.module, "key": c.key, "dtype": c.dtype, "intended": c.intended,
             "realised": c.realised, "error": c.error}
            for c in report.changes
        ],
        "left_out": list(report.left_out),
        "refused": list(report.refused),
        "warnings": report.warnings,
    }  # fmt: skip


def _text(report: "BakeReport") -> str:
    names = ", ".join(f"{a.name} ({a.weight:g})" for a in report.adapters)
    lines = [
        f"{report.output}: {names} in {len(report.changes)} tensors",
        f"edited: {', '.join(report.copies)}",
        f"edit: norm {report.total.intended:.4g}, {report.total.realised:.1%} of it there after "
        f"rounding, error {report.total.error:.1%}",
    ]
    if report.dropped:
        lines.append(f"left out: {report.dropped} tensors of EMA copies")
    if report.left_out:
        lines.append(f"left out: {_listed(report.left_out)}")
    if report.refused:
        lines.append(f"refused in the pickle: {_listed(report.refused)}")
    if report.undo:
        paths = shlex.join([str(report.output), str(report.undo)])
        lines.append(f"undo: sdd-lora unbake {paths} --in-place")
    return "\n".join(lines)


def _listed(names: tuple[str, ...], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
