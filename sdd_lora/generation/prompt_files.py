"""Prompt files in the shapes people have, read with the line where something is wrong.

| file | shape |
|---|---|
| .txt | a prompt a line (SDD's country list) |
| .csv | a column `prompt`; others are known by their names below (I2P, ESD's lists, COCO-30k) |
| .json | a list of texts or of objects with such names, also under one key `prompts`, where lists
of as many `seeds` or the like may stand beside it (SDD's files) |
| .jsonl | a text or an object a line |
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd_lora.errors import BadInput

#: field → the columns that hold it, in the hub's I2P and in lists made for ESD and SDD
COLUMNS = {
    "text": ("prompt", "prompts", "caption", "text"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance", "guidance_scale"),
    "width": ("sd_image_width", "image_width", "width"),
    "height": ("sd_image_height", "image_height", "height"),
    "categories": ("categories",),
}
_FIELD_BYTES = 1 << 20
_MAX_SIDE = 8192
#: what a width or a height must be
SIDES = f"a multiple of 8, up to {_MAX_SIDE} pixels"


@dataclass(frozen=True)
class Prompt:
    """A prompt with what its file says about drawing it; None where it says nothing.

    `width` and `height` count pixels. `categories` are I2P's, of which a prompt may have several.
    """

    text: str
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    categories: tuple[str, ...] = ()


def is_side(pixels: int) -> bool:
    """Can a picture be that wide, or high?"""
    return 0 < pixels <= _MAX_SIDE and pixels % 8 == 0


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a .txt, .csv, .json or .jsonl file, in its order.

    Empty lines of a .txt are skipped. Raises BadInput, naming the line or entry, for what can't be
    read, and where there is no prompt at all.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise BadInput(f"{path}: expected a file of prompts that ends in {known}")
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: expected a file of prompts, can't read it: {error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: {error}; save it as UTF-8") from error
    prompts = list(reader(text, str(path)))
    if not prompts:
        raise BadInput(f"{path}: expected prompts, found none")
    return prompts


def _txt(text: str, where: str) -> Iterator[Prompt]:
    for line in text.split("\n"):  # and nowhere else: prompts hold odd characters
        if line.strip():
            yield Prompt(line.strip())


def _csv(text: str, where: str) -> Iterator[Prompt]:
    csv.field_size_limit(_FIELD_BYTES)
    rows = csv.reader(io.StringIO(text), strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(filter(any, rows), [])]
        columns = _columns_of(header, where)
        line = rows.line_num + 1
        for row in rows:
            told = any(cell.strip() for cell in row)  # spreadsheets end in rows of bare commas
            if told and len(row) != len(header):
                raise BadInput(
                    f"{where}: line {line}: expected {len(header)} fields, found {len(row)}; a "
                    "prompt with commas or line breaks must stand in double quotes"
                )
            if told:
                cells = {field: row[header.index(name)] for field, name in columns.items()}
                yield _prompt(cells, f"{where}: line {line}")
            line = rows.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{where}: line {line}: no valid CSV: {error}") from error


def _json(text: str, where: str) -> Iterator[Prompt]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: no valid JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("prompts"), list):
        found = _zipped(found, where)
    if not isinstance(found, list):
        raise BadInput(f"{where}: expected a list of prompts, or one under the key prompts")
    for number, entry in enumerate(found):
        yield _from_entry(entry, f"{where}: entry {number}")


def _zipped(found: dict[str, Any], where: str) -> list[Any]:
    """{"prompts": [a, b], "seeds": [1, 2]} → [{"prompt": a, "seed": 1}, {"prompt": b, "seed": 2}].

    Raises BadInput for seeds, guidance or sizes that are not as many as the prompts; `categories`
    that are not are taken for a list of the file's own (COCO has one).
    """
    entries, known = found["prompts"], {name for names in COLUMNS.values() for name in names}
    lowered = {name: name.lower() for name in found if name != "prompts"}
    columns = {n: low if low in known else low.removesuffix("s") for n, low in lowered.items()}
    for name, column in columns.items():
        if column not in known:
            continue
        values = found[name]
        if not isinstance(values, list) or len(values) != len(entries):
            if column == "categories":
                continue
            count = f"{len(values)}" if isinstance(values, list) else f"{values!r:.80}"
            raise BadInput(
                f"{where}: {name}: expected a list of {len(entries)}, one a prompt, found {count}"
            )
        entries = [
            (entry if isinstance(entry, dict) else {"prompt": entry}) | {column: value}
            for entry, value in zip(entries, values, strict=True)
        ]
    return entries


def _jsonl(text: str, where: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: line {number}: no valid JSON: {error}") from error
        yield _from_entry(entry, f"{where}: line {number}")


_READERS: dict[str, Callable[[str, str], Iterator[Prompt]]] = {
    ".txt": _txt, ".csv": _csv, ".json": _json, ".jsonl": _jsonl,
}  # fmt: skip


def _from_entry(entry: Any, where: str) -> Prompt:
    if isinstance(entry, str):
        return _prompt({"text": entry}, where)
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: expected a text or an object, found {entry!r:.80}")
    columns = _columns_of(list(entry), where)
    return _prompt({field: entry[name] for field, name in columns.items()}, where)


def _columns_of(found: list[str], where: str) -> dict[str, str]:
    """Field → the column that holds it. Raises BadInput where two hold it, or none the text."""
    columns = {}
    for field, names in COLUMNS.items():
        there = [name for name in found if name.lower() in names]
        if len(there) > 1:
            raise BadInput(f"{where}: {there[0]} and {there[1]} both give the {field}; keep one")
        if there:
            columns[field] = there[0]
    if "text" not in columns:
        listed = ", ".join(found[:10]) or "nothing"
        raise BadInput(f"{where}: expected a column named prompt, found {listed:.200}")
    return columns


def _prompt(cells: dict[str, Any], where: str) -> Prompt:
    """A prompt from its cells, texts or numbers; empty ones say nothing."""
    text = cells["text"]
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"{where}: expected a prompt, found {text!r:.80}")
    if not text.isascii() and text.encode("utf-8", "replace").decode("utf-8") != text:
        raise BadInput(f"{where}: expected a prompt, found half a character in {text!r:.80}")
    told: dict[str, Any] = {
        field: _number(value, field, where)
        for field, value in cells.items()
        if field not in ("text", "categories") and value is not None and str(value).strip()
    }
    for field in ("width", "height"):
        if field in told and not is_side(told[field]):
            raise BadInput(f"{where}: {field}: expected {SIDES}, found {told[field]}")
    return Prompt(text.strip(), **told, categories=_categories(cells.get("categories"), where))


def _categories(value: Any, where: str) -> tuple[str, ...]:
    """The names in "hate, violence", or in a list; none in an empty cell, pandas' NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(_is_category(name) for name in names):
        raise BadInput(f"{where}: categories: expected names, commas between, found {value!r:.80}")
    return tuple(dict.fromkeys(name for name in (str(n).strip() for n in names) if name))


def _is_category(name: Any) -> bool:
    """A text of whole characters that is no written list, or a number."""
    if not isinstance(name, str):
        return isinstance(name, int)
    whole = name.encode("utf-8", "replace").decode("utf-8") == name
    return whole and not name.strip().startswith(("[", "{"))


def _number(value: Any, field: str, where: str) -> int | float:
    """A cell's number: guidance as it is, the others whole (pandas writes 7 as 7.0)."""
    expected = "a number" if field == "guidance" else "a whole number from 0 up"
    problem = BadInput(f"{where}: {field}: expected {expected}, found {value!r:.80}")
    try:
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise problem from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise problem
    if field == "guidance":
        return number
    if number < 0 or not number.is_integer():
        raise problem
    whole = value if isinstance(value, int) else int(number)
    if whole >= 1 << 63:  # what torch takes as a seed
        raise problem
    return whole
