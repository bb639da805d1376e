"""`sdd-lora inspect`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sdd_lora.cli.common import Result, verb


@verb("inspect")
def inspect(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Adapters (files or runs' folders), or models as `bake` takes them.",
            metavar="FILE...",
        ),
    ],
    norms: Annotated[
        bool, typer.Option("--norms", help="Read the tensors and show their Frobenius norms.")
    ] = False,
) -> Result:
    """Show what is in an adapter or a checkpoint, from headers alone.

    Examples:

        sdd-lora inspect lora.safetensors

        sdd-lora inspect model.safetensors runs/weapons --json

        sdd-lora inspect lora.safetensors --norms
    """
    found = [_describe(path, norms) for path in files]
    return Result({"files": found}, "\n\n".join(map(_text, found)))


def _describe(path: Path, norms: bool) -> dict[str, Any]:
    from sdd_lora.adapter.adapter import adapter_file, is_adapter_folder
    from sdd_lora.adapter.formats import looks_like_adapter
    from sdd_lora.checkpoint.layout import read_any_header, require_settled
    from sdd_lora.checkpoint.locate import locate_file

    path = locate_file(path)
    require_settled(path)
    if path.is_dir():
        is_adapter = is_adapter_folder(path)
    else:
        is_adapter = looks_like_adapter(read_any_header(path).tensors)
    return _adapter(adapter_file(path), norms) if is_adapter else _checkpoint(path, norms)


def _adapter(path: Path, norms: bool) -> dict[str, Any]:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.inspect import describe

    found = describe(path)
    data = {
        "file": str(path),
        "kind": "adapter",
        "family": found.family,
        "form": found.form,
        "modules": found.kinds(),
        "ranks": sorted(set(found.ranks.values())),
        "scales": sorted({round(scale, 6) for scale in found.scales.values()}),
        "dtypes": found.dtypes,
        "parameters": found.parameters,
        "bytes": path.stat().st_size,
        "sha256": found.sha256,
        "autov2": found.autov2,
        "autov3": found.autov3,
        "metadata": found.metadata.as_json(),
    }
    if norms:
        factors = Adapter.load(path).factors
        data["norms"] = {name: part.norm() for name, part in factors.items()}
    return data


def _checkpoint(path: Path, norms: bool) -> dict[str, Any]:
    from sdd_lora.checkpoint.detect import chain_of_model
    from sdd_lora.checkpoint.fitting import cross_attention_norms
    from sdd_lora.checkpoint.layout import FAMILIES, describe

    found = describe(path)
    data = {
        "file": str(path),
        "kind": "checkpoint",
        "family": FAMILIES[found.family]
        + (" in structure, of other widths" if found.small else ""),
        "layout": found.layout,
        "legacy_pickle": found.legacy,
        "dtypes": found.dtypes,
        "copies": list(found.copies),
        "ema": found.has_ema,
        "inpainting": found.inpainting,
        "missing": list(found.missing),
        "widths": list(found.unet_widths),
        "context_width": found.context_width,
        "baked": [asdict(baking) for baking in chain_of_model(path)],
    }
    if norms:
        data["norms"] = cross_attention_norms(path)
    return data


def _text(data: dict[str, Any]) -> str:
    lines = [f"{data['file']}: {data['kind']}"]
    for key, value in data.items():
        if key in ("file", "kind") or value in ([], {}, ""):
            continue
        if key in ("norms", "metadata"):
            lines.append(f"  {key}:")
            lines += [f"    {name}: {_short(entry)}" for name, entry in value.items()]
        else:
            lines.append(f"  {key.replace('_', ' ')}: {_short(value)}")
    return "\n".join(lines)


def _short(value: Any, most: int = 160) -> str:
    """A value on one line of bearable length; --json has all of it."""
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, dict):
        text = ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    elif isinstance(value, list):
        text = ", ".join(map(_short, value))
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"
