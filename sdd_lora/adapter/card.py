"""The labels beside an adapter's file; the same adapter gives the same text.

A1111 and InvokeAI show the sidecar, `<name>.json`; the hub shows the card.
"""

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.metadata import ENTRY_KEY, SHOWN_CONCEPTS, Metadata, shortened
from sdd_lora.io.atomic import write_text

_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


def sidecar(adapter: Adapter) -> dict[str, Any]:
    """What `<name>.json` beside the file says, under the keys that A1111 and InvokeAI read."""
    return {
        "description": adapter.metadata.sentence,
        "sd version": "SD1" if adapter.fits(names.SD15) else "Unknown",
        "activation text": adapter.metadata.header.get("modelspec.trigger_phrase", ""),
        "preferred weight": 1.0,
        "notes": "\n".join(_notes(adapter)),
        ENTRY_KEY: adapter.metadata.own_entry(),
    }


def sidecar_path(path: Path) -> Path:
    """Where user interfaces look for the sidecar of an adapter's file."""
    return path.with_suffix(".json")


def has_labels(adapter: Adapter) -> bool:
    """Whether a sidecar would say anything: of many foreign files nothing is known."""
    return bool(adapter.metadata.sentence) or any(_notes(adapter))


def sidecar_text(adapter: Adapter) -> str:
    return json.dumps(sidecar(adapter), indent=2, ensure_ascii=False) + "\n"


def write_sidecar(adapter: Adapter, path: Path) -> Path:
    """Write `<name>.json` beside the adapter file `path`; returns where."""
    target = sidecar_path(Path(path))
    write_text(target, sidecar_text(adapter))
    return target


def render_card(adapter: Adapter, metrics: Mapping[str, Any]) -> str:
    """The README of an adapter's folder: YAML front matter for the hub, then what it does.

    `metrics` follows `metrics.json`; its `measures` become a table with 95 % intervals.
    """
    return _render(adapter.metadata, metrics, adapter)


def render_weights_card(metadata: Metadata, metrics: Mapping[str, Any]) -> str:
    """The README of a folder of fully trained weights, which belong to no adapter."""
    return _render(metadata, metrics, None)


def _render(metadata: Metadata, metrics: Mapping[str, Any], adapter: Adapter | None) -> str:
    from jinja2 import Environment, StrictUndefined

    template = resources.files("sdd_lora.adapter").joinpath("card.md.jinja").read_text("utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "shortened": shortened}
    return environment.from_string(template).render(
        front_matter=_front_matter(metadata, _LORA_TAGS if adapter else ()),
        adapter=adapter,
        name=metadata.name_or_default,
        parts=metadata.merged_from,
        resized=metadata.resized_from,
        is_sd15=adapter is not None and adapter.fits(names.SD15),
        is_demo=adapter is not None and adapter.fits(names.DEMO),
        # InvokeAI tells the model's family by these
        sees_prompts=adapter is not None
        and any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in adapter.factors),
        description=metadata.sentence,
        base=metadata.base_model,
        modules=len(adapter.factors) if adapter else 0,
        tables=_tables(metrics),
        black=black_note(metrics["black"]) if "black" in metrics else "",
        attacks=metrics.get("attacks", []),
        training=metrics.get("training", {}),
        file={"bytes": None, "sha256": None} | metrics.get("adapter" if adapter else "weights", {}),
        versions=metrics.get("versions", {}),
    )


def black_note(black: Mapping[str, int]) -> str:
    """What is to be said of images that are all black, `before` and `after`, of `images`."""
    return (
        f"{black['after']} of {black['images']} images drawn with it, and {black['before']} drawn "
        "without it, are all black: no detector sees anything in them, and they count in no row. "
        "Likely causes: numbers that overflow (draw in fp32), a change that is too strong, or a "
        "safety checker that blanks images"
    )


def _tables(metrics: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Titles and rows: on the model it was trained on, then on those it was carried over to."""
    where = f" on {metrics['measured_on']}" if "measured_on" in metrics else ""
    tables = [(f"Measured{where}", metrics.get("measures", []))]
    for elsewhere in metrics.get("transfer", []):
        title = f"Measured on {elsewhere['model']}, which it was not trained on"
        tables.append((title, elsewhere["measures"]))
    return [(title, rows) for title, rows in tables if rows]


def _notes(adapter: Adapter) -> Iterable[str]:
    if base := adapter.metadata.base_model:
        yield f"Trained on {base}."
    for part in adapter.metadata.merged_from:
        yield f"Contains {part.name} at weight {part.weight:g}."
    if extracted := adapter.metadata.extracted_from:
        yield f"What {extracted.tuned} changed of {extracted.base}."
    for row in adapter.metadata.measures:
        yield f"{row.name} ({row.group}): {_percent(row.before)} → {_percent(row.after)}"


_LORA_TAGS = ("lora", "template:sd-lora")


def _front_matter(metadata: Metadata, tags: Iterable[str]) -> str:
    import yaml

    first, last = (list(tags)[:1], list(tags)[1:])
    entries: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*first, "stable-diffusion", "safety", "concept-erasure", *last],
    }
    if metadata.license:
        entries["license"] = metadata.license
    base = metadata.base_model
    if base and _MODEL_ID.fullmatch(base):
        entries["base_model"] = base
        entries["widget"] = [{"text": concept} for concept in metadata.concepts[:SHOWN_CONCEPTS]]
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).rstrip()


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _interval(bounds: Iterable[float]) -> str:
    low, high = bounds
    return f"{100 * low:.1f}–{100 * high:.1f}"
