"""The safetensors format, read strictly and written deterministically, without torch.

Stricter than the `safetensors` library, which lets duplicate keys pass, and ours to write because
the library's metadata order differs from one process to the next.
"""

import hashlib
import json
import math
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sdd_lora.errors import BadInput
from sdd_lora.io.sniff import HEAD_BYTES, is_pickle, require_weights

#: The library's own limit. A full SD 1.x file with EMA copies needs 0.3 MB; training tags may take
#: tens.
MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
#: What numpy makes an array of, even where one of the dimensions is 0.
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 1 << 59

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; `start` and `end` are byte offsets into the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a file says about itself: tensors in the header's order, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file; no tensor is read.

    Raises BadInput where the file is missing, truncated, no safetensors, or breaks a rule of the
    format: offsets that overlap, leave holes or lie outside, duplicate keys, unknown dtypes.
    """
    with open_input(path) as file:
        return header_of(file, str(path))


def header_of(file: BinaryIO, where: str) -> Header:
    """`read_header` for an open file, from its beginning; `where` names it in errors."""
    size = file.seek(0, 2)
    file.seek(0)
    length = _header_length(file.read(HEAD_BYTES), size, where)
    file.seek(0)
    return header_from_bytes(file.read(8 + length), size, where)


def header_from_bytes(head: bytes, size: int, where: str) -> Header:
    """`header_of` from the header's own bytes, prefix included, of a file of `size` bytes."""
    length = _header_length(head[:HEAD_BYTES], size, where)
    entries = _parse(head[8 : 8 + length], where)
    metadata = entries.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadInput(f"{where}: {METADATA_KEY} of the header must map names to text")
    tensors = {name: _tensor_info(name, entry, where) for name, entry in entries.items()}
    _check_layout(tensors, size - 8 - length, where)
    return Header(tensors, metadata, 8 + length)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors (in their stored dtypes, header order) and the metadata. Raises BadInput."""
    with open_input(path) as file:
        header = header_of(file, str(path))
        return {name: read_tensor(file, header, name) for name in header.tensors}, header.metadata


def read_tensor(file: BinaryIO, header: Header, name: str) -> np.ndarray:
    """One tensor of an open file by a range read."""
    info = header.tensors[name]
    file.seek(header.data_start + info.start)
    return np.frombuffer(file.read(info.nbytes), NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def serialize(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The file's bytes, in pieces; the same input gives the same bytes.

    Widest dtypes come first, then names in order, so that every tensor is aligned.
    """
    names = _order(tensors)
    header: dict[str, Any] = {}
    if metadata:
        header[METADATA_KEY] = dict(sorted(metadata.items()))
    offset = 0
    for name in names:
        array = tensors[name]
        end = offset + array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text))
    yield text
    for name in names:
        yield np.ascontiguousarray(tensors[name]).tobytes()


def data_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the bytes that follow the header in the file that `serialize` makes."""
    digest = hashlib.sha256()
    for name in _order(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def open_input(path: Path) -> BinaryIO:
    """Open a file for reading. Raises BadInput, in one line, where that can't be done."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; expected a file")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise BadInput(f"{path}: a pipe or a device; expected a file, read at any place of it")
        return open(path, "rb")
    except OSError as error:
        raise BadInput(f"{path}: can't be read: {error.strerror}") from error


def _order(tensors: Mapping[str, np.ndarray]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _header_length(head: bytes, size: int, where: str) -> int:
    require_weights(head, where)
    if is_pickle(head):
        raise BadInput(
            f"{where}: torch's own format (a pickle), not safetensors; `sdd-lora convert` it first"
        )
    if len(head) < 8:
        raise BadInput(f"{where}: truncated: {size} bytes; a safetensors file has at least 8")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BadInput(
            f"{where}: not a safetensors file, or a hostile one: its header would be {length:,} "
            f"bytes long; at most {MAX_HEADER_BYTES:,} are read"
        )
    if 8 + length > size:
        raise BadInput(
            f"{where}: truncated: the header needs {8 + length:,} bytes, the file has {size:,}; "
            "download or copy it again"
        )
    return length


def _parse(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise BadInput(f"{where}: the header names {twice!r} twice")
        return found

    try:
        entries = json.loads(text, object_pairs_hook=unique)
        if b"\\u" in text:  # an escape can spell half a surrogate pair, which is no text
            json.dumps(entries, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not a safetensors file: its header is no JSON") from error
    if not isinstance(entries, dict):
        raise BadInput(f"{where}: not a safetensors file: its header is no JSON object")
    return entries


def _tensor_info(name: str, entry: Any, where: str) -> TensorInfo:
    if not name.isprintable():
        raise BadInput(f"{where}: expected printable names of tensors, found {ascii(name)[:80]}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadInput(f"{where}: {name}: expected dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise BadInput(
            f"{where}: {name}: unknown dtype {dtype!r}; known: {', '.join(NUMPY_DTYPES)}"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise BadInput(f"{where}: {name}: shape and data_offsets must be whole numbers from 0 up")
    if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise BadInput(f"{where}: {name}: no array can have its shape, of {len(shape)} dimensions")
    start, end = offsets
    expected = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if end - start != expected:
        raise BadInput(
            f"{where}: {name}: {dtype} {tuple(shape)} takes {expected:,} bytes, "
            f"but its offsets [{start}, {end}] span {end - start:,}"
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_layout(tensors: dict[str, TensorInfo], data_bytes: int, where: str) -> None:
    """Tensors must tile the data section: no overlap, no hole, nothing outside."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            kind = "overlaps another tensor" if info.start < position else "leaves a hole before it"
            raise BadInput(f"{where}: {name}: {kind}: starts at {info.start}, expected {position}")
        position = info.end
    if position != data_bytes:
        problem = "truncated" if position > data_bytes else "bytes after the last tensor"
        raise BadInput(
            f"{where}: {problem}: the header describes {position:,} bytes of data, "
            f"the file has {data_bytes:,}; download or copy it again"
        )
