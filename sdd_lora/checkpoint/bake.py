"""Adapters into a checkpoint: a copy with the touched tensors edited, or the file itself."""

import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from threadpoolctl import threadpool_limits

from sdd_lora.checkpoint import detect as presence
from sdd_lora.checkpoint import history as provenance
from sdd_lora.checkpoint.copying import (
    PAGE_BYTES,
    copy_range,
    encode_header,
    pad_header,
    read_at,
    read_bytes,
    start_writing,
    write_at,
)
from sdd_lora.checkpoint.history import BakedAdapter, Baking
from sdd_lora.checkpoint.layout import (
    Checkpoint,
    Place,
    journal_of,
    open_checkpoint,
    require_sd1_unet,
)
from sdd_lora.checkpoint.locate import EMBEDDED, MODEL_SUFFIXES, locate, named, require_apart
from sdd_lora.checkpoint.plan import (
    Edits,
    EmaChoice,
    Weighted,
    laid_out,
    plan_edits,
    segments,
    stored_bytes,
    strided,
)
from sdd_lora.checkpoint.room import insert_room
from sdd_lora.checkpoint.rounding import Delta, Rounding, Tally, edit
from sdd_lora.checkpoint.undo import (
    held,
    require_sole,
    require_writable,
    roll_back,
    size_of_undo,
    write_undo,
)
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io import torch_zip as pickles
from sdd_lora.io.atomic import (
    atomic_folder,
    atomic_output,
    link_tree,
    refuse_existing,
    require_space,
    sync_folder,
)
from sdd_lora.io.safetensors import Header, open_input
from sdd_lora.progress import warn

#: Below this share of an edit surviving the rounding, or above that error, a warning is due.
_REALISED_ENOUGH, _ERROR_TOO_MUCH = 0.9, 0.5
#: At most so much is edited in memory while the journal of a change in place goes to the disk.
_AHEAD_BYTES = 96 << 20


@dataclass(frozen=True)
class Change:
    """What a bake did to one tensor; see `arithmetic.Tally` for the numbers."""

    module: str
    file: Path
    key: str
    dtype: str
    intended: float
    realised: float
    error: float


@dataclass
class BakeReport:
    """What was baked, where, and what rounding left of it.

    `copies` names the sets of weights that were found and edited (EMA copies, variants), `left_out`
    what of a legacy file or a folder isn't in the output, `refused` the globals of a pickle.
    """

    model: Path
    output: Path
    undo: Path | None
    adapters: tuple[BakedAdapter, ...]
    copies: tuple[str, ...]
    dropped: int
    changes: list[Change] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    total: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class _Edited:
    """One tensor's edit, done in memory: its new bytes, what it was, and digests of the tensor
    before and after."""

    data: memoryview
    change: Change
    tally: Tally
    before: str
    after: str


def bake(
    model: str | Path, adapters: Weighted, out: str | Path | None = None, *,
    in_place: bool = False, undo: str | Path | None = None, ema: EmaChoice = "patch",
    rounding: Rounding | None = None, base: str | Path | None = None, force: bool = False,
) -> BakeReport:  # fmt: skip
    """Write Σ wᵢ·ΔWᵢ into a checkpoint on disk: to `out`, or in place with an undo file.

    W' = round(W + Σ wᵢ·ΔWᵢ), summed in fp64 and rounded once, in every copy of the weights. All
    other bytes, the tensors' order and the metadata stay; what was baked is added to the metadata.
    With `base`, an adapter whose delta already lies in the model is found without its metadata.

    Raises BadInput where the model is no Stable Diffusion 1.x, an adapter doesn't fit or is in it
    already, or an output stands in the way; SddLoraError where the disk is full or fails. The model
    is then as it was.
    """
    if in_place == (out is not None):
        raise BadInput("expected either an output (-o) or --in-place")
    if in_place and str(model) in EMBEDDED:
        raise BadInput(f"{model}: travels with the package; bake it to a new output (-o)")
    _require_adapters(adapters)
    path, rounding = locate(model), rounding or Rounding()
    with ExitStack() as stack:
        if in_place:
            stack.enter_context(held(path))
        checkpoint = open_checkpoint(path)
        require_sd1_unet(checkpoint)
        if base is not None:
            presence.refuse_present(checkpoint, open_checkpoint(locate(base)), adapters)
        job = _Job(checkpoint, adapters, ema, rounding, None if undo is None else Path(undo))
        if out is None:
            job.in_place(force)
        else:
            job.to(named(Path(out)), force)
    job.judge()
    return job.report


