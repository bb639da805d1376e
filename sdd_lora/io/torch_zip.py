"""Legacy checkpoints (`.ckpt`, `.bin`): read as data; no pickle is ever executed.

A torch file is a zip: one pickle that describes the tensors, and an uncompressed entry for each
storage. The pickle is read by an inert subclass of Python's own unpickler, for which calls and
globals are records, so that nothing in the file can import or run; the tensors' bytes are then read
by range like those of a safetensors file.
"""

import io
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd_lora.errors import BadInput
from sdd_lora.io import sniff
from sdd_lora.io.safetensors import Header, open_input
from sdd_lora.io.torch_pickle import Call, PickledTensor, unpickle

#: SD 1.x with EMA copies and optimizer states describes itself in 2 MB.
MAX_PICKLE_BYTES = 8 << 20
MAX_READ_BYTES = 4 << 20  # of zip directories
MAX_NESTING = 4
#: Names that trainers give to a model's tensors among other things.
_WRAPPING_NAMES = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params",
    "unet",
    "string_to_param",  # A1111's learned words
)

#: Globals by which numbers, arrays and containers are pickled, and nothing else can be.
_PLAIN_DATA = {
    "_codecs.encode",
    "collections.Counter",
    "collections.defaultdict",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Size",
    "torch.device",
}
#: of files that people pack into archives, and torch into none
_MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1  # a bit of an entry's flags


@dataclass(frozen=True)
class PickleHeader(Header):
    """A legacy file's tensors; their offsets count from the file's beginning.

    `left_out` names entries that aren't tensors of the model (epochs, optimizers, callbacks);
    `refused` the globals that the pickle asked for and did not get: code, or harmless classes.
    """

    left_out: tuple[str, ...]
    refused: tuple[str, ...]

    @property
    def code(self) -> tuple[str, ...]:
        """Of `refused`: what a loader that trusts the file would import and run."""
        return tuple(name for name in self.refused if name not in _PLAIN_DATA)


def is_torch_file(path: Path) -> bool:
    """Whether a file is a zip or a bare pickle, by its first bytes and not by its name."""
    with open_input(path) as file:
        return sniff.is_pickle(file.read(sniff.HEAD_BYTES))


def read_pickle_header(path: Path) -> PickleHeader:
    """Names, dtypes, shapes and offsets of a torch file's tensors.

    A model within `state_dict`s, or other names that trainers use, is found. Raises BadInput where
    the file is damaged, hostile, written before torch 1.6, or holds no tensors by name, or two
    models.
    """
    with open_input(path) as file:
        head = file.read(sniff.HEAD_BYTES)
        sniff.require_weights(head, str(path))
        if head[:2] != b"PK":
            raise BadInput(
                f"{path}: expected a zip as torch has written since 1.6, found a bare pickle; "
                "load it with a torch you trust it to, and save it again"
            )
    with _damage_in_words(path):
        return _read_archive(path)


@contextmanager
def _damage_in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: can't be read, or damaged: {error.strerror or error}") from error
    # zipfile raises the last two for methods that it lacks, and for entries cut short
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise BadInput(f"{path}: damaged or no torch file: {error}") from error


