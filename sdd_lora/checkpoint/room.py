"""Room for a longer header at the beginning of a file, where the file system can make it.

ext4 and XFS on Linux can insert and remove whole blocks without moving the data behind them.
"""

import ctypes
import sys
from functools import lru_cache
from typing import BinaryIO

_COLLAPSE_RANGE, _INSERT_RANGE = 0x08, 0x20


def insert_room(file: BinaryIO, size: int) -> bool:
    """Insert `size` bytes (whole blocks) at the beginning; whether the file system could."""
    return _fallocate(file, _INSERT_RANGE, size)


def remove_room(file: BinaryIO, size: int) -> bool:
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
    return library.fallocate64(file.fileno(), ctypes.c_int(mode), offset, length) == 0
