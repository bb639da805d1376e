"""The way back: original bytes in an undo file, and `unbake`, which puts them where they were.

An undo file is a safetensors file: of every file that was changed it holds the header as it stood
and the tensors that were edited. It is also the journal of an in-place change: while a file named
by `journal_of` lies beside a model, that model is between two states, and putting the journal's
bytes back makes it whole. A model of the same name may have taken its place since; so the file says
by size and by samples of the tensors that no change touches which one it belongs to.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from sdd_lora.checkpoint import history as provenance
from sdd_lora.checkpoint.copying import (
    PAGE_BYTES,
    Segment,
    copy_range,
    encode_header,
    read_pieces,
    write_at,
)
from sdd_lora.checkpoint.layout import journal_of, require_settled
from sdd_lora.checkpoint.locate import named, require_apart
from sdd_lora.checkpoint.room import remove_room
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import (
    atomic_folder,
    atomic_output,
    link_tree,
    locked,
    refuse_existing,
    require_space,
    sync_folder,
    write_text,
)
from sdd_lora.io.safetensors import (
    Header,
    TensorInfo,
    header_from_bytes,
    open_input,
    read_header,
)
from sdd_lora.progress import say

METADATA_KEY = "sdd_lora.undo"


@dataclass(frozen=True)
class Original:
    """What an undo file keeps of one file: its name in the model, its size, and its sidecar.

    `rest` is the fingerprint of the tensors that it doesn't keep, by the beginning of each.
    """

    name: str
    size: int
    sidecar: str | None
    tensors: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class _Content:
    """What an undo file says of itself in its header."""

    version: Literal[3]
    files: tuple[Original, ...]


@dataclass(frozen=True)
class Unbaked:
    """What `unbake` did."""

    output: Path
    files: tuple[Path, ...]
    in_place: bool
    rolled_back: bool = False


class Undo:
    """An undo file, read by range. Raises BadInput where it is none, or damaged."""

    def __init__(self, path: Path) -> None:
        from pydantic import TypeAdapter, ValidationError

        self.path = Path(path)
        self.header = read_header(self.path)
        where = f"{path}: expected an undo file, as `sdd-lora bake --undo` writes them"
        text = self.header.metadata.get(METADATA_KEY)
        if text is None:
            raise BadInput(where)
        try:
            self.files = TypeAdapter(_Content).validate_json(text).files
        except ValidationError as error:
            raise BadInput(f"{where}; found: {error.errors()[0]['msg']}") from error
        if not self.files:
            raise BadInput(f"{where}; found one that keeps nothing")
        for n, file in enumerate(self.files):
            inside = not Path(file.name).is_absolute() and ".." not in Path(file.name).parts
            if not inside or not {_header_key(n), *(_key(n, t) for t in file.tensors)} <= set(
                self.header.tensors
            ):
                raise BadInput(f"{where}; found one that is incomplete: {file.name}")

    def header_bytes(self, file: BinaryIO, n: int) -> bytes:
        return b"".join(read_pieces(file, self.header, _header_key(n)))

    def require_of(self, model: Path) -> None:
        """Raises BadInput where this isn't of the model's files, in whatever state a change left
        them, or one of them can't be written."""
        with open(self.path, "rb") as kept:
            for n, original in enumerate(self.files):
                path = file_of(model, original.name)
                if not path.is_file() or not self._is_of(kept, n, path):
                    raise BadInput(
                        f"{path}: expected the file whose change was interrupted, found another; "
                        f"nothing was put back; where that one is gone for good, remove {self.path}"
                    )
                require_writable(path)

    def _is_of(self, kept: BinaryIO, n: int, path: Path) -> bool:
        original = self.files[n]
        header = header_from_bytes(self.header_bytes(kept, n), original.size, str(self.path))
        moved = path.stat().st_size - original.size  # by whole pages of header
        if moved % PAGE_BYTES or header.data_start + moved < 8:
            return False
        others = [key for key in header.tensors if key not in set(original.tensors)]
        with open_input(path) as file:
            there = Header(header.tensors, {}, header.data_start + moved)
            return provenance.digest_of_samples(file, there, others) == original.rest

    def put_back(self, model: Path) -> None:
        """Write the original bytes into a model's files, wherever a change stopped."""
        with open(self.path, "rb") as kept:
            for n, original in enumerate(self.files):
                path = file_of(model, original.name)
                self._put_back_file(kept, n, path)
                restore_sidecar(path, original)

    def _put_back_file(self, kept: BinaryIO, n: int, path: Path) -> None:
        surplus = path.stat().st_size - self.files[n].size
        with open(path, "r+b") as file:
            if surplus == 0 or remove_room(file, surplus):
                head = self.header_bytes(kept, n)
                self.write_tensors(kept, n, file, head)
                write_at(file, 0, head)
                file.flush()
                os.fsync(file.fileno())
                return
        with atomic_output(path) as target:
            self.rebuild(kept, n, path, target)

    def rebuild(self, kept: BinaryIO, n: int, path: Path, target: BinaryIO) -> None:
        """The original of `path`, written anew; its data may start later than they did."""
        head = self.header_bytes(kept, n)
        surplus = path.stat().st_size - self.files[n].size
        size = self.files[n].size - len(head)
        with open_input(path) as source:
            copy_range(source, target, Segment(len(head) + surplus, len(head), size))
        self.write_tensors(kept, n, target, head)
        write_at(target, 0, head)

    def write_tensors(self, undo: BinaryIO, n: int, target: BinaryIO, head: bytes) -> None:
        """Write a file's original tensors to where its original header says."""
        offsets = header_from_bytes(head, self.files[n].size, str(self.path))
        for key in self.files[n].tensors:
            position = offsets.data_start + offsets.tensors[key].start
            for piece in read_pieces(undo, self.header, _key(n, key)):
                write_at(target, position, piece)
                position += len(piece)


