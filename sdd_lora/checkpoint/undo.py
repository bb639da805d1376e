"""`unbake`: a bake taken back byte for byte; and rolling back an interrupted change in place."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sdd_lora.checkpoint.history import (
    checksum_of_tensors,
    digest_of,
    digest_of_samples,
    digest_of_tensor,
    digest_of_tensors,
    history_of,
    is_metadata_of,
    sidecar_of,
)
from sdd_lora.checkpoint.journal import journal_of, require_no_journal
from sdd_lora.checkpoint.locate import named, require_apart, require_new_output
from sdd_lora.checkpoint.prediction import copy_config
from sdd_lora.checkpoint.undo_file import (
    UndoFile,
    file_of,
    header_key,
    require_writable,
    restore_sidecar,
    tensor_key,
)
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import (
    atomic_folder,
    atomic_output,
    link_tree,
    locked,
    require_space,
    sync_folder,
)
from sdd_lora.io.safetensors import Header, header_from_bytes, open_input, read_header
from sdd_lora.progress import say, warn


@dataclass(frozen=True)
class Unbaked:
    """What `unbake` did."""

    output: Path
    files: tuple[Path, ...]
    in_place: bool
    rolled_back: bool = False


def unbake(
    model: str | Path,
    undo: str | Path,
    out: str | Path | None = None,
    *,
    in_place: bool = False,
    force: bool = False,
) -> Unbaked:
    """Take a bake back, byte for byte: to `out`, or in place.

    A change that a killed in-place call left half done is rolled back first; give the journal as
    `undo` for that alone. Raises BadInput where `undo` isn't of this model, or the model has
    changed since it was baked; then nothing is written. A bake in place takes no more time than it
    must, so of the tensors that it did not edit only the beginnings are compared.
    """
    model, undo = Path(model), Path(undo)
    if in_place == (out is not None):
        raise BadInput("expected either `out=PATH` or `in_place=True`")
    if not model.exists():
        raise BadInput(f"{model}: no such file or folder")
    if in_place:
        with lock_model(model) as rolled_back:
            if rolled_back and not undo.exists():
                return Unbaked(model, (model,), True, rolled_back=True)
            return _unbake_in_place(model, UndoFile(undo))
    assert out is not None
    out = named(Path(out))
    require_new_output(out, model, force)
    require_apart(out, undo)
    return _unbake_to(out, model, UndoFile(undo))


@contextmanager
def lock_model(model: Path) -> Iterator[bool]:
    """Lock a model's files against other calls of this tool, before anything is read of them.

    An in-place change that was interrupted is rolled back first; yields whether there was one.
    Raises BadInput where another process is at work on the model, or the journal isn't of it.
    """
    with ExitStack() as stack:
        for file in _files_to_lock(model):
            stack.enter_context(locked(file))
        journal = journal_of(model)
        interrupted = journal.exists()
        if interrupted:
            UndoFile(journal).require_of(model)
            roll_back(model)
            say(f"{model}: an interrupted change was rolled back; the model is as it was before it")
        yield interrupted


def _files_to_lock(model: Path) -> list[Path]:
    """All that a change may touch, in one order; a file of two names once."""
    if not model.is_dir():
        return [model]
    found = sorted([*model.glob("*"), *model.glob("*/*")])
    named = (path for path in found if path.suffix.lower() == ".safetensors")
    stats = [(path.stat(), path) for path in named if path.is_file()]
    return list({(stat.st_dev, stat.st_ino): path for stat, path in stats}.values())


def require_sole(path: Path, model: Path) -> None:
    """Raises BadInput where a model's file has another name, under which it would change as well.

    In a hub's cache, or in a folder made of links.
    """
    elsewhere = not path.resolve().is_relative_to(model.resolve())
    if elsewhere or path.is_symlink() or path.stat().st_nlink > 1:
        raise BadInput(
            f"{path}: is linked from elsewhere too, and would change there as well; choose a new "
            "output, `out=PATH`, or copy it first"
        )


def roll_back(model: Path) -> None:
    """Put the journal's bytes back and remove it. The model must be locked."""
    journal = journal_of(model)
    UndoFile(journal).put_back(model)
    journal.unlink()
    sync_folder(journal.parent)


def free_undo_name(model: Path) -> Path:
    """The first free name for an undo file beside a model. User interfaces list no such file."""
    numbered = (model.with_name(f"{model.name}.undo{n}") for n in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def _unbake_to(out: Path, model: Path, undo: UndoFile) -> Unbaked:
    paths = _require_as_baked(model, undo)
    require_space(out.absolute().parent, sum(original.size for original in undo.files))
    with open(undo.path, "rb") as kept:
        if not model.is_dir():
            with atomic_output(out) as target:
                undo.rebuild(kept, 0, model, target)
            restore_sidecar(out, undo.files[0])
            if warning := copy_config(model, out):
                warn(warning)
            return Unbaked(out, (out,), False)
        with atomic_folder(out) as folder:
            link_tree(model, folder, leave_out=[*paths, *map(sidecar_of, paths)])
            for n, path in enumerate(paths):
                copy = folder / path.relative_to(model)
                with open(copy, "w+b") as target:
                    undo.rebuild(kept, n, path, target)
                restore_sidecar(copy, undo.files[n])
    return Unbaked(out, tuple(paths), False)


def _unbake_in_place(model: Path, undo: UndoFile) -> Unbaked:
    paths = _require_as_baked(model, undo)
    for path in paths:
        require_sole(path, model)
        require_writable(path)
    with atomic_output(journal_of(model)) as target, open(undo.path, "rb") as kept:
        shutil.copyfileobj(kept, target, 1 << 20)
    roll_back(model)
    return Unbaked(model, tuple(paths), True)


def _require_as_baked(model: Path, undo: UndoFile) -> list[Path]:
    """The files that the undo file is of; BadInput unless each is what was baked then."""
    require_no_journal(model)
    paths = [file_of(model, original.name) for original in undo.files]
    with open(undo.path, "rb") as kept:
        for n, path in enumerate(paths):
            _check_file(path, read_header(path), undo, n, kept)
    return paths


def _check_file(path: Path, header: Header, undo: UndoFile, n: int, kept: BinaryIO) -> None:
    changed = f"{path}: expected the file as it was baked, found that"
    head = undo.header_bytes(kept, n)
    original = header_from_bytes(head, undo.files[n].size, str(undo.path))
    if original.tensors != header.tensors or not is_metadata_of(header.metadata, original.metadata):
        raise BadInput(f"{changed} its header has changed since; this undo file isn't for it")
    history = history_of(path, header)
    touched = undo.files[n].tensors
    digests = [
        digest_of_tensor(kept, undo.header, name)
        for name in (header_key(n), *(tensor_key(n, key) for key in touched))
    ]
    if not history or history[-1].before != digest_of(digests):
        raise BadInput(f"{changed} this undo file isn't of its last bake")
    others = [key for key in header.tensors if key not in set(touched)]
    with open_input(path) as file:
        if digest_of_tensors(file, header, touched) != history[-1].after:
            raise BadInput(f"{changed} its edited tensors have changed since")
        digest = checksum_of_tensors if history[-1].whole else digest_of_samples
        if digest(file, header, others) != history[-1].rest:
            raise BadInput(f"{changed} its other tensors have changed since")
