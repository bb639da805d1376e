"""Verbs that look into files and change nothing: inspect, verify."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sdd_lora.cli.common import Result, verb
from sdd_lora.errors import BadInput


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
    found = [_inspected(path, norms) for path in files]
    return Result({"files": found}, "\n\n".join(map(_description_text, found)))


def _inspected(path: Path, norms: bool) -> dict[str, Any]:
    from sdd_lora.adapter.adapter import adapter_file

    path, is_adapter = _found(path)
    return _adapter_data(adapter_file(path), norms) if is_adapter else _checkpoint_data(path, norms)


def _found(path: Path) -> tuple[Path, bool]:
    """Where a file or folder lies, and whether it is an adapter; else it is taken for a model."""
    from sdd_lora.adapter.adapter import is_adapter_folder
    from sdd_lora.adapter.formats import looks_like_adapter
    from sdd_lora.checkpoint.journal import require_no_journal
    from sdd_lora.checkpoint.layout import read_any_header
    from sdd_lora.checkpoint.locate import locate_file

    path = locate_file(path)
    require_no_journal(path)
    if path.is_dir():
        return path, is_adapter_folder(path)
    return path, looks_like_adapter(read_any_header(path).tensors)


def _adapter_data(path: Path, norms: bool) -> dict[str, Any]:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.inspect import describe_adapter
    from sdd_lora.adapter.metadata import THUMBNAIL_KEY

    found = describe_adapter(path)
    data = {
        "file": str(path),
        "kind": "adapter",
        "family": found.family,
        "form": found.format,
        "modules": found.kinds(),
        "ranks": sorted(set(found.ranks.values())),
        "scales": sorted({round(scale, 6) for scale in found.scales.values()}),
        "dtypes": found.dtypes,
        "parameters": found.parameters,
        "bytes": path.stat().st_size,
        "sha256": found.sha256,
        "autov2": found.autov2,
        "autov3": found.autov3,
        "metadata": found.metadata.without_thumbnail().as_json(),
        "thumbnail": THUMBNAIL_KEY in found.metadata.header,
    }
    if norms:
        factors = Adapter.load(path).factors
        data["norms"] = {name: part.norm() for name, part in factors.items()}
    return data


def _checkpoint_data(path: Path, norms: bool) -> dict[str, Any]:
    from sdd_lora.checkpoint.describe import FAMILIES, describe_model
    from sdd_lora.checkpoint.detect import cross_attention_norms, history_of_model

    found = describe_model(path)
    data = {
        "file": str(path),
        "kind": "checkpoint",
        "family": FAMILIES[found.family]
        + (" in structure, of other widths" if found.small else ""),
        "layout": found.layout,
        "legacy_pickle": found.legacy,
        "code_in_pickle": list(found.code),
        "dtypes": found.dtypes,
        "copies": list(found.copies),
        "ema": found.has_ema,
        "unread_copies": list(found.unread),
        "inpainting": found.inpainting,
        "missing": list(found.missing),
        "prediction": found.prediction.kind or "",
        "zero_terminal_snr": found.prediction.zero_terminal_snr or False,
        "guidance_embedding": found.prediction.guidance_embedding,
        "widths": list(found.unet_widths),
        "context_width": found.context_width,
        "baked": [asdict(record) for record in history_of_model(path)],
    }
    if norms:
        data["norms"] = cross_attention_norms(path)
    return data


def _description_text(data: dict[str, Any]) -> str:
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


@verb("verify")
def verify(
    file: Annotated[
        Path,
        typer.Argument(
            help="An adapter (file or run's folder), or a model as `bake` takes it.", metavar="FILE"
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="FILE is an adapter: does it fit this model, is it in it?"),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="FILE is a checkpoint: is this adapter in it?"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The untouched model, to tell from the weights."),
    ] = None,
) -> Result:
    """Check an adapter (sound? who loads it? does it fit?) or a checkpoint (which are in it?).

    Exit code 1 where an adapter doesn't fit the model, or isn't in the checkpoint.

    Examples:

        sdd-lora verify weapons.safetensors --model model.safetensors

        sdd-lora verify safe.safetensors

        sdd-lora verify safe.safetensors --adapter weapons.safetensors --base model.safetensors
    """
    from sdd_lora.adapter.adapter import adapter_file

    file, is_adapter = _found(file)
    if not is_adapter:
        if model is not None:
            raise BadInput("--model goes with an adapter; a checkpoint takes --adapter")
        return _verify_checkpoint(file, adapter, base)
    if adapter is not None:
        raise BadInput("--adapter goes with a checkpoint; an adapter takes --model")
    if base is not None and model is None:
        raise BadInput("--base goes with --model: the untouched model beside it")
    return _verify_adapter(adapter_file(file), model, base)


def _verify_adapter(path: Path, model: str | None, base: str | None) -> Result:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.adapter.inspect import describe_adapter
    from sdd_lora.adapter.loaders import verdicts
    from sdd_lora.checkpoint.describe import open_sd1
    from sdd_lora.checkpoint.locate import locate
    from sdd_lora.checkpoint.plan import misfits_of
    from sdd_lora.progress import warn

    adapter = Adapter.load(path)
    found = describe_adapter(path)
    state = "sound" if adapter.norm() else "changes nothing"
    if not adapter.norm():
        warn(f"{adapter.name}: changes nothing: its delta is 0 everywhere")
    loaders = verdicts(found)
    data: dict[str, Any] = {
        "file": str(path),
        "kind": "adapter",
        "sound": adapter.norm() > 0,
        "family": found.family,
        "rank": adapter.rank,
        "norm": adapter.norm(),
        "loaders": {v.loader: {"loads": v.loads, "why": v.why} for v in loaders},
    }
    lines = [
        f"{path}: {state}: {len(adapter.factors)} modules of {found.family}, rank {adapter.rank}, "
        f"norm {adapter.norm():.4g}",
        *(f"  {v.loader}: {'yes' if v.loads else 'no'}: {v.why}" for v in loaders),
    ]
    if model is None:
        return Result(data, "\n".join(lines))
    where = locate(model)
    problems = misfits_of(open_sd1(where), [(adapter, 1.0)])
    data |= {"model": model, "fits": not problems, "misfits": problems}
    lines.append(f"  {model}: {'it fits' if not problems else 'it does NOT fit'}")
    lines += [f"    {problem}" for problem in problems]
    if not problems:
        data["presence"], text = _presence(where, adapter, base)
        lines.append(f"  {model}: {text}")
    return Result(data, "\n".join(lines), exit_code=1 if problems else 0)


def _verify_checkpoint(path: Path, adapter: Path | None, base: str | None) -> Result:
    from sdd_lora.adapter.adapter import Adapter
    from sdd_lora.checkpoint.detect import history_of_model

    chain = history_of_model(path)
    data: dict[str, Any] = {
        "file": str(path),
        "kind": "checkpoint",
        "baked": [asdict(baking) for baking in chain],
    }
    lines = [f"{path}: {'nothing is recorded as baked in' if not chain else 'baked in:'}"]
    for baking in chain:
        lines += [f"  {a.name} at weight {a.weight:g} ({baking.tool})" for a in baking.adapters]
    if adapter is None:
        if base is not None:
            raise BadInput("--base of a checkpoint goes with --adapter: what to look for")
        return Result(data, "\n".join(lines))
    data["presence"], text = _presence(path, Adapter.load(adapter), base)
    lines.append(f"  {adapter}: {text}")
    return Result(data, "\n".join(lines), exit_code=0 if data["presence"]["present"] else 1)


def _presence(model: Path, adapter: Any, base: str | None) -> tuple[dict[str, Any], str]:
    """Whether an adapter is in a model: by its record, and with a base by its weights."""
    from sdd_lora.checkpoint.detect import find_adapter
    from sdd_lora.checkpoint.locate import locate

    found = find_adapter(model, adapter, None if base is None else locate(base))
    text = "not recorded as baked in"
    if (known := found.recorded) is not None:
        other = f" with {known.name}" if known.identity != adapter.identity else ""
        weight = "an unknown weight" if found.expected is None else f"weight {found.expected:g}"
        text = f"recorded as baked in{other} at {weight}"
    if found.strength is not None:
        text += f"; by its weights it is in it at {found.strength:.2f}"
    return asdict(found) | {"present": found.present}, text
