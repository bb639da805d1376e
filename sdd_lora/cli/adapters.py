"""Verbs that write adapters, or hand them around: convert, resize, stack, push, pull."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdd_lora.cli.common import (
    AdapterFile,
    AdapterName,
    Energy,
    Force,
    HighestRank,
    NewDtype,
    OutputFile,
    Resolve,
    Result,
    StoredDtype,
    WeightedAdapters,
    verb,
)
from sdd_lora.cli.tables import erased_table, table
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import refuse_existing

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.interference import Interference

SHOWN_PAIRS = 10
Format = Literal["kohya", "peft", "ldm", "attn-procs"]


def check_outputs(force: bool, adapter: Path, *others: Path) -> None:
    """Raises BadInput where an output exists and `force` was not given, two are one file, or the
    adapter's is named like a pickle.

    An adapter's outputs are its file, and the sidecar and the preview beside it.
    """
    from sdd_lora.adapter.adapter import require_file_name
    from sdd_lora.adapter.card import sidecar_path
    from sdd_lora.adapter.thumbnail import preview_path

    require_file_name(adapter)
    paths = [adapter, sidecar_path(adapter), preview_path(adapter), *others]
    for path in paths:
        refuse_existing(path, force)
    if len({path.resolve() for path in paths}) < len(paths):
        named = ", ".join(map(str, paths))
        raise BadInput(f"{named}: two outputs are one file; give each a name of its own")


def write(adapter: "Adapter", path: Path, format: str, dtype: str) -> dict[str, Any]:
    """Save an adapter, and beside it the sidecar where it has something to say, and the preview
    where it has a picture; what was written, for --json.
    """
    from sdd_lora.adapter.adapter import adapter_file
    from sdd_lora.adapter.card import has_labels, sidecar_path, sidecar_text
    from sdd_lora.adapter.inspect import describe_adapter
    from sdd_lora.adapter.thumbnail import preview_path, thumbnail_of
    from sdd_lora.io.atomic import atomic_output
    from sdd_lora.progress import warn

    is_folder = format == "peft" and not path.suffix
    sidecar = sidecar_path(path) if has_labels(adapter) and not is_folder else None
    picture = None
    try:
        picture = None if is_folder else thumbnail_of(adapter.metadata)
    except BadInput as error:  # another tool's
        warn(f"{adapter.name}: no preview beside it: {error}")
    with ExitStack() as pending:  # what is beside it appears after the adapter, or neither does
        if picture is not None:
            shown = pending.enter_context(atomic_output(preview_path(path)))
            picture.save(shown, "PNG")
            shown.flush()
        if sidecar is not None:
            labels = pending.enter_context(atomic_output(sidecar))
            labels.write(sidecar_text(adapter).encode())
            labels.flush()
        file = adapter_file(adapter.save(path, format=format, dtype=dtype))
        written = describe_adapter(file)
    return {
        "output": str(path),
        "sidecar": None if sidecar is None else str(sidecar),
        "preview": None if picture is None else str(preview_path(path)),
        "form": format,
        "dtype": dtype,
        "rank": adapter.rank,
        "module_count": len(adapter.factors),
        "parameters": written.parameters,
        "bytes": file.stat().st_size,
        "sha256": written.sha256,
        "autov2": written.autov2,
        "autov3": written.autov3,
    }


def line(written: dict[str, Any]) -> str:
    """What was written, for people."""
    return (
        f"{written['output']}: {written['form']}, {written['dtype']}, "
        f"{written['module_count']} modules, rank {written['rank']}, {written['bytes']:,} bytes"
    )


@verb("convert")
def convert(
    file: AdapterFile,
    output: OutputFile,
    to: Annotated[
        Format,
        typer.Option(
            "--to",
            help="kohya: the file that everybody loads; peft: diffusers' own, or peft's folder "
            "where OUT has no suffix; ldm: kohya with LDM names; attn-procs: old diffusers, "
            "attention alone.",
        ),
    ] = "kohya",
    base: Annotated[
        str | None,
        typer.Option("--base", help="Of a portable adapter: the MODEL to make it for."),
    ] = None,
    resolve: Resolve = False,
    dtype: StoredDtype = None,
    force: Force = False,
) -> Result:
    """Give an adapter another format; what it does stays the same.

    A portable adapter (see `sdd-lora erase`) becomes an ordinary one for --base, which every
    program loads. Where OUT is a folder that is there, such as a program's of LoRAs, the file is
    named after the adapter, with the label and the picture that A1111 shows beside it.

    There is no fp8 or int8: an adapter is small already, fp8's three bits of mantissa would cost
    6 % of every factor, and no loader knows a scale for them.

    Examples:

        sdd-lora convert lora.safetensors -o lora-kohya.safetensors

        sdd-lora convert runs/weapons -o stable-diffusion-webui/models/Lora

        sdd-lora convert runs/weapons -o weapons.peft.safetensors --to peft --dtype fp32

        sdd-lora convert no-weapons.safetensors --base model.safetensors -o no-weapons-lora.safetensors
    """  # noqa: E501
    from sdd_lora.adapter.adapter import Adapter, stored_dtype
    from sdd_lora.checkpoint.portable import adapter_on

    if resolve and base is None:
        raise BadInput("--resolve goes with --base: the MODEL to make the adapter for")
    adapter = _with_preview_beside(Adapter.load(file), Path(file))
    if output.is_dir() and to != "peft":
        output /= re.sub(r"[^\w.+-]+", "-", adapter.name) + ".safetensors"
    check_outputs(force, output)
    if base is not None:
        from sdd_lora.training.erase import made_for  # imports torch

        adapter = adapter_on(made_for(adapter, base, resolve=resolve), base)
    written = write(adapter, output, to, dtype or stored_dtype(file))
    return Result(written, line(written))


def _with_preview_beside(adapter: "Adapter", source: Path) -> "Adapter":
    """The adapter with the picture that lies beside its file, if it carries none itself."""
    from PIL import Image

    from sdd_lora.adapter.adapter import Adapter, adapter_file
    from sdd_lora.adapter.metadata import THUMBNAIL_KEY
    from sdd_lora.adapter.thumbnail import preview_path, with_thumbnail
    from sdd_lora.io.pictures import reading
    from sdd_lora.progress import warn

    if not source.exists() or THUMBNAIL_KEY in adapter.metadata.header:
        return adapter
    picture = preview_path(adapter_file(source))
    if not picture.is_file():
        return adapter
    try:
        with reading(picture, "no picture"), Image.open(picture) as shown:
            return Adapter(adapter.factors, with_thumbnail(adapter.metadata, shown))
    except BadInput as error:
        warn(f"{adapter.name}: without the preview beside it: {error}")
        return adapter


@verb("resize")
def resize(
    file: AdapterFile,
    output: OutputFile,
    rank: HighestRank = None,
    energy: Energy = None,
    dtype: StoredDtype = None,
    force: Force = False,
) -> Result:
    """Make an adapter smaller, at the least error that a lower rank can have, and say which.

    Examples:

        sdd-lora resize weapons.safetensors -o small.safetensors --rank 1

        sdd-lora resize stack.safetensors -o small.safetensors --energy 0.99
    """
    from sdd_lora.adapter import algebra as compose
    from sdd_lora.adapter.adapter import Adapter, stored_dtype

    check_outputs(force, output)
    compose.require_one_size(rank, energy)
    adapter = Adapter.load(file)
    result = compose.resize(adapter, rank, energy)
    written = write(result.adapter, output, adapter.own_format, dtype or stored_dtype(file))
    rows = [
        [
            name,
            f"{adapter.factors[name].rank} → {result.adapter.factors[name].rank}",
            f"{100 * error:.2f} %",
        ]
        for name, error in result.error_of_module.items()
    ]
    text = "\n".join(
        [
            table(["module", "rank", "relative error"], rows),
            line(written),
            f"relative error in all: {100 * result.error:.2f} %",
        ]
    )
    data = written | {
        "relative_error": result.error,
        "modules": {
            name: {"rank": result.adapter.factors[name].rank, "relative_error": error}
            for name, error in result.error_of_module.items()
        },
    }
    return Result(data, text)


@verb("stack")
def stack(
    adapters: WeightedAdapters,
    output: OutputFile,
    rank: HighestRank = None,
    how: Annotated[
        Literal["sum", "solve"] | None,
        typer.Option(
            "--how",
            help="sum: Σ wᵢ·ΔWᵢ, exactly; solve: of erasers from words, one eraser of all their "
            "concepts [default: solve where all are such, as they were made, at weight 1; else "
            "sum].",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="For solve: whose text encoder [default: as they were made]."),
    ] = None,
    dtype: NewDtype = "fp16",
    name: AdapterName = None,
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

        sdd-lora stack no-weapons.safetensors no-gore.safetensors -o no-both.safetensors --how solve
    """
    from sdd_lora.adapter import algebra as compose
    from sdd_lora.adapter.interference import draw_heat_map, interference
    from sdd_lora.adapter.weighted import with_weights
    from sdd_lora.io.atomic import atomic_output
    from sdd_lora.progress import warn

    check_outputs(force, output, *([heat_map] if heat_map else []))
    parts = with_weights(adapters)
    from_words = all(p.is_portable and p.metadata.words and weight == 1 for p, weight in parts)
    as_made = from_words and not any(part.lineage for part, _ in parts)
    if (how or ("solve" if as_made else "sum")) == "solve":
        if not from_words or heat_map is not None:
            raise BadInput(
                "--how solve: expected erasers from words, at weight 1, and no --heat-map; "
                "--how sum takes any adapters"
            )
        return _solved([part for part, _ in parts], model, rank, output, dtype, name)
    if model is not None:
        raise BadInput("--model goes with --how solve; a sum needs none")
    total = compose.stack(parts, name or output.stem)
    report = interference(parts)
    data: dict[str, Any] = {"how": "sum", "interference": report.as_json(), "relative_error": 0.0}
    if rank is not None:
        smaller = compose.resize(total, rank=rank)
        total, data["relative_error"] = smaller.adapter, smaller.error
    with ExitStack() as pending:  # the picture appears after the adapter, or neither does
        if heat_map is not None:
            draw_heat_map(report, pending.enter_context(atomic_output(heat_map)))
            data["heat_map"] = str(heat_map)
        data |= write(total, output, total.own_format, dtype)
    if report.overdriven:
        warn(_overdrive(report))
    lines = [_interference_text(report), line(data)]
    if rank is not None:
        lines.append(f"cut to rank {rank}: relative error {100 * data['relative_error']:.2f} %")
    return Result(data, "\n".join(lines))