def _require_adapters(adapters: Weighted) -> None:
    if not adapters:
        raise BadInput("nothing to bake: expected at least one adapter")
    seen: list[BakedAdapter] = []
    for adapter, weight in adapters:
        if not math.isfinite(weight) or weight == 0:
            raise BadInput(f"{adapter.name}: expected a finite weight other than 0, found {weight}")
        if not adapter.factors:
            raise BadInput(f"{adapter.name}: nothing to bake: it holds no module")
        new = BakedAdapter.of(adapter, weight)
        for earlier in seen:
            if new.identity == earlier.identity:
                raise BadInput(f"{new.name}: given twice; give it once, with the sum of weights")
            if new.identities & earlier.identities:
                raise BadInput(
                    f"{new.name} and {earlier.name}: one was made from the other, or both from a "
                    "third, which would be in the model twice; give one of them"
                )
        seen.append(new)


class _Job:
    """One call of `bake`."""

    def __init__(
        self, checkpoint: Checkpoint, adapters: Weighted, ema: EmaChoice, rounding: Rounding,
        undo: Path | None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.rounding, self.undo, self.ema = checkpoint, rounding, undo, ema
        self.edits = plan_edits(checkpoint, adapters, ema)
        self.baked = tuple(BakedAdapter.of(adapter, weight) for adapter, weight in adapters)
        self.chains = {
            edits.path: provenance.chain_of(edits.path, edits.header) for edits in self.edits
        }  # fmt: skip
        edited = {Place(edits.path, key) for edits in self.edits for key in edits.parts}
        copies = tuple(
            f"{copy.component}: {copy.label}" for copy in checkpoint.copies
            if edited & set(copy.places.values())
        )  # fmt: skip
        self.report = BakeReport(
            checkpoint.path, checkpoint.path, undo, self.baked, copies,
            sum(len(edits.dropped) for edits in self.edits),
        )  # fmt: skip
        self._refuse_twice()

    def _refuse_twice(self) -> None:
        for path, chain in self.chains.items():
            for known in (adapter for baking in chain for adapter in baking.adapters):
                for new in self.baked:
                    if new.identities & known.identities:
                        raise BadInput(
                            f"{path}: {new.name} is in it already, as {known.name} at weight "
                            f"{known.weight:g}; unbake it first, or bake into the original"
                        )
        if any(self.chains.values()):
            self.report.warnings.append(
                f"{self.checkpoint.path} holds baked adapters already, so its weights are rounded "
                "a second time; for one rounding, bake all of them into the original"
            )

    def judge(self) -> None:
        """Warn where the dtype kept too little of the edit."""
        for dtype in sorted({change.dtype for change in self.report.changes}):
            changes = [change for change in self.report.changes if change.dtype == dtype]
            poor = [
                change for change in changes
                if change.realised < _REALISED_ENOUGH or change.error > _ERROR_TOO_MUCH
            ]  # fmt: skip
            if poor:
                worst = min(change.realised for change in poor)
                self.report.warnings.append(
                    f"{dtype} is too coarse for this edit: {len(poor)} of {len(changes)} tensors "
                    f"keep too little of it (the least: {worst:.0%}); bake with --rounding "
                    "stochastic, or into an fp16 or fp32 copy of the model"
                )
        for message in self.report.warnings:
            warn(message)

    # To a new file or folder

    def to(self, out: Path, force: bool) -> None:
        source = self.checkpoint.path
        self._require_new(out, force)
        if self.undo is not None:
            self._require_new_undo(self.undo, out, force)
        self._require_space(out)
        self.report.output = out
        if source.is_dir():
            with atomic_folder(out) as folder:
                self._write_undo()
                self._fill(folder)
        else:
            sidecar = provenance.sidecar_of(out)
            stale = sidecar.exists()  # it spoke for the file that is replaced
            with atomic_output(out) as file:
                self._write_undo()
                self._write(self.edits[0], file)
            if stale:
                sidecar.unlink()

    def _write_undo(self) -> None:
        if self.undo is not None:
            with atomic_output(self.undo) as kept:
                write_undo(kept, self._undo_content())

    def _fill(self, folder: Path) -> None:
        """The model's folder anew: untouched files linked, edited ones written."""
        root = self.checkpoint.path
        rewritten = [edits.path for edits in self.edits]
        sidecars = map(provenance.sidecar_of, rewritten)
        stale = self._stale()
        link_tree(root, folder, [*rewritten, *sidecars, *stale])
        self.report.left_out += tuple(path.relative_to(root).as_posix() for path in stale)
        for edits in self.edits:
            target = folder / edits.path.relative_to(root)
            if pickles.is_pickle(edits.path):
                target = _as_safetensors(target)
            with open(target, "w+b") as file:
                self._write(edits, file)

    def _stale(self) -> list[Path]:
        """Copies that aren't edited, of weights that are."""
        folders = {self.checkpoint.path, *(edits.path.parent for edits in self.edits)}
        return [path for path in self.checkpoint.unread if path.parent in folders]

    def _require_new(self, out: Path, force: bool) -> None:
        source = self.checkpoint.path
        if out.exists() and out.samefile(source):
            raise BadInput(f"{out}: is the input itself; choose another output or --in-place")
        refuse_existing(out, force)
        if source.is_file() and out.suffix != ".safetensors":
            raise BadInput(f"{out}: expected an output named *.safetensors")
        if source.is_dir() and out.suffix in MODEL_SUFFIXES:
            raise BadInput(
                f"{out}: the model is a folder, and so is what is written; expected a folder's name"
            )
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise BadInput(f"{out}: lies inside the input; choose another output")
        require_apart(out, source)

    def _require_new_undo(self, undo: Path, out: Path | None, force: bool) -> None:
        refuse_existing(undo, force)
        if undo.exists() and any(undo.samefile(path) for path in self.checkpoint.headers):
            raise BadInput(f"{undo}: is the model itself; choose another undo file")
        source, place = self.checkpoint.path, _place(undo)
        for path in (source,) if out is None else (source, out):
            if source.is_dir():
                if place.is_relative_to(path.resolve()):
                    raise BadInput(f"{undo}: lies inside {path}; choose another undo file")
            elif place in (_place(path), _place(journal_of(path))):
                raise BadInput(f"{undo}: is {path} itself or its journal; choose another undo file")
        legacy = [edits.path for edits in self.edits if pickles.is_pickle(edits.path)]
        if legacy:
            raise BadInput(f"{legacy[0]}: a legacy file has no undo: the original stays; keep it")
        if self.ema == "drop":
            raise BadInput(
                "--ema drop has no undo: the undo file would hold all EMA copies; keep the original"
            )

    def _require_space(self, out: Path) -> None:
        needed = sum(
            edits.header.data_start + PAGE_BYTES + sum(
                stored_bytes(info) for key, info in edits.header.tensors.items()
                if key not in edits.dropped
            )
            for edits in self.edits
        )  # fmt: skip
        undo = size_of_undo(self._undo_content()) if self.undo is not None else 0
        together = self.undo is not None and _same_disk(self.undo, out)
        require_space(out.absolute().parent, needed + undo * together)
        if self.undo is not None and not together:
            require_space(self.undo.absolute().parent, undo)

    def _undo_content(self) -> list[tuple[str, Path, Header, list[str]]]:
        root = self.checkpoint.path
        return [
            (
                edits.path.relative_to(root).as_posix() if root.is_dir() else root.name,
                edits.path, edits.header, list(edits.parts),
            )
            for edits in self.edits
        ]  # fmt: skip

    def _write(self, edits: Edits, target: BinaryIO) -> None:
        """The file anew: all bytes copied, then the edited tensors, then the header."""
        header = edits.header
        tensors = laid_out(header, edits.dropped)
        baking = Baking(self.baked, _name(self.rounding), self.ema, whole=self.undo is not None)
        chain = (*self.chains[edits.path], baking)
        head = encode_header(
            tensors, provenance.metadata_with(header, chain), like=header.data_start
        )  # fmt: skip
        output = Header(tensors, {}, len(head))
        if isinstance(header, pickles.PickleHeader):
            self.report.left_out += header.left_out
            self.report.refused += header.refused
        with open_input(edits.path) as source, _workers() as pool:
            edited = self._start_editing(pool, edits, source, target, output)
            rest = pool.submit(_rest_digest, edits, source) if baking.whole else None
            for segment in segments(edits, output):
                copy_range(source, target, segment)
            for key in strided(header) & set(tensors) - set(edits.parts):
                write_at(target, len(head) + tensors[key].start, read_bytes(source, header, key))
            before, after = self._tell(edits, source, edited)
            done = replace(
                baking, before=before, after=after, rest=rest.result() if rest else baking.rest
            )
        metadata = provenance.metadata_with(header, (*chain[:-1], done))
        write_at(target, 0, encode_header(tensors, metadata, like=header.data_start))

    def _start_editing(
        self, pool: ThreadPoolExecutor, edits: Edits, source: BinaryIO, target: BinaryIO,
        output: Header, ahead: dict[Place, Future[_Edited]] | None = None,
    ) -> Iterator[_Edited]:  # fmt: skip
        """Write the touched tensors, edited now or in `ahead`, beside whatever else is done; what
        was done to them, in their order."""
        known = ahead or {}

        def write_one(key: str) -> _Edited:
            begun = known.pop(Place(edits.path, key), None)
            edited = begun.result() if begun else self._edit(edits, source, key)
            position = output.data_start + output.tensors[key].start
            write_at(target, position, edited.data)
            start_writing(target, position, len(edited.data))
            return replace(edited, data=memoryview(b""))

        return pool.map(write_one, edits.parts)

    def _edit(self, edits: Edits, source: BinaryIO, key: str) -> _Edited:
        module, parts = edits.parts[key]
        info = edits.header.tensors[key]
        before = read_bytes(source, edits.header, key)
        after, tally = edit(key, before, info, Delta.of(parts), self.rounding)
        change = Change(
            module, edits.path, key, info.dtype, tally.intended, tally.realised, tally.error
        )
        digests = (hashlib.sha256(data).hexdigest() for data in (before, after))
        return _Edited(after, change, tally, *digests)

    def _tell(self, edits: Edits, source: BinaryIO, edited: Iterable[_Edited]) -> tuple[str, str]:
        """Wait for the edits and report them; returns `Baking.before` and `Baking.after`."""
        head = hashlib.sha256(read_at(source, 0, edits.header.data_start)).hexdigest()
        before, after = [head], []
        for one in edited:
            self.report.changes.append(one.change)
            self.report.total += one.tally
            before.append(one.before)
            after.append(one.after)
        return provenance.digest_of(before), provenance.digest_of(after)

    # In place

    def in_place(self, force: bool) -> None:
        root = self.checkpoint.path
        undo = self.undo or _free_undo(root)
        self._require_new_undo(undo, None, force)
        self._require_changeable()
        journal = journal_of(root)
        content = self._undo_content()
        require_space(journal.absolute().parent, size_of_undo(content))
        with _rolled_back_on_failure(root), ExitStack() as stack:
            files: dict[Path, BinaryIO] = {
                edits.path: stack.enter_context(open(edits.path, "r+b")) for edits in self.edits
            }
            pool = stack.enter_context(_workers())
            ahead = self._edit_ahead(pool, files)
            with atomic_output(journal) as kept:
                rests = write_undo(kept, content)
            for edits in self.edits:  # the journal is on the disk: now, and not before
                self._patch(pool, edits, files[edits.path], ahead, rests[edits.path])
            _move(journal, undo)
        self.report.undo = undo

    def _edit_ahead(
        self, pool: ThreadPoolExecutor, files: dict[Path, BinaryIO]
    ) -> dict[Place, Future[_Edited]]:
        """Begin to edit in memory, up to a limit, while the disk is busy with the journal."""
        ahead, size = {}, 0
        for edits in self.edits:
            for key in edits.parts:
                size += edits.header.tensors[key].nbytes
                if size <= _AHEAD_BYTES:
                    task = pool.submit(self._edit, edits, files[edits.path], key)
                    ahead[Place(edits.path, key)] = task
        return ahead

    def _require_changeable(self) -> None:
        if stale := self._stale():
            raise BadInput(
                f"{stale[0]}: another copy of the weights, which isn't edited in place; "
                "remove it, or bake to a new folder (-o)"
            )
        for edits in self.edits:
            require_sole(edits.path, self.checkpoint.path)
            require_writable(edits.path)

    def _patch(
        self, pool: ThreadPoolExecutor, edits: Edits, file: BinaryIO,
        ahead: dict[Place, Future[_Edited]], rest: str,
    ) -> None:  # fmt: skip
        """Edit a file's tensors where they are, then its header or its sidecar."""
        header = edits.header
        edited = self._start_editing(pool, edits, file, file, header, ahead)
        before, after = self._tell(edits, file, edited)
        baking = Baking(
            self.baked, _name(self.rounding), self.ema, before=before, after=after, rest=rest
        )
        chain = (*self.chains[edits.path], baking)
        metadata = provenance.metadata_with(header, chain)
        head = encode_header(header.tensors, metadata, like=header.data_start)
        text = head[8:].rstrip(b" ")
        fits = 8 + len(text) <= header.data_start
        if fits:
            head = pad_header(text, header.data_start)
        if inside := fits or insert_room(file, len(head) - header.data_start):
            write_at(file, 0, head)
        _sync(file)  # once: until the journal goes, no order matters
        if inside:
            provenance.sidecar_of(edits.path).unlink(missing_ok=True)
        else:
            provenance.write_sidecar(edits.path, chain, next(iter(edits.parts)))


@contextmanager
def _rolled_back_on_failure(model: Path) -> Iterator[None]:
    """What a kill leaves to the next call is done at once where this one can still do it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if journal_of(model).exists():
            roll_back(model)
        if isinstance(error, OSError):
            raise SddLoraError(f"{model}: not changed: {error.strerror or error}") from error
        raise


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads for arithmetic and digests beside the copying; what fails ends them early.

    BLAS gets one thread in each: for products as thin as these its own threads mostly spin.
    """
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 4))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _rest_digest(edits: Edits, source: BinaryIO) -> str:
    """The fingerprint of every byte that isn't edited."""
    others = [key for key in edits.header.tensors if key not in edits.parts]
    return provenance.checksum_of_tensors(source, edits.header, others)


