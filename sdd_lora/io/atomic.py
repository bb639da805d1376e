"""Outputs appear whole or not at all: a temporary file in the same folder, fsync, rename."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sdd_lora.errors import BadInput, Busy, SddLoraError

#: how a file system, a network share often, says that it has no such call
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)


def refuse_existing(path: Path, force: bool) -> None:
    """Raises BadInput where an output exists and `force` was not given."""
    if path.exists() and not force:
        raise BadInput(f"{path}: exists already; choose another output or add `force=True`")


def require_replaceable(
    folder: Path, marks: Collection[str], is_part: Callable[[Path], bool]
) -> None:
    """Raises BadInput where replacing a folder would delete files of another kind.

    A folder of the kind that is written holds one of `marks` (glob patterns), and every file in it
    satisfies `is_part`, which gets the path within the folder. An empty folder is replaced too.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    marked = any(any(folder.glob(mark)) for mark in marks)
    for path in folder.rglob("*"):
        is_file = path.is_symlink() or not path.is_dir()
        if not marked or (is_file and not is_part(path.relative_to(folder))):
            raise BadInput(
                f"{folder}: `force=True` would delete {path}, which such an output doesn't hold; "
                "choose another output, or move that folder away"
            )


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and nothing otherwise.

    It can be read and written anywhere. On Linux it has no name until it is whole, so that nothing
    is left behind even by a kill. Raises BadInput where the folder is missing or can't be written,
    SddLoraError on a full disk.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; expected the name of a file to write")
    if path.exists() and not path.is_file():  # a rename would put a file in /dev/null's place
        raise BadInput(f"{path}: a pipe or a device; expected the name of a file to write")
    try:
        handle, temporary = _open_temporary(path)
    except OSError as error:
        raise BadInput(f"{path}: can't write there: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            sync_file(file.fileno())
            if temporary is None:
                _link(file.fileno(), path)
        if temporary is not None:
            with suppress(OSError):  # a share may keep permissions of its own
                temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise SddLoraError(f"{path}: not written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `path` when the block ends well, and nothing otherwise.

    What a killed call left behind is cleared by the next one for the same `path`. Raises BadInput
    where `path` is a file, its parent can't be written, or another process is writing it.
    """
    path = Path(path)
    if path.is_file():
        raise BadInput(f"{path}: is a file; expected the name of a folder to write")
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old.tmp")
    try:
        temporary.mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"{path}: can't write there: {error.strerror}") from error
    with locked(temporary):
        try:
            _put_back(old, path)
            _clear(temporary)
            yield temporary
            sync_tree(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            raise SddLoraError(f"{path}: not written: {error.strerror or error}") from error
        finally:
            _put_back(old, path)
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a file or folder against other calls of this tool, where platform and disk have locks.

    Several calls may hold it `shared`, but none beside one that holds it alone. Raises Busy where
    another process holds it, BadInput where it can't be read.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadInput(f"{path}: can't be read: {error.strerror}") from error
    try:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            replaced = not os.path.samestat(os.fstat(descriptor), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            replaced = True  # or still held
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            replaced = False
        if replaced:
            raise Busy(f"{path}: another process is changing it; wait for it to end")
        yield
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises SddLoraError where the disk of `folder` has less room than is needed."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise BadInput(f"{folder}: can't write there: {error.strerror}") from error
    if free < needed_bytes:
        raise SddLoraError(
            f"{folder}: too little disk: {needed_bytes / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free; nothing was written"
        )


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with atomic_output(path) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where the platform and the disk can; the rename itself is done."""
    if os.name == "nt":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_tree(source: Path, target: Path, leave_out: Collection[Path]) -> None:
    """Fill `target` with the files of `source`: as hard links where that can be, else as copies.

    Files and folders in `leave_out` are left out. Symbolic links (a hub cache's) are followed to
    what they name.
    """
    for folder, folders, names in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if Path(folder) / name not in leave_out]
        into = target / Path(folder).relative_to(source)
        into.mkdir(exist_ok=True)
        for name in names:
            file = Path(folder) / name
            if file in leave_out:
                continue
            try:
                os.link(file.resolve(), into / name)
            except OSError:
                shutil.copyfile(file, into / name)


def sync_tree(folder: Path) -> None:
    """Make everything in a folder durable; Windows syncs no file that is open for reading."""
    if os.name == "nt":
        return
    for file in folder.rglob("*"):
        if file.is_dir():
            sync_folder(file)
        elif not file.is_symlink():
            with open(file, "rb") as opened:
                sync_file(opened.fileno())
    sync_folder(folder)


def sha256_of(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_file(descriptor: int) -> None:
    """Make a file's bytes durable, where its disk can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _open_temporary(path: Path) -> tuple[int, Path | None]:
    """A new file in the folder of `path`, and its name where it needs one."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666), None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    return handle, Path(name)


def _link(descriptor: int, path: Path) -> None:
    """Give the nameless file its name; an existing one is replaced in one step."""
    folder = os.open(path.parent, os.O_RDONLY)  # asking for a folder makes Python follow the link
    source = f"/proc/self/fd/{descriptor}"
    try:
        try:
            os.link(source, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.unlink(missing_ok=True)
            os.link(source, temporary.name, src_dir_fd=folder, dst_dir_fd=folder)
            os.replace(temporary, path)
    finally:
        os.close(folder)


def _put_back(old: Path, path: Path) -> None:
    """Undo half a replacement, or clear up after a whole one; a kill may fall between renames."""
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