def _solved(
    parts: "list[Adapter]",
    model: str | None,
    rank: int | None,
    output: Path,
    dtype: str,
    name: str | None,
) -> Result:
    from sdd_lora.training.erase import solve

    erased = solve(parts, model, rank=rank, name=name or output.stem)
    written = write(erased.adapter, output, "portable", dtype)
    text = f"{erased_table(erased)}\n{line(written)}"
    return Result({"how": "solve"} | erased.as_json() | written, text)


def _interference_text(report: "Interference") -> str:
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


@verb("push")
def push(
    source: Annotated[
        Path, typer.Argument(help="A run's folder, or an adapter's file.", metavar="DIR|FILE")
    ],
    repository: Annotated[
        str, typer.Argument(help="Where to, owner/name; made if it is not there.", metavar="REPO")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="For you alone, where the repository is new.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option("--license", help="The hub's id of a license, for the card: openrail, …"),
    ] = None,
) -> Result:
    """Publish an adapter with its card, numbers and pictures on the hub.

    Log in once with `hf auth login`. A card is written where there is none. The state of an
    unfinished run is never sent.

    Examples:

        sdd-lora push runs/weapons me/weapons-eraser --license creativeml-openrail-m

        sdd-lora push no-weapons.safetensors me/no-weapons
    """
    from sdd_lora.adapter.publish import publish

    url = publish(source, repository, private, license)
    return Result({"repository": repository, "commit": url}, f"{repository}: {url}")


@verb("pull")
def pull(
    repository: Annotated[str, typer.Argument(help="owner/name on the hub.", metavar="REPO")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to make [default: the repository's name]."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit [default: main].")
    ] = None,
    force: Force = False,
) -> Result:
    """Fetch a published adapter with its card and numbers, and check its hashes.

    Nothing but safetensors is taken.

    Examples:

        sdd-lora pull someone/weapons-eraser -o adapters/weapons
    """
    from sdd_lora.adapter import hub

    folder = output or Path(repository.rpartition("/")[2])
    files = sorted(path.name for path in hub.pull(repository, folder, revision, force).iterdir())
    data = {"repository": repository, "folder": str(folder), "files": files}
    return Result(data, f"{folder}: {', '.join(files)}")
