"""Moving tensors' bytes from file to file by range, never through mapped pages.

A longer header needs space at the beginning of its file: ext4 and XFS on Linux insert and remove
whole blocks there without moving the data behind them.
"""

import ctypes
import errno
import json
import os
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np

from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import METADATA_KEY, NUMPY_DTYPES, Header, TensorInfo
from sdd_lora.io.torch_pickle import StridedInfo

#: One request to the kernel; between two of them Ctrl-C is heard.
CHUNK_BYTES = 32 << 20
BUFFER_BYTES = 1 << 20
#: A header may grow by whole pages only, so that all data keep their place within a page: the
#: kernel copies pages, and file systems that share blocks can share them.
PAGE_BYTES = 4096

#: Held where a platform can't read or write without moving the file's position.
_SEEKING = threading.Lock()
#: Errors of `copy_file_range` after which plain reads and writes do the work.
_NO_COPY_FILE_RANGE = {
    errno.ENOSYS,
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,
}
_COLLAPSE_RANGE, _INSERT_RANGE = 0x08, 0x20  # modes of fallocate


@dataclass(frozen=True)
class Segment:
    """`size` bytes at `source` of the input that go to `target` of the output."""

    source: int
    target: int
    size: int


def read_bytes(file: BinaryIO, header: Header, key: str) -> bytes:
    """A tensor's bytes as they would stand in a safetensors file (row by row)."""
    info = header.tensors[key]
    data = read_at(file, header.data_start + info.start, info.nbytes)
    if len(data) != info.nbytes:
        raise BadInput(f"{file.name}: {key}: truncated while it was read")
    return info.gather(data).tobytes() if isinstance(info, StridedInfo) else data


def read_pieces(file: BinaryIO, header: Header, key: str) -> Iterator[bytes]:
    """A tensor's bytes as they stand in the file, a buffer at a time."""
    info = header.tensors[key]
    for start in range(info.start, info.end, BUFFER_BYTES):
        yield read_at(file, header.data_start + start, min(BUFFER_BYTES, info.end - start))


def as_array(data: bytes, info: TensorInfo) -> np.ndarray:
    """A tensor from its bytes, in its stored dtype and shape."""
    return np.frombuffer(data, NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def encode_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], like: int = 0
) -> bytes:
    """A header with its length prefix, tensors in the given order, offsets as they are.

    Its length differs from `like` by whole pages, so that the data need not move within a page.
    """
    entries: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for key, info in tensors.items():
        offsets = [info.start, info.end]
        entries[key] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return pad_header(text, 8 + len(text) + (like - 8 - len(text)) % PAGE_BYTES)


def pad_header(text: bytes, total: int) -> bytes:
    """The header's text behind its length, padded with spaces to `total` bytes."""
    return struct.pack("<Q", total - 8) + text.ljust(total - 8)


def copy_range(source: BinaryIO, target: BinaryIO, segment: Segment) -> None:
    """Copy one segment inside the kernel where it can, sharing blocks where the disk can.

    Raises OSError where the disk is full or fails, BadInput where the input ends early.
    """
    done = 0
    while done < segment.size:
        start = segment.source + done
        # blocks are shared from the beginning of a page on
        most = -start % PAGE_BYTES or CHUNK_BYTES
        moved = _copy_some(
            source, target, start, segment.target + done, min(most, segment.size - done)
        )
        if moved == 0:
            raise BadInput(f"{source.name}: truncated while it was read")
        start_writing(target, segment.target + done, moved)
        done += moved


def _copy_some(source: BinaryIO, target: BinaryIO, start: int, to: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        target.flush()
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), size, start, to)
        except OSError as error:
            if error.errno not in _NO_COPY_FILE_RANGE:
                raise
    block = read_at(source, start, min(size, BUFFER_BYTES))
    write_at(target, to, block)
    return len(block)


def start_writing(target: BinaryIO, start: int, size: int) -> None:
    """Start write-back now; the kernel would wait until a tenth of the memory is full of it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # only a hint, which not every share takes
            os.posix_fadvise(target.fileno(), start, size, os.POSIX_FADV_DONTNEED)


def read_at(file: BinaryIO, position: int, size: int) -> bytes:
    """Up to `size` bytes from `position`; threads may share the file."""
    if not hasattr(os, "pread"):
        with _SEEKING:
            file.seek(position)
            return file.read(size)
    pieces = []
    while size and (piece := os.pread(file.fileno(), size, position)):
        pieces.append(piece)
        position += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def write_at(target: BinaryIO, position: int, data: bytes | memoryview) -> None:
    """Write all of `data` at `position`; threads may share the file."""
    if not hasattr(os, "pwrite"):
        with _SEEKING:
            target.seek(position)
            target.write(data)
        return
    target.flush()
    left = memoryview(data)
    while left:
        written = os.pwrite(target.fileno(), left, position)
        position += written
        left = left[written:]


def merged_segments(segments: Iterator[Segment]) -> Iterator[Segment]:
    """Segments that follow each other both in the input and in the output, made one."""
    last: Segment | None = None
    for segment in segments:
        if last is None:
            last = segment
        elif segment.source - last.source == segment.target - last.target == last.size:
            last = Segment(last.source, last.target, last.size + segment.size)
        else:
            yield last
            last = segment
    if last is not None:
        yield last


def insert_space(file: BinaryIO, size: int) -> bool:
    """Insert `size` bytes (whole blocks) at the beginning; whether the file system could."""
    return _fallocate(file, _INSERT_RANGE, size)


def remove_space(file: BinaryIO, size: int) -> bool:
    """Take `size` bytes (whole blocks) away from the beginning; whether the file system could."""
    return size > 0 and _fallocate(file, _COLLAPSE_RANGE, size)


@lru_cache
def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    return library if hasattr(library, "fallocate64") else None


def _fallocate(file: BinaryIO, mode: int, size: int) -> bool:
    library = _libc()
    if library is None:
        return False
    file.flush()
    offset, length = ctypes.c_int64(0), ctypes.c_int64(size)
    return bool(library.fallocate64(file.fileno(), ctypes.c_int(mode), offset, length) == 0)