def write_undo(
    target: BinaryIO, files: Sequence[tuple[str, Path, Header, Sequence[str]]]
) -> dict[Path, str]:
    """Write an undo file of (name in the model, file, its header, keys about to be edited).

    Returns each file's `Original.rest`.
    """
    entries, sources, rests = [], {}, {}
    for n, (name, path, header, keys) in enumerate(files):
        sidecar = provenance.sidecar_of(path)
        text = sidecar.read_text(encoding="utf-8") if sidecar.is_file() else None
        others = [key for key in header.tensors if key not in set(keys)]
        with open_input(path) as file:
            rests[path] = provenance.digest_of_samples(file, header, others)
        entries.append({"name": name, "size": path.stat().st_size, "sidecar": text,
                        "tensors": list(keys), "rest": rests[path]})  # fmt: skip
        for key in keys:
            sources[_key(n, key)] = (path, header.data_start, header.tensors[key])
        head = TensorInfo("U8", (header.data_start,), 0, header.data_start)
        sources[_header_key(n)] = (path, 0, head)
    tensors, offset = {}, 0
    for name, (_, _, info) in sources.items():
        tensors[name] = TensorInfo(info.dtype, info.shape, offset, offset := offset + info.nbytes)
    metadata = {METADATA_KEY: json.dumps({"version": 3, "files": entries})}
    head_bytes = encode_header(tensors, metadata)
    write_at(target, 0, head_bytes)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_input(path)) for _, path, _, _ in files}
        for name, (path, start, info) in sources.items():
            to = len(head_bytes) + tensors[name].start
            copy_range(opened[path], target, Segment(start + info.start, to, info.nbytes))
    return rests


def size_of_undo(files: Sequence[tuple[str, Path, Header, Sequence[str]]]) -> int:
    """About how many bytes `write_undo` will write."""
    return sum(
        3 * header.data_start + sum(header.tensors[key].nbytes for key in keys)
        for _, _, header, keys in files
    )


def unbake(
    model: Path, undo: Path, out: Path | None = None, *, in_place: bool = False, force: bool = False
) -> Unbaked:
    """Take a bake back, byte for byte: to `out`, or in place.

    A change that a killed in-place call left half done is rolled back first; give the journal as
    `undo` for that alone. Raises BadInput where `undo` isn't of this model, or the model has
    changed since it was baked; then nothing is written. A bake in place takes no more time than it
    must, so of the tensors that it did not edit only the beginnings are compared.
    """
    model, undo = Path(model), Path(undo)
    if in_place == (out is not None):
        raise BadInput("expected either an output (-o) or --in-place")
    if not model.exists():
        raise BadInput(f"{model}: no such file or folder")
    if in_place:
        with held(model) as rolled_back:
            if rolled_back and not undo.exists():
                return Unbaked(model, (model,), True, rolled_back=True)
            return _unbake_in_place(model, Undo(undo))
    assert out is not None
    out = named(Path(out))
    refuse_existing(out, force)
    if out.exists() and out.samefile(model):
        raise BadInput(f"{out}: is the input itself; choose another output or --in-place")
    if model.is_dir() and out.resolve().is_relative_to(model.resolve()):
        raise BadInput(f"{out}: lies inside the input; choose another output")
    require_apart(out, model, undo)
    way_back = Undo(undo)
    paths = _check(model, way_back)
    require_space(out.absolute().parent, sum(original.size for original in way_back.files))
    with open(undo, "rb") as kept:
        if not model.is_dir():
            with atomic_output(out) as target:
                way_back.rebuild(kept, 0, model, target)
            restore_sidecar(out, way_back.files[0])
            return Unbaked(out, (out,), False)
        with atomic_folder(out) as folder:
            link_tree(model, folder, leave_out=[*paths, *map(provenance.sidecar_of, paths)])
            for n, path in enumerate(paths):
                copy = folder / path.relative_to(model)
                with open(copy, "w+b") as target:
                    way_back.rebuild(kept, n, path, target)
                restore_sidecar(copy, way_back.files[n])
    return Unbaked(out, tuple(paths), False)


