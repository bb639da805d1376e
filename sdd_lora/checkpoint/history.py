"""The history of a file: everything that was baked into it, one record for each call of `bake`.

It stands in the file's header, or in a sidecar, `<file>.baked.json`, where the header had no space.
A sidecar holds the whole history and is tied to its file by a fingerprint.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.copying import read_at, read_pieces
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import write_text
from sdd_lora.io.safetensors import Header, header_of, open_input
from sdd_lora.progress import warn
from sdd_lora.version import __version__

HISTORY_KEY = "sdd_lora.baked"
UNKNOWN_DIGEST = "0" * 64
SAMPLE_BYTES = 256  # a full file has 1,800 tensors, and a bake in place samples nearly all


@dataclass(frozen=True)
class BakedAdapter:
    """An adapter as a history names it.

    `lineage` holds the identities of what it was made from, `parts` those that were stacked in it,
    each with its weight there.
    """

    name: str
    identity: str
    weight: float
    lineage: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    recipe_sha256: str | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter, weight: float) -> "BakedAdapter":
        recipe = adapter.metadata.recipe
        recipe_json = json.dumps(recipe, sort_keys=True).encode()
        return cls(
            name=adapter.name,
            identity=adapter.identity,
            weight=weight,
            lineage=adapter.lineage,
            concepts=tuple(adapter.metadata.concepts),
            recipe_sha256=hashlib.sha256(recipe_json).hexdigest() if recipe else None,
            parts=parts_of(adapter),
        )

    @property
    def identities(self) -> set[str]:
        return {self.identity, *self.lineage}


@dataclass(frozen=True)
class BakeRecord:
    """One call of `bake` on one file.

    `before` is the fingerprint of the base: header and touched tensors; `after` that of the touched
    tensors now; `rest` that of all others: of the beginning of each, or with `whole` of every byte.
    """

    adapters: tuple[BakedAdapter, ...]
    rounding: str
    ema: str
    tool: str = f"sdd_lora {__version__}"
    before: str = UNKNOWN_DIGEST
    after: str = UNKNOWN_DIGEST
    rest: str = UNKNOWN_DIGEST
    whole: bool = False

    @property
    def call(self) -> "BakeRecord":
        """The record without fingerprints: all files that one call of `bake` wrote share it."""
        unknown = UNKNOWN_DIGEST
        return replace(self, before=unknown, after=unknown, rest=unknown)


def parts_of(adapter: Adapter) -> dict[str, float]:
    """Identity → weight of the adapters that this one is the sum of, or was resized from (at 1)."""
    found: dict[str, float] = {}
    earlier: set[str] = set()
    for part in adapter.metadata.merged_from:
        if part.identity is not None:
            found[part.identity] = found.get(part.identity, 0.0) + part.weight
            earlier.update(part.lineage or ())
    resized = adapter.metadata.resized_from
    if resized and resized.identity is not None and resized.identity not in earlier:
        found.setdefault(resized.identity, 1.0)
    return found


def encode_history(history: Iterable[BakeRecord]) -> str:
    return json.dumps([asdict(record) for record in history], sort_keys=True, ensure_ascii=False)


def decode_history(text: str, where: str) -> tuple[BakeRecord, ...]:
    """A history from its JSON. Raises BadInput where it is none."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(tuple[BakeRecord, ...]).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]["msg"]
        raise BadInput(f"{where}: its {HISTORY_KEY} can't be read: {first}") from error


def history_of(path: Path, header: Header) -> tuple[BakeRecord, ...]:
    """A file's records, oldest first: of its valid sidecar, else of its header."""
    sidecar = sidecar_of(path)
    if sidecar.is_file():
        content = _read_sidecar(sidecar)
        if _is_tied(path, header, content):
            return decode_history(json.dumps(content["chain"]), str(sidecar))
        warn(f"{sidecar}: is about another file than {path.name} now is; not used")
    text = header.metadata.get(HISTORY_KEY)
    return decode_history(text, str(path)) if text else ()


def metadata_with(header: Header, history: Iterable[BakeRecord]) -> dict[str, str]:
    """The file's metadata, verbatim, with its history in it.

    transformers refuses a header that has metadata but no format in it.
    """
    return (header.metadata or {"format": "pt"}) | {HISTORY_KEY: encode_history(history)}


def is_metadata_of(found: dict[str, str], original: dict[str, str]) -> bool:
    """Whether `found` is `original` but for the history."""
    rest = {key: value for key, value in found.items() if key != HISTORY_KEY}
    before = {key: value for key, value in original.items() if key != HISTORY_KEY}
    return rest == before or (not original and rest == {"format": "pt"})


def sidecar_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.baked.json")


def write_history(path: Path, history: Iterable[BakeRecord], key: str) -> None:
    """Write the history beside a file, tied to it by one of the tensors that were edited."""
    with open_input(path) as file:
        tie = digest_of_samples(file, header_of(file, str(path)), [key])
    content = {
        "chain": json.loads(encode_history(history)),
        "tied_to": {"tensor": key, "sha256": tie},
    }
    write_text(sidecar_of(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def digest_of(digests: Iterable[str]) -> str:
    """The fingerprint of several things: a digest of their digests, taken in any order of work."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def digest_of_samples(file: BinaryIO, header: Header, keys: Iterable[str]) -> str:
    """A fingerprint of tensors by the beginning of each: a fine-tune or a cast changes them all."""
    digest = hashlib.sha256()
    for key in keys:
        info = header.tensors[key]
        size = min(info.nbytes, SAMPLE_BYTES)
        digest.update(read_at(file, header.data_start + info.start, size))
    return digest.hexdigest()


def digest_of_tensors(file: BinaryIO, header: Header, keys: Iterable[str]) -> str:
    """A fingerprint of every byte of the tensors, in the given order."""
    return digest_of(digest_of_tensor(file, header, key) for key in keys)


def checksum_of_tensors(file: BinaryIO, header: Header, keys: Iterable[str]) -> str:
    """A fingerprint of every byte by a CRC-32 of each tensor: several times as fast as SHA-256, and
    enough to see that a file has changed."""
    return digest_of(_crc(file, header, key) for key in keys)


def _crc(file: BinaryIO, header: Header, key: str) -> str:
    crc = 0
    for piece in read_pieces(file, header, key):
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def digest_of_tensor(file: BinaryIO, header: Header, key: str) -> str:
    digest = hashlib.sha256()
    for piece in read_pieces(file, header, key):
        digest.update(piece)
    return digest.hexdigest()


def _read_sidecar(sidecar: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        content["chain"], content["tied_to"]["tensor"], content["tied_to"]["sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{sidecar}: can't be read: {error}; remove it if it isn't yours") from error
    return content


def _is_tied(path: Path, header: Header, content: dict[str, Any]) -> bool:
    key = content["tied_to"]["tensor"]
    if key not in header.tensors:
        return False
    with open_input(path) as file:
        return bool(digest_of_samples(file, header, [key]) == content["tied_to"]["sha256"])
