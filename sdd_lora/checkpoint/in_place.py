"""A bake into the model's own files: first the journal, then the tensors, then the headers."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from sdd_lora.checkpoint.copying import encode_header, insert_space, pad_header, write_at
from sdd_lora.checkpoint.editing import (
    EditedTensor,
    edit_tensor,
    fingerprints,
    workers,
    write_edits,
)
from sdd_lora.checkpoint.history import BakeRecord, metadata_with, sidecar_of, write_history
from sdd_lora.checkpoint.journal import journal_of
from sdd_lora.checkpoint.plan import BakePlan, FilePlan
from sdd_lora.checkpoint.undo import require_sole, roll_back
from sdd_lora.checkpoint.undo_file import require_writable, size_of_undo, write_undo
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import atomic_output, require_space, sync_file, sync_folder

#: At most so much is edited in memory while the journal goes to the disk.
_AHEAD_BYTES = 96 << 20


def change_in_place(plan: BakePlan, undo: Path) -> list[EditedTensor]:
    """Carry out a plan in the model's own files; the journal becomes `undo` at the end.

    The model must be locked. Raises BadInput where a file can't be changed, SddLoraError where the
    disk fails; the model is then as it was.
    """
    root = plan.checkpoint.path
    _require_changeable(plan)
    journal = journal_of(root)
    require_space(journal.absolute().parent, size_of_undo(plan))
    edited = []
    with _rolled_back_on_failure(root), ExitStack() as stack:
        files: dict[Path, BinaryIO] = {
            file.path: stack.enter_context(open(file.path, "r+b")) for file in plan.files
        }
        pool = stack.enter_context(workers())
        begun = _begin(plan, pool, files)
        with atomic_output(journal) as kept:
            rests = write_undo(kept, plan)
        for file in plan.files:  # the journal is on the disk: now, and not before
            opened = files[file.path]
            done = list(
                write_edits(
                    pool, file, plan.rounding, opened, opened, file.header, begun[file.path]
                )
            )
            before, after = fingerprints(file, opened, done)
            record = replace(plan.record, before=before, after=after, rest=rests[file.path])
            _write_record(file, record, opened)
            edited += done
        _move(journal, undo)
    return edited


def _require_changeable(plan: BakePlan) -> None:
    stale = [path for path in plan.stale if path.is_file()]
    if stale:
        raise BadInput(
            f"{stale[0]}: another copy of the weights, which isn't edited in place; "
            "remove it, or bake to a new folder, `out=DIR`"
        )
    for file in plan.files:
        require_sole(file.path, plan.checkpoint.path)
        require_writable(file.path)


def _begin(
    plan: BakePlan, pool: ThreadPoolExecutor, files: dict[Path, BinaryIO]
) -> dict[Path, dict[str, Future[EditedTensor]]]:
    """Begin to edit in memory, up to a limit, while the disk is busy with the journal."""
    begun: dict[Path, dict[str, Future[EditedTensor]]] = {file.path: {} for file in plan.files}
    size = 0
    for file in plan.files:
        for key in file.edits:
            size += file.header.tensors[key].nbytes
            if size <= _AHEAD_BYTES:
                task = pool.submit(edit_tensor, file, key, plan.rounding, files[file.path])
                begun[file.path][key] = task
    return begun


def _write_record(file: FilePlan, record: BakeRecord, opened: BinaryIO) -> None:
    """Add a record to the file's header, or to its sidecar where the header can't grow."""
    header, history = file.header, (*file.history, record)
    head = encode_header(header.tensors, metadata_with(header, history), like=header.data_start)
    text = head[8:].rstrip(b" ")
    fits = 8 + len(text) <= header.data_start
    if fits:
        head = pad_header(text, header.data_start)
    inside = fits or insert_space(opened, len(head) - header.data_start)
    if inside:
        write_at(opened, 0, head)
    opened.flush()
    sync_file(opened.fileno())  # once: until the journal goes, no order matters
    if inside:
        sidecar_of(file.path).unlink(missing_ok=True)
    else:
        write_history(file.path, history, next(iter(file.edits)))


@contextmanager
def _rolled_back_on_failure(model: Path) -> Iterator[None]:
    """Roll back at once where this process still can; after a kill the next call does it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if journal_of(model).exists():
            roll_back(model)
        if isinstance(error, OSError):
            raise SddLoraError(f"{model}: not changed: {error.strerror or error}") from error
        raise


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError:  # another disk
        with open(source, "rb") as kept, atomic_output(target) as moved:
            shutil.copyfileobj(kept, moved, 1 << 20)
        source.unlink()
    for folder in {target.parent, source.parent}:
        sync_folder(folder)
