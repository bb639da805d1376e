"""Files of JSON lines that grow as the work goes on, and what a kill does to them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import write_text


@contextmanager
def appended(path: Path) -> Iterator[TextIO]:
    """A text file that grows at its end. Raises SddLoraError where it can't: a full disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise SddLoraError(f"{path}: not written: {error.strerror or error}") from error


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that grows line by line; one that a kill cut short, be it within a
    character, is left out. Raises BadInput where the file can't be read, or isn't UTF-8."""
    try:
        data = path.read_bytes()
        text = data[: data.rfind(b"\n") + 1].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: expected lines of UTF-8, can't read them: {error}") from error
    return text.split("\n")[:-1]  # and nowhere else: prompts hold odd characters


def read_lines(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The whole lines of a file, all with these `fields` of these types; none where it isn't there.

    Raises BadInput for a damaged one.
    """
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


def drop_cut_line(path: Path) -> None:
    """Take a line that a kill cut short from a file's end, so that it can be appended to."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        write_text(path, "".join(f"{line}\n" for line in whole_lines(path)))


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Lines at the end of a file; a line that a kill cut short goes first."""
    drop_cut_line(path)
    with appended(path) as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
