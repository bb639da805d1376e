"""What is this file? Answered from its first bytes, never from its suffix."""

from sdd_lora.errors import BadInput

#: bytes from the beginning that are enough to tell
HEAD_BYTES = 64

_DOWNLOAD = "download the file again"
_WEB_PAGE = f"a web page, of a login or an error: log in, or give a token, and {_DOWNLOAD}"
#: first bytes in small letters, spaces before them left away → what the file is, and the remedy
_FIRST_BYTES = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file: run `git lfs pull`"),
    (b"<!doctype html", _WEB_PAGE),
    (b"<html", _WEB_PAGE),
    (b"<!--", _WEB_PAGE),
    (b"<?xml", f"XML, such as a server's error message: {_DOWNLOAD}"),
    (b'{"', f"JSON text, such as a server's error message: {_DOWNLOAD}"),
    (b"gguf", "a GGUF file, quantised for other programs: take the .safetensors it was made from"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"bzh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zxz", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"rar!", "a RAR archive: unpack it first"),
    (b"\x89hdf", "an HDF5 file (Keras): expected .safetensors or a torch checkpoint"),
    (b"\x89png", "a picture (PNG), not weights"),
    (b"\xff\xd8\xff", "a picture (JPEG), not weights"),
    (b"riff", "a picture or a sound (RIFF), not weights"),
)
#: a header of this length in ASCII would be exabytes long
_LENGTH_BYTES = 8


def require_weights(head: bytes, where: str) -> None:
    """Raises BadInput, with the remedy, for a file that can't hold weights as this tool reads them.

    `head` are its first `HEAD_BYTES`, or all there are.
    """
    if is_safetensors(head):
        return
    if not head:
        raise BadInput(f"{where}: truncated: 0 bytes, an empty file: {_DOWNLOAD}")
    start = head[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for mark, found in _FIRST_BYTES:
        if start.startswith(mark):
            raise BadInput(f"{where}: {found}")
    if all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in head[:_LENGTH_BYTES]):
        shown = " ".join(head[:HEAD_BYTES].decode("ascii", "replace").split())
        raise BadInput(f"{where}: expected weights (.safetensors, .ckpt), found text: {shown!r}")


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins with a header's length, less than 4 GB, and JSON. The length may look
    like any other mark: one of 640 begins as a pickle does."""
    return head[4:9] == b"\0\0\0\0{"


def is_pickle(head: bytes) -> bool:
    """Whether a file is torch's: a zip as since torch 1.6, or a bare pickle."""
    is_bare = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return not is_safetensors(head) and (head[:2] == b"PK" or is_bare)