class _BoundedFile(io.FileIO):
    """Reads no more at once than a zip's directory may take, whatever its sizes claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = MAX_READ_BYTES
        if size > MAX_READ_BYTES:
            raise ValueError(f"its directory would take {size:,} bytes")
        return super().read(size) or b""


def require_torch_zip(path: Path) -> None:
    """Raises BadInput for a zip that is cut short or an archive of other files; pickles pass."""
    with _BoundedFile(str(path)) as file, _damage_in_words(path):
        if file.read(2) == b"PK":
            _description_of(_zip_entries(file, path))


def _zip_entries(file: io.FileIO, path: Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            found = archive.infolist()
    except zipfile.BadZipFile as error:
        raise BadInput(
            f"{path}: truncated or damaged: a zip whose list of entries, at its end, can't be "
            "read; download or copy it again"
        ) from error
    entries = {entry.filename: entry for entry in found}
    if len(entries) != len(found):
        raise ValueError("two entries of one name")
    models = [name for name in entries if Path(name).suffix.lower() in _MODEL_SUFFIXES]
    if models:
        raise BadInput(f"{path}: a zip archive, of {models[0]}: unpack it first")
    return entries


def _read_archive(path: Path) -> PickleHeader:
    with _BoundedFile(str(path)) as file:
        entries = _zip_entries(file, path)
        description = _description_of(entries)
        root = description.filename.removesuffix("data.pkl")
        size = file.seek(0, 2)

        def locate(name: str) -> tuple[int, int]:
            if name not in entries:
                raise ValueError(f"no entry {name}")
            return _entry_range(file, entries[name], size)

        start, end = locate(description.filename)
        if f"{root}byteorder" in entries:
            _require_little_endian(file, *locate(f"{root}byteorder"))
        file.seek(start)
        data = b"".join(iter(lambda: file.read(min(MAX_READ_BYTES, end - file.tell())), b""))
        content, refused = unpickle(data)
        state, left_out = _find_state(content)
        tensors = {}
        for name, value in state.items():
            if isinstance(value, PickledTensor) and isinstance(name, str):
                tensors[name] = value.info(*locate(f"{root}data/{value.storage.name}"))
            else:
                _require_no_array(name, value)
                left_out.append(str(name))
    if not tensors:
        raise ValueError("no tensors by name in it")
    return PickleHeader(tensors, {}, 0, tuple(left_out), tuple(sorted(refused)))


def _description_of(entries: dict[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    found = [
        e for name, e in entries.items() if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(found) != 1:
        raise ValueError(f"expected one */data.pkl in the zip, found {len(found)}")
    if found[0].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is {found[0].file_size:,} bytes long")
    return found[0]


def _entry_range(file: io.FileIO, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Where an entry's bytes lie in the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{entry.filename} is compressed, which torch's files never are")
    if entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"{entry.filename} is encrypted")
    if not 0 <= entry.header_offset <= size:  # a zip64's may be more than a seek takes
        raise ValueError(f"{entry.filename} lies outside the file")
    file.seek(entry.header_offset)
    mark, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if mark != b"PK\3\4" or start + entry.file_size > size:
        raise ValueError(f"{entry.filename} lies outside the file")
    return start, start + entry.file_size


def _require_little_endian(file: io.FileIO, start: int, end: int) -> None:
    file.seek(start)
    if (order := file.read(min(end - start, 16))) != b"little":
        raise ValueError(f"its byte order is {order!r}; only little-endian files are read")


def _find_state(value: Any) -> tuple[dict[Any, Any], list[str]]:
    """The outermost dictionary of parameters, and the names of the entries around it.

    Raises ValueError where there is none, or a second one of the same parameters.
    """
    left_out: list[str] = []
    for _ in range(MAX_NESTING):
        if not isinstance(value, dict):
            break
        wrapped = [name for name in _WRAPPING_NAMES if isinstance(value.get(name), dict)]
        models = [value, *(value[name] for name in wrapped)]
        named = [names for names in map(_parameter_names, models) if names]
        if any(2 * len(named[0] & other) >= len(named[0]) for other in named[1:]):
            raise ValueError("it holds two models, one of which is to be given alone")
        if not wrapped or _parameter_names(value):
            return value, left_out
        left_out += [str(name) for name in value if name != wrapped[0]]
        value = value[wrapped[0]]
    raise ValueError("expected a state_dict: names and tensors")


def _require_no_array(name: str | int, value: Any) -> None:
    """Raises ValueError for a part of the model that would be lost: an array that isn't read."""
    lost = isinstance(value, PickledTensor)  # under a number
    if isinstance(value, Call):
        lost = value.is_array or (value.is_scalar and "." in str(name))
    if lost:
        raise ValueError(
            f"{str(name)[:200]!r} can't be read ({getattr(value, 'function', 'no name')!r}): save "
            "the model again with it as a plain tensor under a name"
        )


def _parameter_names(state: dict[Any, Any]) -> set[str]:
    """Names of tensors with a module before the dot: trainers put bare numbers beside a model."""
    return {
        name
        for name, value in state.items()
        if isinstance(value, PickledTensor) and isinstance(name, str) and "." in name
    }
