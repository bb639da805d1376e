"""Journals of changes in place: where they lie, and refusing a model that one was left beside.

A journal lies beside a model's file, or inside its folder, for as long as the change takes. A model
that has one is between two states.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from sdd_lora.errors import BadInput

_FOLDER_JOURNAL = ".sdd-lora-journal"


def journal_of(path: Path) -> Path:
    """Where the journal of a change in place lies, beside a file or inside a folder."""
    return path / _FOLDER_JOURNAL if path.is_dir() else path.with_name(f"{path.name}.journal")


def require_no_journal(path: Path) -> None:
    """Raises BadInput where a change in place is half-way.

    Of this model under whichever name, of a folder that it is in, or of a file in it.
    """
    for journal in filter(Path.exists, _journals_about(path)):
        model = journal.parent if journal.name == _FOLDER_JOURNAL else journal.with_suffix("")
        command = shlex.join(["sdd-lora", "unbake", str(model), str(journal), "--in-place"])
        raise BadInput(
            f"{model}: a change in place is under way, or was interrupted; where none is running, "
            f"roll it back: {command}"
        )


def _journals_about(path: Path) -> Iterator[Path]:
    yield journal_of(path)
    real = path.resolve()
    yield journal_of(real)
    yield from map(journal_of, real.parents[:2])  # a file in unet/ is in the model's folder too
    for pattern in ("*.safetensors.journal", "*/*.safetensors.journal", f"*/{_FOLDER_JOURNAL}"):
        yield from path.glob(pattern)
