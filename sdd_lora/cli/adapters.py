"""What the adapter verbs share: options, and what they say about a file they wrote."""

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import refuse_existing

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter


class Form(str, Enum):
    kohya = "kohya"
    peft = "peft"
    ldm = "ldm"
    attn_procs = "attn-procs"


class Dtype(str, Enum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


OutputFile = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that is there.")]
AdapterFile = Annotated[
    str, typer.Argument(help="An adapter file, a run's folder, or a hub id.", metavar="FILE")
]
StoredDtype = Annotated[
    Dtype | None, typer.Option("--dtype", help="How to store it [default: as in FILE].")
]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="The highest rank of a module.")]
Energy = Annotated[
    float | None, typer.Option("--energy", help="The share of each module's squared norm to keep.")
]


def check_outputs(force: bool, adapter: Path, *others: Path) -> None:
    """Raises BadInput where an output exists and `force` was not given, two are one file, or the
    adapter's is named like a pickle.

    An adapter's outputs are its file and the sidecar beside it.
    """
    from sdd_lora.adapter.adapter import require_file_name
    from sdd_lora.adapter.card import sidecar_path

    require_file_name(adapter)
    paths = [adapter, sidecar_path(adapter), *others]
    for path in paths:
        refuse_existing(path, force)
    if len({path.resolve() for path in paths}) < len(paths):
        named = ", ".join(map(str, paths))
        raise BadInput(f"{named}: two outputs are one file; give each a name of its own")


def write(adapter: "Adapter", path: Path, form: str, dtype: str) -> dict[str, Any]:
    """Save an adapter, and beside it the sidecar where it has something to say; what was written,
    for --json.
    """
    from sdd_lora.adapter.card import has_labels, sidecar_path, sidecar_text
    from sdd_lora.adapter.inspect import describe
    from sdd_lora.io.atomic import atomic_output

    sidecar = sidecar_path(path) if has_labels(adapter) else None
    with ExitStack() as pending:  # the sidecar appears after the adapter, or neither does
        if sidecar is not None:
            file = pending.enter_context(atomic_output(sidecar))
            file.write(sidecar_text(adapter).encode())
            file.flush()
        written = describe(adapter.save(path, format=form, dtype=dtype))
    return {
        "output": str(path),
        "sidecar": None if sidecar is None else str(sidecar),
        "form": form,
        "dtype": dtype,
        "rank": adapter.rank,
        "module_count": len(adapter.factors),
        "parameters": written.parameters,
        "bytes": path.stat().st_size,
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
