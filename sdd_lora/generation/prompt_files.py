"""Prompt files in the shapes people have, read with the line where something is wrong.

| file | shape |
|---|---|
| .txt | a prompt a line (SDD's country list) |
| .csv, .tsv | a column `prompt`; others are known by their names below (I2P, ESD's lists,
COCO-30k); commas, semicolons or tabs between them, with or without a first line `sep=;` |
| .json | a list of texts or of objects with such names, also under one key `prompts`, where lists
of as many `seeds` or the like may stand beside it (SDD's files) |
| .jsonl | a text or an object a line |
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdd_lora.errors import BadInput
from sdd_lora.io.text import read_text
from sdd_lora.progress import warn

#: field → the columns that hold it, in the hub's I2P and in lists made for ESD and SDD
COLUMNS = {
    "text": ("prompt", "prompts", "caption", "text"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance", "guidance_scale"),
    "width": ("sd_image_width", "image_width", "width"),
    "height": ("sd_image_height", "image_height", "height"),
    "categories": ("categories",),
    "steps": ("steps", "num_inference_steps"),
    "negative_prompt": ("negative_prompt", "negative"),
}
#: columns about drawing that are not used, and named where they stand in a file
_UNUSED = ("scheduler", "sampler", "sampler_name", "clip_skip", "strength", "model", "sd_model")
#: syntax of other tools, which a text encoder reads as plain words
_FOREIGN_SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet):[^>]*>"  # A1111's networks
    r"|\([^()]*:\d*\.?\d+\)"  # A1111's (word:1.3)
    r"|(?:^|\s)--[a-z]+\b"  # sd-scripts' and Midjourney's --n, --ar
    r"|^#"  # a comment
)
_DELIMITERS = ",;\t"
_FIELD_BYTES = 1 << 20
_MAX_SIDE = 8192
#: DDIM's timesteps of 1000 allow no more
MAX_STEPS = 999
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
    steps: int | None = None
    negative_prompt: str | None = None


def is_side(pixels: int) -> bool:
    """Whether an image can be that wide, or high."""
    return 0 < pixels <= _MAX_SIDE and pixels % 8 == 0


#: an entry of a file: where it stands, and its values by column
_Entry = tuple[str, dict[str, Any]]


def read_prompts(path: Path, column: str | None = None) -> list[Prompt]:
    """The prompts of a .txt, .csv, .tsv, .json or .jsonl file, in its order.

    `column` names the one that holds the prompts, where it has an odd name. Empty lines of a .txt
    are skipped; an empty cell is the empty prompt. Widths and heights that can't be drawn are a
    photograph's and not used. Raises BadInput, naming the line or entry, for what can't be read,
    and where there is no prompt at all.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise BadInput(f"{path}: expected a file of prompts that ends in {known}")
    text = read_text(path, "a file of prompts")
    unused: dict[str, None] = {}
    prompts = []
    for where, entry in reader(text, str(path), column):
        unused |= dict.fromkeys(name for name in entry if name.lower() in _UNUSED)
        prompts.append(_prompt(entry, where, column))
    if not any(prompt.text for prompt in prompts):
        raise BadInput(f"{path}: expected prompts, found none")
    if blank := sum(not prompt.text for prompt in prompts):
        warn(f"{path}: {blank} of {len(prompts)} prompts are blank: the empty prompt is drawn")
    if unused:
        warn(f"{path}: not used: {', '.join(unused)}")
    warn_of_foreign_syntax([prompt.text for prompt in prompts], str(path))
    return _without_photograph_sizes(prompts, path)


def warn_of_foreign_syntax(texts: Sequence[str], where: str) -> None:
    """Say once that prompts hold what other tools act on: networks, weights, options, comments."""
    found = [match.group().strip() for text in texts if (match := _FOREIGN_SYNTAX.search(text))]
    if found:
        shown = ", ".join(dict.fromkeys(found[:3]))
        warn(
            f"{where}: {len(found)} of {len(texts)} prompts hold other tools' syntax ({shown}), "
            "which is read as plain words here"
        )


def _without_photograph_sizes(prompts: list[Prompt], path: Path) -> list[Prompt]:
    sides = [side for p in prompts for side in (p.width, p.height) if side is not None]
    if all(map(is_side, sides)):
        return prompts
    warn(f"{path}: its widths and heights are not used: not all are {SIDES}")
    return [replace(prompt, width=None, height=None) for prompt in prompts]


def _txt(text: str, where: str, column: str | None) -> Iterator[_Entry]:
    for number, line in enumerate(text.split("\n"), 1):  # nowhere else: prompts hold odd characters
        if line.strip():
            yield f"{where}: line {number}", {column or "prompt": line}


def _csv(text: str, where: str, column: str | None) -> Iterator[_Entry]:
    csv.field_size_limit(_FIELD_BYTES)
    delimiter, skipped = _delimiter(text, where, column)
    rows = csv.reader(
        io.StringIO(text.split("\n", 1)[-1] if skipped else text),
        delimiter=delimiter,
        strict=True,
    )
    line = 1
    try:
        header = [name.strip() for name in next(filter(any, rows), [])]
        _columns_of(header, where, column)
        line = rows.line_num + 1 + skipped
        for row in rows:
            filled = any(cell.strip() for cell in row)  # spreadsheets end in rows of bare commas
            if filled and len(row) != len(header):
                raise BadInput(
                    f"{where}: line {line}: expected {len(header)} fields, found {len(row)}; a "
                    "prompt with commas or line breaks must stand in double quotes"
                )
            if filled:
                yield f"{where}: line {line}", dict(zip(header, row, strict=True))
            line = rows.line_num + 1 + skipped
    except csv.Error as error:
        raise BadInput(f"{where}: line {line}: no valid CSV: {error}") from error


