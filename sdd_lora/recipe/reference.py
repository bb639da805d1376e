"""The reference of a recipe's fields, in Markdown, from the fields themselves."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from sdd_lora.recipe.presets import PRESETS
from sdd_lora.recipe.recipe import Recipe

_TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false"}
_BOUNDS = {
    "minimum": "≥",
    "ge": "≥",
    "exclusiveMinimum": ">",
    "gt": ">",
    "maximum": "≤",
    "le": "≤",
    "exclusiveMaximum": "<",
    "lt": "<",
}


def reference() -> str:
    """Every field: what it may hold, its default, what it does; then what the presets set."""
    schema = Recipe.model_json_schema()
    lines = ["## Fields of a recipe", ""]
    lines += _fields(schema, schema["$defs"])
    lines += ["", "## Presets", ""]
    for name, fields in PRESETS.items():
        changed = ", ".join(f"`{path}: {_as_written(value)}`" for path, value in _leaves(fields))
        lines += _item(f"`{name}`: {changed or 'the defaults'}")
    return "\n".join(lines) + "\n"


def _fields(schema: Mapping[str, Any], kinds: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The fields of a section, and below them those of the sections in it."""
    sections = []
    for name, field in schema["properties"].items():
        section = field.get("$ref") or field.get("anyOf", [{}])[0].get("$ref")
        if section:
            sections.append((name, kinds[section.rpartition("/")[2]]))
        elif "description" in field:  # a field that is gone has none
            kind = _kind_of_field(field)
            if name in schema.get("required", ()):
                default = "required"
            else:
                default = f"default {_as_written(field['default'])}"
            yield from _item(f"`{above}{name}` ({kind}; {default}): {field['description']}")
    for name, section in sections:
        yield from ("", f"### {above}{name}", "", *_wrapped_lines(section["description"]), "")
        yield from _fields(section, kinds, f"{above}{name}.")


def _kind_of_field(field: Mapping[str, Any]) -> str:
    """What a field may hold, in words."""
    if "anyOf" in field:
        return _kind_of_field(field["anyOf"][0])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if field["type"] == "array":
        choices = field["items"].get("enum")
        return f"list of {', '.join(choices)}" if choices else "list of texts"
    bounds = [f"{sign} {field[key]}" for key, sign in _BOUNDS.items() if key in field]
    return f"{_TYPES.get(field['type'], 'text')} {' and '.join(bounds)}".strip()


def _leaves(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _as_written(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _item(text: str) -> list[str]:
    return _wrapped_lines(f"- {text}", indent="  ")


def _wrapped_lines(text: str, indent: str = "") -> list[str]:
    plain = " ".join(text.split())
    return textwrap.wrap(
        plain, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
