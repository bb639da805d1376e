"""Text files that people write or name: recipes, benches, lists, results."""

import difflib
from pathlib import Path

from sdd_lora.errors import BadInput


def read_text(path: Path, expected: str) -> str:
    """A file's text: UTF-8, with or without the mark that Windows' editors put before it.

    Raises BadInput, which says what was `expected`, for a file that is not there, of whose folder
    the likest name is told, and for what is no text.
    """
    if path.is_dir():
        raise BadInput(f"{path}: expected {expected}, found a folder")
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, 1)
        meant = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise BadInput(f"{path}: expected {expected}, found no such file{meant}") from None
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: expected {expected}, found no UTF-8 at byte {error.start}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise BadInput(f"{path}: expected {expected}, can't read it: {error.strerror}") from error