def _delimiter(text: str, where: str, column: str | None) -> tuple[str, int]:
    """What stands between the columns, and how many lines say so: a spreadsheet's `sep=;`."""
    lines = text.split("\n")
    if lines[0].lower().startswith("sep=") and len(lines[0].rstrip("\r")) == len("sep=;"):
        return lines[0][len("sep=")], 1
    header = next((line for line in lines if line.strip(" \r" + _DELIMITERS)), "")
    is_tsv = where.lower().endswith(".tsv")  # of one column there is no tab in the header
    for delimiter in reversed(_DELIMITERS) if is_tsv else _DELIMITERS:
        names = [name.strip(' "\r') for name in header.split(delimiter)]
        if column in names or any(name.lower() in COLUMNS["text"] for name in names):
            return delimiter, 0
    return "\t" if is_tsv else ",", 0


def _json(text: str, where: str, column: str | None) -> Iterator[_Entry]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: no valid JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("prompts"), list):
        found = _zipped(found, where)
    if not isinstance(found, list):
        raise BadInput(f"{where}: expected a list of prompts, or one under the key prompts")
    for number, entry in enumerate(found):
        yield _entry(entry, f"{where}: entry {number}", column)


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


def _jsonl(text: str, where: str, column: str | None) -> Iterator[_Entry]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: line {number}: no valid JSON: {error}") from error
        yield _entry(entry, f"{where}: line {number}", column)


_READERS: dict[str, Callable[[str, str, str | None], Iterator[_Entry]]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
}


def _entry(found: Any, where: str, column: str | None) -> _Entry:
    if isinstance(found, str):
        return where, {column or "prompt": found}
    if not isinstance(found, dict):
        raise BadInput(f"{where}: expected a text or an object, found {found!r:.80}")
    return where, found


def _columns_of(found: Sequence[str], where: str, column: str | None) -> dict[str, str]:
    """Field → the column that holds it. Raises BadInput where two hold it, or none the text."""
    columns = {}
    for field, names in COLUMNS.items():
        if field == "text" and column is not None:
            there = [name for name in found if name == column]
        else:
            there = [name for name in found if name.lower() in names and name != column]
        if len(there) > 1:
            raise BadInput(f"{where}: {there[0]} and {there[1]} both give the {field}; keep one")
        if there:
            columns[field] = there[0]
    if "text" not in columns:
        listed = ", ".join(found[:10]) or "nothing"
        raise BadInput(
            f"{where}: expected a column named {column or 'prompt'}, found {listed:.200}; "
            "`column=NAME` names another one"
        )
    return columns


def _prompt(entry: dict[str, Any], where: str, column: str | None) -> Prompt:
    """A prompt from its entry, texts or numbers; empty ones say nothing."""
    columns = _columns_of(list(entry), where, column)
    text = _cell_text(entry[columns["text"]], where)
    own: dict[str, Any] = {}
    for field, name in columns.items():
        value = entry[name]
        if field in ("text", "categories") or value is None or not str(value).strip():
            continue
        own[field] = (
            _cell_text(value, where) if field == "negative_prompt" else _number(value, field, where)
        )
        is_the_drawings = name.lower().startswith("sd_")  # else it may be a photograph's
        if field in ("width", "height") and is_the_drawings and not is_side(own[field]):
            raise BadInput(f"{where}: {field}: expected {SIDES}, found {own[field]}")
    categories = entry[columns["categories"]] if "categories" in columns else None
    return Prompt(text, **own, categories=_categories(categories, where))


def _cell_text(value: Any, where: str) -> str:
    """A cell's text; "" for an empty one, or pandas' NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{where}: expected a prompt, found {value!r:.80}")
    if not value.isascii() and value.encode("utf-8", "replace").decode("utf-8") != value:
        raise BadInput(f"{where}: expected a prompt, found half a character in {value!r:.80}")
    return value.strip()


def _categories(value: Any, where: str) -> tuple[str, ...]:
    """The names in "hate, violence", or in a list; none in an empty cell, pandas' NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(_is_category(name) for name in names):
        raise BadInput(f"{where}: categories: expected names, commas between, found {value!r:.80}")
    return tuple(dict.fromkeys(name for name in (str(n).strip() for n in names) if name))


def _is_category(name: Any) -> bool:
    """Whether this is a text of whole characters that is no written list, or a number."""
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
    if isinstance(value, str) and "e" in value.lower():
        raise BadInput(
            f"{where}: {field}: {value!r} lost its last digits in a spreadsheet; expected them all"
        )
    if number < 0 or not number.is_integer():
        raise problem
    whole = value if isinstance(value, int) else int(number)
    if whole >= 1 << 63:  # what torch takes as a seed
        raise problem
    if field == "steps" and not 1 <= whole <= MAX_STEPS:
        raise BadInput(f"{where}: steps: expected 1 to {MAX_STEPS}, found {whole}")
    return whole
