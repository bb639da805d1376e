"""The labels beside an adapter's file; the same adapter gives the same text.

A1111 and InvokeAI show the sidecar, `<name>.json`; the hub shows the card.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.metadata import ENTRY_KEY, SHOWN_CONCEPTS, Metadata, shortened
from sdd_lora.adapter.metrics import BlackImages, CardRow, FileNumbers, Metrics
from sdd_lora.io.atomic import write_text
from sdd_lora.io.strict_yaml import at

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


def render_card(adapter: Adapter, metrics: Metrics) -> str:
    """The README of an adapter's folder: YAML front matter for the hub, then what it does.

    The `measures` of the metrics become a table with 95 % intervals.
    """
    return _render(adapter.metadata, metrics, adapter)


def render_weights_card(metadata: Metadata, metrics: Metrics) -> str:
    """The README of a folder of fully trained weights, which belong to no adapter."""
    return _render(metadata, metrics, None)


def _render(metadata: Metadata, metrics: Metrics, adapter: Adapter | None) -> str:
    from jinja2 import Environment, StrictUndefined

    template = resources.files("sdd_lora.adapter").joinpath("card.md.jinja").read_text("utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "shortened": shortened}
    base = metadata.base_model
    return environment.from_string(template).render(
        front_matter=_front_matter(metadata, adapter),
        adapter=adapter,
        portable=adapter is not None and adapter.is_portable,
        name=metadata.name_or_default,
        metadata=metadata,
        metrics=metrics,
        in_plain_numbers=[*_in_plain_numbers(metrics.measures)],
        pictures=[*_pictures(metrics)],
        made=_made(metadata),
        is_sd15=adapter is not None and adapter.fits(names.SD15),
        is_demo=adapter is not None and adapter.fits(names.DEMO),
        # InvokeAI tells the model's family by these
        sees_prompts=adapter is not None
        and any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in adapter.factors),
        base=base,
        hub_base=base if base and _MODEL_ID.fullmatch(base) else None,
        tables=_tables(metrics),
        black=black_note(metrics.black) if metrics.black else "",
        training=metrics.training.as_json(),
        file=(metrics.adapter if adapter else metrics.weights) or FileNumbers(),
    )


def black_note(black: BlackImages) -> str:
    """What is to be said of images that are all black."""
    return (
        f"{black.after} of {black.images} images drawn with it, and {black.before} drawn "
        "without it, are all black: no detector sees anything in them, and they count in no row. "
        "Likely causes: numbers that overflow (draw in fp32), a change that is too strong, or a "
        "safety checker that blanks images"
    )


def _tables(metrics: Metrics) -> list[tuple[str, Sequence[CardRow]]]:
    """Titles and rows: on the model it was trained on, then on those it was carried over to."""
    where = f" on {metrics.measured_on}" if metrics.measured_on else ""
    tables = [(f"Measured{where}", metrics.measures)]
    for elsewhere in metrics.transfer:
        title = f"Measured on {elsewhere.model}, which it was not trained on"
        tables.append((title, elsewhere.measures))
    return [(title, rows) for title, rows in tables if rows]


def _in_plain_numbers(rows: Iterable[CardRow]) -> Iterator[str]:
    """A sentence on each concept, and one on what suffers most of what is kept."""
    kept = []
    for row in rows:
        before, after = _percent(row.before), _percent(row.after)
        images = f"of {row.n} images"
        if row.name == "concept drawn":
            yield (
                f"Asked for the concept ({row.group}), it is drawn in {after} {images}; without "
                f"this file in {before}."
            )
        elif row.name.startswith("flagged by "):
            detector = row.name.removeprefix("flagged by ")
            yield (
                f"Asked for the concept, {after} {images} are flagged by {detector}; without this "
                f"file {before}."
            )
        elif row.name == "noun kept":
            kept.append(row)
    if kept:
        worst = min(kept, key=lambda row: row.after - row.before)
        before, after = _percent(worst.before), _percent(worst.after)
        yield f"What loses most of what is kept: {worst.group}, {before} → {after}."


def picture_of(model: str | None) -> str:
    """The file of the picture of before and after: on the model that it was trained on, None, or on
    another one."""
    if model is None:
        return "before-after.png"
    return f"before-after-{re.sub(r'[^A-Za-z0-9._-]+', '-', model)}.png"


def _pictures(metrics: Metrics) -> Iterator[tuple[str, str]]:
    """Files and captions of the pictures that were drawn while measuring."""
    caption = "Above: the model itself. Below: the same prompts and seeds with this file"
    if metrics.measures:
        yield picture_of(None), f"{caption}."
    for elsewhere in metrics.transfer:
        if elsewhere.measures:
            yield picture_of(elsewhere.model), f"{caption}, on {elsewhere.model}."


#: `lora.init` → where a training starts, in words
_STARTS_IN_WORDS = {
    "random": "a random start, a change of 0",
    "concepts": "a change of 0 along the concepts' directions in closed form",
    "closed-form": "a closed-form solution over the prompts' embeddings, without an image",
    "words": "the closed-form solution of sdd-lora erase, from words alone, without an image",
}


def _made(metadata: Metadata) -> str:
    """What was trained and what is closed form, as far as the metadata tells; "" for nothing."""
    if words := metadata.words:
        kept = f"It keeps the {words.vocabulary or 'most'} most frequent words of the tokenizer"
        named = f" and {len(words.keep)} that were named" if words.keep else ""
        near = f" Words too near to stay: {shortened(words.near)}." if words.near else ""
        return (
            "Nothing was trained: it is solved in closed form from words alone, without an image "
            f"or a pass of the UNet. {kept}{named}.{near}"
        )
    if extracted := metadata.extracted_from:
        return f"It is what `{extracted.tuned}` changed of `{extracted.base}`, cut to a low rank."
    kind = at(metadata.recipe, ["objective", "kind"])
    iterations = at(metadata.recipe, ["training", "iterations"])
    if metadata.merged_from or kind is None or iterations is None:
        return ""
    init = str(at(metadata.recipe, ["lora", "init"]))
    start = _STARTS_IN_WORDS.get(init, f"another adapter, `{init}`")
    if metadata.started_from:
        source = metadata.started_from
        start = f"another adapter, {source.name} (SHA-256 `{source.sha256}`)"
    held = len(at(metadata.recipe, ["preserve", "prompts"]) or [])
    held += at(metadata.recipe, ["preserve", "vocabulary"]) or 0
    many = "1 prompt is" if held == 1 else f"{held:,} prompts are"
    kept = f" {many} held to the base meanwhile." if held else ""
    if iterations == 0:
        return f"Nothing was trained: it is {start}."
    if at(metadata.recipe, ["parameters"]) == "full":
        return f"Trained by {kind} for {iterations:,} iterations, the weights themselves.{kept}"
    return f"Trained by {kind} for {iterations:,} iterations, from {start}.{kept}"


def _notes(adapter: Adapter) -> Iterator[str]:
    if base := adapter.metadata.base_model:
        yield f"Trained on {base}."
    for part in adapter.metadata.merged_from:
        yield f"Contains {part.name} at weight {part.weight:g}."
    if extracted := adapter.metadata.extracted_from:
        yield f"What {extracted.tuned} changed of {extracted.base}."
    for row in adapter.metadata.measures:
        yield f"{row.name} ({row.group}): {_percent(row.before)} → {_percent(row.after)}"


def _front_matter(metadata: Metadata, adapter: Adapter | None) -> str:
    import yaml

    is_lora = adapter is not None and not adapter.is_portable
    first, last = (["lora"], ["template:sd-lora"]) if is_lora else ([], [])
    entries: dict[str, Any] = {
        "library_name": "diffusers" if is_lora or adapter is None else "sdd_lora",
        "pipeline_tag": "text-to-image",
        "tags": [*first, "stable-diffusion", "safety", "concept-erasure", *last],
    }
    if metadata.license:
        entries["license"] = metadata.license
    base = metadata.base_model
    if base and _MODEL_ID.fullmatch(base):
        entries["base_model"] = base
        if adapter is not None:
            entries["base_model_relation"] = "adapter"
        entries["widget"] = [{"text": concept} for concept in metadata.concepts[:SHOWN_CONCEPTS]]
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).rstrip()


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _interval(bounds: Iterable[float]) -> str:
    low, high = bounds
    return f"{100 * low:.1f}–{100 * high:.1f}"