@contextmanager
def held(model: Path) -> Iterator[bool]:
    """Hold a model's files against other calls of this tool, before anything is read of them.

    An in-place change that was interrupted is rolled back first; yields whether there was one.
    Raises BadInput where another process is at work on the model, or the journal isn't of it.
    """
    with ExitStack() as stack:
        for file in _files_to_lock(model):
            stack.enter_context(locked(file))
        journal = journal_of(model)
        interrupted = journal.exists()
        if interrupted:
            Undo(journal).require_of(model)
            roll_back(model)
            say(f"{model}: an interrupted change was rolled back; the model is as it was before it")
        yield interrupted


def _files_to_lock(model: Path) -> list[Path]:
    """All that a change may touch, in one order; a file of two names once."""
    if not model.is_dir():
        return [model]
    found = sorted({*model.glob("*.safetensors"), *model.glob("*/*.safetensors")})
    stats = [(path.stat(), path) for path in found if path.is_file()]
    return list({(stat.st_dev, stat.st_ino): path for stat, path in stats}.values())


def require_writable(path: Path) -> None:
    """Raises BadInput where a file can't be changed in place."""
    try:
        with open(path, "r+b"):
            pass
    except OSError as error:
        raise BadInput(f"{path}: can't be changed in place: {error.strerror}") from error


def require_sole(path: Path, model: Path) -> None:
    """Raises BadInput where a model's file has another name (a hub cache's, a linked folder's),
    under which it would change as well."""
    elsewhere = not path.resolve().is_relative_to(model.resolve())
    if elsewhere or path.is_symlink() or path.stat().st_nlink > 1:
        raise BadInput(
            f"{path}: is linked from elsewhere too, and would change there as well; choose a new "
            "output (-o), or copy it first"
        )


def roll_back(model: Path) -> None:
    """Put the journal's bytes back and remove it. The model must be held."""
    journal = journal_of(model)
    Undo(journal).put_back(model)
    journal.unlink()
    sync_folder(journal.parent)


def _unbake_in_place(model: Path, undo: Undo) -> Unbaked:
    paths = _check(model, undo)
    for path in paths:
        require_sole(path, model)
        require_writable(path)
    with atomic_output(journal_of(model)) as target, open(undo.path, "rb") as kept:
        shutil.copyfileobj(kept, target, 1 << 20)
    roll_back(model)
    return Unbaked(model, tuple(paths), True)


def _check(model: Path, undo: Undo) -> list[Path]:
    """The files that the undo file is of; BadInput unless each is what was baked then."""
    require_settled(model)
    paths = [file_of(model, original.name) for original in undo.files]
    with open(undo.path, "rb") as kept:
        for n, path in enumerate(paths):
            _check_file(path, read_header(path), undo, n, kept)
    return paths


def _check_file(path: Path, header: Header, undo: Undo, n: int, kept: BinaryIO) -> None:
    changed = f"{path}: expected the file as it was baked, found that"
    head = undo.header_bytes(kept, n)
    original = header_from_bytes(head, undo.files[n].size, str(undo.path))
    if original.tensors != header.tensors or not provenance.is_metadata_of(
        header.metadata, original.metadata
    ):
        raise BadInput(f"{changed} its header has changed since; this undo file isn't for it")
    chain = provenance.chain_of(path, header)
    touched = undo.files[n].tensors
    digests = [
        provenance.digest_of_tensor(kept, undo.header, name)
        for name in (_header_key(n), *(_key(n, key) for key in touched))
    ]
    if not chain or chain[-1].before != provenance.digest_of(digests):
        raise BadInput(f"{changed} this undo file isn't of its last bake")
    others = [key for key in header.tensors if key not in set(touched)]
    with open_input(path) as file:
        if provenance.digest_of_tensors(file, header, touched) != chain[-1].after:
            raise BadInput(f"{changed} its edited tensors have changed since")
        digest = provenance.checksum_of_tensors if chain[-1].whole else provenance.digest_of_samples
        if digest(file, header, others) != chain[-1].rest:
            raise BadInput(f"{changed} its other tensors have changed since")


def file_of(model: Path, name: str) -> Path:
    """A model's file by its name in an undo file."""
    return model / name if model.is_dir() else model


def restore_sidecar(path: Path, original: Original) -> None:
    """The sidecar as it was: its old text, or none."""
    sidecar = provenance.sidecar_of(path)
    if original.sidecar is None:
        sidecar.unlink(missing_ok=True)
    else:
        write_text(sidecar, original.sidecar)


def _key(n: int, tensor: str) -> str:
    return f"{n}/tensor/{tensor}"


def _header_key(n: int) -> str:
    return f"{n}/header"