def _as_safetensors(path: Path) -> Path:
    """What diffusers and transformers call the safetensors of a pickled file."""
    if "-of-" in path.name:
        raise BadInput(f"{path.name}: shards of pickles; save the model as safetensors first")
    stem = "model" if path.name.startswith("pytorch_model") else path.name.partition(".")[0]
    return path.with_name(stem + path.name[path.name.index(".") :][: -len(".bin")] + ".safetensors")


def _free_undo(model: Path) -> Path:
    """The first free name for an undo file beside a model. User interfaces list no such file."""
    numbered = (model.with_name(f"{model.name}.undo{n}") for n in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError:  # another disk
        with open(source, "rb") as kept, atomic_output(target) as moved:
            shutil.copyfileobj(kept, moved, 1 << 20)
        source.unlink()
    for folder in {target.parent, source.parent}:
        sync_folder(folder)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _place(path: Path) -> Path:
    """Where a file of that name is written: in the folder itself, whatever links lead there."""
    return path.absolute().parent.resolve() / path.name


def _same_disk(one: Path, other: Path) -> bool:
    return one.absolute().parent.stat().st_dev == other.absolute().parent.stat().st_dev


def _name(rounding: Rounding) -> str:
    return rounding.how if rounding.how == "nearest" else f"{rounding.how}, seed {rounding.seed}"
