"""Files of JSON lines that grow as a bench goes on, and what a kill does to them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import appended, atomic_output, whole_lines


def read_lines(folder: Path, name: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, all with these `fields` of these types; what a kill cut
    short is left out. Raises BadInput for one that is damaged."""
    path = folder / name
    lines = whole_lines(path) if path.exists() else []
    try:
        found = [dict(json.loads(line)) for line in lines]
        for line in found:
            for field, kind in fields.items():
                if not isinstance(line.get(field), kind):
                    raise ValueError(f"found {line.get(field)!r:.80} as {field}")
        return found
    except (ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: expected a JSON object a line: {error}; delete the file and run again: what "
            "it held is found anew"
        ) from error


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What is the same along a row of pictures: set, prompt, seed, and guidance and size where they
    are the picture's own."""
    fields = ("kind", "set", "prompt", "seed", "guidance", "width", "height")
    return tuple(line.get(field) for field in fields)


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Lines at the end of a file; a line that a kill cut short goes first."""
    if path.exists():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):
            with atomic_output(path) as file:
                file.write(whole[: whole.rfind(b"\n") + 1])
    with appended(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
