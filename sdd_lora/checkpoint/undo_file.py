"""Undo files: the original bytes of what a bake changed.

An undo file is a safetensors file that keeps, of every changed file, the header as it stood and the
tensors that were edited. The journal of a change in place is one too: putting its bytes back makes
the model whole. A model of the same name may have taken the place of the one it is of, so it names
its own by size and by samples of the tensors that the change didn't touch.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from sdd_lora.checkpoint.copying import (
    PAGE_BYTES,
    Segment,
    copy_range,
    encode_header,
    read_pieces,
    remove_space,
    write_at,
)
from sdd_lora.checkpoint.history import digest_of_samples, sidecar_of
from sdd_lora.checkpoint.plan import BakePlan, FilePlan
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import atomic_output, sync_file, write_text
from sdd_lora.io.safetensors import (
    Header,
    TensorInfo,
    header_from_bytes,
    open_input,
    read_header,
)

UNDO_KEY = "sdd_lora.undo"


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


class UndoFile:
    """An undo file, read by range. Raises BadInput where it is none, or damaged."""

    def __init__(self, path: Path) -> None:
        from pydantic import TypeAdapter, ValidationError

        self.path = Path(path)
        self.header = read_header(self.path)
        where = f"{path}: expected an undo file, as bake writes it with `undo=FILE`"
        text = self.header.metadata.get(UNDO_KEY)
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
            keys = {header_key(n), *(tensor_key(n, key) for key in file.tensors)}
            if not inside or not keys <= set(self.header.tensors):
                raise BadInput(f"{where}; found one that is incomplete: {file.name}")

    def header_bytes(self, file: BinaryIO, n: int) -> bytes:
        return b"".join(read_pieces(file, self.header, header_key(n)))

    def require_of(self, model: Path) -> None:
        """Raises BadInput where this isn't of the model's files, or one can't be written.

        The files may be in whatever state a change left them.
        """
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
            return digest_of_samples(file, there, others) == original.rest

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
            if surplus == 0 or remove_space(file, surplus):
                head = self.header_bytes(kept, n)
                self.write_tensors(kept, n, file, head)
                write_at(file, 0, head)
                file.flush()
                sync_file(file.fileno())
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
            for piece in read_pieces(undo, self.header, tensor_key(n, key)):
                write_at(target, position, piece)
                position += len(piece)


def write_undo(target: BinaryIO, plan: BakePlan) -> dict[Path, str]:
    """Write an undo file of everything that a plan is about to change.

    Returns each file's `Original.rest`.
    """
    originals: list[Original] = []
    sources: dict[str, tuple[Path, int, TensorInfo]] = {}
    for n, file in enumerate(plan.files):
        originals.append(_original(file, plan.checkpoint.path))
        start = file.header.data_start
        for key in file.edits:
            sources[tensor_key(n, key)] = (file.path, start, file.header.tensors[key])
        sources[header_key(n)] = (file.path, 0, TensorInfo("U8", (start,), 0, start))
    tensors, offset = {}, 0
    for name, (_, _, info) in sources.items():
        tensors[name] = TensorInfo(info.dtype, info.shape, offset, offset := offset + info.nbytes)
    content = {"version": 3, "files": [asdict(original) for original in originals]}
    head = encode_header(tensors, {UNDO_KEY: json.dumps(content)})
    write_at(target, 0, head)
    with ExitStack() as stack:
        opened = {file.path: stack.enter_context(open_input(file.path)) for file in plan.files}
        for name, (path, start, info) in sources.items():
            to = len(head) + tensors[name].start
            copy_range(opened[path], target, Segment(start + info.start, to, info.nbytes))
    return {file.path: one.rest for file, one in zip(plan.files, originals, strict=True)}


def size_of_undo(plan: BakePlan) -> int:
    """About how many bytes `write_undo` will write."""
    return sum(
        3 * file.header.data_start + sum(file.header.tensors[key].nbytes for key in file.edits)
        for file in plan.files
    )


def _original(file: FilePlan, root: Path) -> Original:
    sidecar = sidecar_of(file.path)
    with open_input(file.path) as opened:
        rest = digest_of_samples(opened, file.header, file.untouched)
    return Original(
        name=file.path.relative_to(root).as_posix() if root.is_dir() else root.name,
        size=file.path.stat().st_size,
        sidecar=sidecar.read_text(encoding="utf-8") if sidecar.is_file() else None,
        tensors=tuple(file.edits),
        rest=rest,
    )


def require_writable(path: Path) -> None:
    """Raises BadInput where a file can't be changed in place."""
    try:
        with open(path, "r+b"):
            pass
    except OSError as error:
        raise BadInput(f"{path}: can't be changed in place: {error.strerror}") from error


def file_of(model: Path, name: str) -> Path:
    """A model's file by its name in an undo file."""
    return model / name if model.is_dir() else model


def restore_sidecar(path: Path, original: Original) -> None:
    """The sidecar as it was: its old text, or none."""
    sidecar = sidecar_of(path)
    if original.sidecar is None:
        sidecar.unlink(missing_ok=True)
    else:
        write_text(sidecar, original.sidecar)


def tensor_key(n: int, tensor: str) -> str:
    return f"{n}/tensor/{tensor}"


def header_key(n: int) -> str:
    return f"{n}/header"
