"""The labels on an adapter: header metadata, sidecar, card. The same adapter gives the same text.

User interfaces show `ss_*` (A1111) and ModelSpec 1.0.1 keys of the header, and the sidecar
`<name>.json` beside the file (A1111, InvokeAI); the hub shows the card.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import write_text
from sdd_lora.io.safetensors import data_sha256

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter

METADATA_KEY = "sdd_lora"
SHOWN_CONCEPTS = 12
MAX_LEVELS = 64  # of our entry's nesting; a recipe has three
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MODELSPEC_FIELDS = ("description", "author", "license", "date", "usage_hint")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str, "identity": str, "concepts": list, "base": dict, "merged_from": list,
    "measures": list, "resized_from": dict, **dict.fromkeys(_MODELSPEC_FIELDS, str),
}  # fmt: skip
_NUMBER = (int, float)
_SOURCE_FIELDS: dict[str, type | tuple[type, ...]] = {"identity": str, "lineage": list}
_ROW_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "merged_from": {"name": str, "weight": _NUMBER},
    "measures": {"name": str, "group": str, "before": _NUMBER, "after": _NUMBER},
}
#: Header keys written anew at every save: what a read file said there is stale or in `metadata`.
_GENERATED = {
    METADATA_KEY,
    "format",
    "lora_adapter_metadata",
    "sshs_model_hash",
    "sshs_legacy_hash",
    *(f"ss_{key}" for key in ("output_name", "sd_model_name", "network_module", "network_dim",
                              "network_alpha", "base_model_version", "v2")),
    *(f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "title",
                                     "merged_from", "hash_sha256", *_MODELSPEC_FIELDS)),
}  # fmt: skip


def header(adapter: "Adapter", tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The header's entries for user interfaces, hashes of `tensors` as stored included."""
    metadata = adapter.metadata
    data_hash = data_sha256(tensors)
    entries = {
        **metadata.get("header", {}),
        "format": "pt",
        "ss_output_name": adapter.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(float(adapter.rank)),
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "sshs_model_hash": data_hash,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": adapter.name,
        "modelspec.hash_sha256": f"0x{data_hash}",
    }
    if base := base_model(metadata):
        entries["ss_sd_model_name"] = base
    if merged := metadata.get("merged_from"):
        entries["modelspec.merged_from"] = ", ".join(str(part["name"]) for part in merged)
    described = {"description": describe(metadata), **metadata}
    for key in _MODELSPEC_FIELDS:
        if described.get(key):
            entries[f"modelspec.{key}"] = str(described[key])
    return entries


def metadata_of(header: Mapping[str, str]) -> dict[str, Any]:
    """What a file's header says: our own entry, or what a foreign header tells of the same kind.

    Entries of other tools are kept under `header`. Raises BadInput where our entry is no JSON
    object.
    """
    metadata = _own(header[METADATA_KEY]) if METADATA_KEY in header else _foreign(header)
    other = {key: value for key, value in header.items() if key not in _GENERATED}
    return metadata | {"header": other} if other else metadata


def base_model(metadata: Mapping[str, Any]) -> str | None:
    """The name of the model that the adapter was trained on."""
    model = (metadata.get("base") or {}).get("model")
    return None if model is None else str(model)


def describe(metadata: Mapping[str, Any]) -> str:
    """One sentence on what the adapter does; empty where nothing is known."""
    if metadata.get("description"):
        return str(metadata["description"])
    concepts = shortened(metadata.get("concepts", []))
    made = "Made of adapters trained" if "merged_from" in metadata else "Trained"
    model = base_model(metadata) or "Stable Diffusion 1.x"
    return f"{made} to keep {model} from drawing: {concepts}." if concepts else ""


def shortened(concepts: Iterable[Any]) -> str:
    """The first `SHOWN_CONCEPTS` of them, and how many more there are.

    "axe, in oil" is left out where "axe" is there too: the recipe and the sidecar list all of them.
    """
    listed = dict.fromkeys(map(str, concepts))
    distinct = [c for c in listed if "," not in c or c.partition(",")[0] not in listed]
    more = len(distinct) - SHOWN_CONCEPTS
    return ", ".join(distinct[:SHOWN_CONCEPTS]) + (f" and {more} more" if more > 0 else "")


def sidecar(adapter: "Adapter") -> dict[str, Any]:
    """What `<name>.json` beside the file says, under the keys that A1111 and InvokeAI read."""
    return {
        "description": describe(adapter.metadata),
        "sd version": "SD1" if adapter.fits(names.SD15) else "Unknown",
        "activation text": "",
        "preferred weight": 1.0,
        "notes": "\n".join(_notes(adapter)),
        METADATA_KEY: {k: v for k, v in adapter.metadata.items() if k != "header"},
    }


def sidecar_path(path: Path) -> Path:
    """Where user interfaces look for the sidecar of an adapter's file."""
    return path.with_suffix(".json")


def has_labels(adapter: "Adapter") -> bool:
    """Whether a sidecar would say anything: of many foreign files nothing is known."""
    return bool(describe(adapter.metadata)) or any(_notes(adapter))


def sidecar_text(adapter: "Adapter") -> str:
    return json.dumps(sidecar(adapter), indent=2, ensure_ascii=False) + "\n"


def write_sidecar(adapter: "Adapter", path: Path) -> Path:
    """Write `<name>.json` beside the adapter file `path`; returns where."""
    target = sidecar_path(Path(path))
    write_text(target, sidecar_text(adapter))
    return target


