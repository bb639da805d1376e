"""Files of JSON lines that grow as a bench goes on, and what a kill does to them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdd_lora.files import atomic_output


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; what a kill cut short is left out."""
    path = folder / name
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]  # prompts may hold U+2028


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
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
