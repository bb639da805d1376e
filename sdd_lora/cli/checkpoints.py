"""Verbs on checkpoints: bake, unbake, extract."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdd_lora.cli.adapters import check_outputs, line, write
from sdd_lora.cli.common import (
    Energy,
    Force,
    HighestRank,
    Model,
    NewDtype,
    OutputFile,
    Resolve,
    Result,
    WeightedAdapters,
    verb,
)
from sdd_lora.cli.tables import table
from sdd_lora.errors import BadInput

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.checkpoint.bake import BakeReport
    from sdd_lora.checkpoint.extract import Extraction


@verb("bake")
def bake(
    model: Model,
    adapters: WeightedAdapters,
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
        Literal["patch", "drop"],
        typer.Option("--ema", help="EMA copies in MODEL: patched too, or left out."),
    ] = "patch",
    rounding: Annotated[
        Literal["nearest", "stochastic"],
        typer.Option(
            "--rounding",
            help="stochastic keeps edits that are smaller than the steps of bf16 or fp8.",
        ),
    ] = "nearest",
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
    resolve: Resolve = False,
    force: Force = False,
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
    from sdd_lora.adapter.weighted import weighted
    from sdd_lora.checkpoint import bake as baking
    from sdd_lora.checkpoint.locate import require_apart
    from sdd_lora.checkpoint.rounding import Rounding

    if seed is not None and rounding != "stochastic":
        raise BadInput("--seed goes with --rounding stochastic; nothing else is drawn")
    sources = [(adapter_file(path), weight) for path, weight in map(weighted, adapters)]
    read = [path for path, _ in sources] + ([] if base is None else [Path(base)])
    for written in filter(None, (output, undo)):
        require_apart(written, *read)
    parts = _for_model(model, [(Adapter.load(path), w) for path, w in sources], resolve)
    report = baking.bake(
        model,
        parts,
        output,
        in_place=in_place,
        undo=undo,
        ema=ema,
        rounding=Rounding(rounding, seed or 0),
        base=base,
        force=force,
    )
    return Result(_bake_data(report), _bake_text(report))


def _for_model(
    model: str, parts: "list[tuple[Adapter, float]]", resolve: bool
) -> "list[tuple[Adapter, float]]":
    """Adapters with their weights: an eraser from words is tried on the model's text encoder, and
    with `resolve` solved for it."""
    if any(adapter.is_portable for adapter, _ in parts):
        from sdd_lora.training.erase import made_for  # imports torch

        return [(made_for(part, model, resolve=resolve), weight) for part, weight in parts]
    if resolve:
        raise BadInput("--resolve goes with an eraser from words; none of the adapters is one")
    return parts


def _bake_data(report: "BakeReport") -> dict[str, Any]:
    return {
        "model": str(report.model),
        "output": str(report.output),
        "undo": str(report.undo) if report.undo else None,
        "adapters": [
            {"name": a.name, "identity": a.identity, "weight": a.weight} for a in report.adapters
        ],
        "changed": report.changed,
        "copies": list(report.copies),
        "dropped_tensors": report.dropped,
        "intended": report.total.intended,
        "realised": report.total.realised,
        "error": report.total.error,
        "tensors": [
            {name: value for name, value in asdict(change).items() if name != "file"}
            for change in report.changes
        ],
        "left_out": list(report.left_out),
        "refused": list(report.refused),
        "warnings": report.warnings,
    }


def _bake_text(report: "BakeReport") -> str:
    names = ", ".join(f"{a.name} ({a.weight:g})" for a in report.adapters)
    lines = [f"{report.output}: no weight is changed"]
    if report.changed:
        lines = [
            f"{report.output}: {names} in {len(report.changes)} tensors",
            f"edited: {', '.join(report.copies)}",
            f"edit: norm {report.total.intended:.4g}, {report.total.realised:.1%} of it there "
            f"after rounding, error {report.total.error:.1%}",
        ]
    if report.dropped:
        lines.append(f"left out: {report.dropped} tensors of EMA copies")
    if report.left_out:
        lines.append(f"left out: {_first_names(report.left_out)}")
    if report.refused:
        lines.append(f"refused in the pickle: {_first_names(report.refused)}")
    if report.undo:
        paths = shlex.join([str(report.output), str(report.undo)])
        lines.append(f"undo: sdd-lora unbake {paths} --in-place")
    return "\n".join(lines)


def _first_names(names: tuple[str, ...], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@verb("unbake")
def unbake(
    model: Annotated[Path, typer.Argument(help="What was baked: a file or a folder.")],
    undo: Annotated[Path, typer.Argument(help="The undo file of that bake, or a journal.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the original goes.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change MODEL itself.")] = False,
    force: Force = False,
) -> Result:
    """Take a bake back, byte for byte. Refused where the model has changed since.

    Examples:

        sdd-lora unbake safe.safetensors safe.undo -o model.safetensors

        sdd-lora unbake model.safetensors model.safetensors.undo1 --in-place
    """
    from sdd_lora.checkpoint import undo as undoing

    done = undoing.unbake(model, undo, output, in_place=in_place, force=force)
    what = "an interrupted change rolled back" if done.rolled_back else "as before the bake"
    data = {
        "output": str(done.output),
        "files": [str(file) for file in done.files],
        "in_place": done.in_place,
        "rolled_back": done.rolled_back,
    }
    return Result(data, f"{done.output}: {what}")


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
    rank: HighestRank = None,
    energy: Energy = None,
    dtype: NewDtype = "fp16",
    force: Force = False,
) -> Result:
    """Make an adapter of what full fine-tuning changed, and say how much of it an adapter holds.

    The two models may differ in layout and dtype. Biases, norms and embeddings can't be held; the
    autoencoder is not compared.

    Examples:

        sdd-lora extract erased.safetensors --base sd15.safetensors -o erased-lora.safetensors --rank 8

        sdd-lora extract esd-weights.safetensors --base diffusers-folder -o esd.safetensors --energy 0.9
    """  # noqa: E501
    from sdd_lora.checkpoint import extract as difference

    check_outputs(force, output)
    found = difference.extract(tuned, base, rank, energy)
    written = write(found.adapter, output, "kohya", dtype)
    data = written | {
        "kept_share": found.kept_share,
        "inside_share": found.inside_share,
        "modules": {
            name: {"rank": part.rank, "kept_share": found.kept[name], "norm": found.norms[name]}
            for name, part in found.adapter.factors.items()
        },
        "outside": found.outside,
        "not_compared": list(found.not_compared),
    }
    return Result(data, f"{_extract_text(found)}\n{line(written)}")


def _extract_text(found: "Extraction") -> str:

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
    if found.not_compared:
        lines.append(
            f"not compared, since the base has no such: {_first_names(found.not_compared)}"
        )
    return "\n".join(lines)