def render_card(adapter: "Adapter", metrics: Mapping[str, Any]) -> str:
    """The README of an adapter's folder: YAML front matter for the hub, then what it does.

    `metrics` follows `metrics.json`; its `measures` become a table with 95 % intervals.
    """
    return _render(adapter.metadata, metrics, adapter)


def render_weights_card(metadata: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The README of a folder of fully trained weights, which belong to no adapter."""
    return _render(metadata, metrics, None)


def _render(
    metadata: Mapping[str, Any], metrics: Mapping[str, Any], adapter: "Adapter | None"
) -> str:
    from jinja2 import Environment, StrictUndefined

    template = resources.files("sdd_lora.adapter").joinpath("card.md.jinja").read_text("utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "shortened": shortened}
    return environment.from_string(template).render(
        front_matter=_front_matter(metadata, _LORA_TAGS if adapter else ()),
        adapter=adapter,
        name=adapter.name if adapter else metadata["name"],
        parts=metadata.get("merged_from", []),
        resized=metadata.get("resized_from"),
        is_sd15=adapter is not None and adapter.fits(names.SD15),
        is_demo=adapter is not None and adapter.fits(names.DEMO),
        # InvokeAI tells the model's family by these
        sees_prompts=adapter is not None
        and any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in adapter.factors),
        description=describe(metadata),
        base=base_model(metadata),
        modules=len(adapter.factors) if adapter else 0,
        tables=_tables(metrics),
        training=metrics.get("training", {}),
        file={"bytes": None, "sha256": None} | metrics.get("adapter" if adapter else "weights", {}),
        versions=metrics.get("versions", {}),
    )


def _tables(metrics: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Titles and rows: on the model it was trained on, then on those it was carried over to."""
    where = f" on {metrics['measured_on']}" if "measured_on" in metrics else ""
    tables = [(f"Measured{where}", metrics.get("measures", []))]
    for elsewhere in metrics.get("transfer", []):
        title = f"Measured on {elsewhere['model']}, which it was not trained on"
        tables.append((title, elsewhere["measures"]))
    return [(title, rows) for title, rows in tables if rows]


def _own(text: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
        _require_writable(metadata)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise BadInput(f"the header's {METADATA_KEY} is damaged; expected a JSON object")
    metadata = {k: v for k, v in metadata.items() if k != "header" and v is not None}
    _check_fields("", metadata, _FIELDS)
    for key, fields in _ROW_FIELDS.items():
        for row in metadata.get(key, []):
            _check_fields(f"{key}: ", row, fields, required=True)
    if resized := metadata.get("resized_from"):
        _check_fields("resized_from: ", resized, {"relative_error": _NUMBER}, required=True)
    for source in (*metadata.get("merged_from", []), metadata.get("resized_from", {})):
        _check_fields("", source, _SOURCE_FIELDS)
        for identity in source.get("lineage") or []:
            _check_fields("lineage: ", {"identity": identity}, {"identity": str}, required=True)
    return metadata


def _require_writable(value: Any, levels: int = MAX_LEVELS) -> None:
    """Raises ValueError where JSON that could be read can't be written again: half a surrogate
    pair, or nesting that an encoder can't follow.
    """
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict | list):
        if levels == 0:
            raise ValueError
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            _require_writable(inner, levels - 1)


def _check_fields(
    where: str, found: Any, fields: Mapping[str, type | tuple[type, ...]], required: bool = False
) -> None:
    """What labels are made of must be of the right types: a file may say anything."""
    for key, kind in fields.items():
        value = found.get(key) if isinstance(found, dict) else None
        if (required or value is not None) and not _is_of(value, kind):
            raise BadInput(f"the header's {METADATA_KEY} is damaged: {where}{key} is {value!r:.40}")


def _is_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a value is of a kind; of numbers only those that a finite float holds."""
    if kind == _NUMBER:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _foreign(header: Mapping[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if title := header.get("modelspec.title") or header.get("ss_output_name"):
        metadata["name"] = title
    if base := header.get("ss_sd_model_name"):
        metadata["base"] = {"model": base}
    for key in _MODELSPEC_FIELDS:
        if value := header.get(f"modelspec.{key}"):
            metadata[key] = value
    return metadata


def _notes(adapter: "Adapter") -> Iterable[str]:
    if base := base_model(adapter.metadata):
        yield f"Trained on {base}."
    for part in adapter.metadata.get("merged_from", []):
        yield f"Contains {part['name']} at weight {part['weight']:g}."
    if extracted := adapter.metadata.get("extracted_from"):
        yield f"What {extracted['tuned']} changed of {extracted['base']}."
    for row in adapter.metadata.get("measures", []):
        rates = f"{_percent(row['before'])} → {_percent(row['after'])}"
        yield f"{row['name']} ({row['group']}): {rates}"


_LORA_TAGS = ("lora", "template:sd-lora")


def _front_matter(metadata: Mapping[str, Any], tags: Iterable[str]) -> str:
    import yaml

    first, last = (list(tags)[:1], list(tags)[1:])
    entries: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*first, "stable-diffusion", "safety", "concept-erasure", *last],
    }
    if license := metadata.get("license"):
        entries["license"] = license
    base = base_model(metadata)
    if base and _HUB_ID.fullmatch(base):
        entries["base_model"] = base
        shown = metadata.get("concepts", [])[:SHOWN_CONCEPTS]
        entries["widget"] = [{"text": str(concept)} for concept in shown]
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).rstrip()


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _interval(bounds: Iterable[float]) -> str:
    low, high = bounds
    return f"{100 * low:.1f}–{100 * high:.1f}"
