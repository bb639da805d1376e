"""Adapters into a checkpoint: a copy with the touched tensors edited, or the file itself."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

from sdd_lora.adapter.algebra import Weighted
from sdd_lora.adapter.weighted import AdaptersLike, with_weights
from sdd_lora.checkpoint.copying import (
    PAGE_BYTES,
    copy_range,
    encode_header,
    read_bytes,
    write_at,
)
from sdd_lora.checkpoint.describe import open_sd1
from sdd_lora.checkpoint.detect import refuse_present
from sdd_lora.checkpoint.editing import Change, EditedTensor, fingerprints, workers, write_edits
from sdd_lora.checkpoint.history import (
    BakedAdapter,
    BakeRecord,
    checksum_of_tensors,
    metadata_with,
    sidecar_of,
)
from sdd_lora.checkpoint.in_place import change_in_place
from sdd_lora.checkpoint.journal import journal_of
from sdd_lora.checkpoint.locate import EMBEDDED, MODEL_SUFFIXES, locate, named, require_new_output
from sdd_lora.checkpoint.plan import BakePlan, EmaChoice, FilePlan, plan_bake
from sdd_lora.checkpoint.prediction import copy_config
from sdd_lora.checkpoint.rounding import Rounding, Tally
from sdd_lora.checkpoint.undo import free_undo_name, lock_model
from sdd_lora.checkpoint.undo_file import size_of_undo, write_undo
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip
from sdd_lora.io.atomic import (
    atomic_folder,
    atomic_output,
    link_tree,
    refuse_existing,
    require_space,
)
from sdd_lora.io.safetensors import Header, open_input
from sdd_lora.progress import warn

#: Below this share of an edit surviving the rounding, or above that error, a warning is due.
_REALISED_ENOUGH, _ERROR_TOO_MUCH = 0.9, 0.5


@dataclass(repr=False)
class BakeReport:
    """What was baked, where, and what rounding left of it.

    `copies` names the weight sets that were edited (EMA copies, variants), `left_out` the parts of
    a legacy file or a folder that aren't in the output, `refused` the globals of a pickle.
    `adapters` are those that are recorded in the model; `changed` says whether any byte of a weight
    is another than before.
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
    changed: bool = False

    def __repr__(self) -> str:
        baked = ", ".join(f"{a.name} × {a.weight:g}" for a in self.adapters) or "no adapter"
        tensors = f"{len(self.changes)} tensors of {', '.join(self.copies)}"
        return f"BakeReport({str(self.output)!r}: {baked}, {tensors})"

    def add(self, edited: list[EditedTensor]) -> None:
        for one in edited:
            self.changes.append(one.change)
            self.total += one.tally
            self.changed |= one.before != one.after


def bake(
    model: str | Path,
    adapters: AdaptersLike,
    out: str | Path | None = None,
    *,
    in_place: bool = False,
    undo: str | Path | None = None,
    ema: EmaChoice = "patch",
    rounding: Rounding | Literal["nearest", "stochastic"] = "nearest",
    base: str | Path | None = None,
    force: bool = False,
) -> BakeReport:
    """Write Σ wᵢ·ΔWᵢ into a checkpoint on disk: to `out`, or in place with an undo file.

    `adapters`: Adapters, files, runs' folders or hub ids, each alone (weight 1), as "A:0.8" or as
    (A, 0.8). W' = round(W + Σ wᵢ·ΔWᵢ), summed in fp64 and rounded once, in every copy of the
    weights. All other bytes, the tensors' order and the metadata stay; what was baked is added to
    the metadata. With `base`, an adapter whose delta already lies in the model is found without its
    metadata.

    Raises BadInput where the model is no Stable Diffusion 1.x, an adapter doesn't fit or is in it
    already, or an output stands in the way; SddLoraError where the disk is full or fails. The model
    is then as it was.
    """
    if in_place == (out is not None):
        raise BadInput("expected either `out=PATH` or `in_place=True`")
    if in_place and str(model) in EMBEDDED:
        raise BadInput(f"{model}: travels with the package; bake it into a new one, `out=PATH`")
    parts = with_weights(adapters)
    _require_adapters(parts)
    rounding = Rounding(rounding) if isinstance(rounding, str) else rounding
    path = locate(model)
    with ExitStack() as stack:
        if in_place:
            stack.enter_context(lock_model(path))
        checkpoint = open_sd1(path)
        if base is not None:
            refuse_present(checkpoint, open_sd1(locate(base)), parts)
        whole = not in_place and undo is not None
        plan = plan_bake(checkpoint, parts, ema, rounding, whole)
        undo = None if undo is None else Path(undo)
        if out is None:
            undo = undo or free_undo_name(path)
            _require_new_undo(plan, undo, None, force)
            report = _report(plan, path, undo)
            report.add(change_in_place(plan, undo))
            report.warnings += [
                f"{folder}: holds one more UNet, which isn't edited in place"
                for folder in plan.stale
            ]
        else:
            out = named(Path(out))
            require_new_output(out, path, force)
            _require_suffix(out, path)
            if undo is not None:
                _require_new_undo(plan, undo, out, force)
            _require_space(plan, out, undo)
            report = _report(plan, out, undo)
            (_write_folder if path.is_dir() else _write_file)(plan, out, undo, report)
    _add_warnings(plan, parts, report)
    for message in report.warnings:
        warn(message)
    return report


# Before anything is written


def _require_suffix(out: Path, model: Path) -> None:
    if model.is_file() and out.suffix.lower() != ".safetensors":
        raise BadInput(f"{out}: expected an output named *.safetensors")
    if model.is_dir() and out.suffix.lower() in MODEL_SUFFIXES:
        raise BadInput(
            f"{out}: the model is a folder, and so is what is written; expected a folder's name"
        )


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


def _require_new_undo(plan: BakePlan, undo: Path, out: Path | None, force: bool) -> None:
    refuse_existing(undo, force)
    if undo.exists() and any(undo.samefile(path) for path in plan.checkpoint.headers):
        raise BadInput(f"{undo}: is the model itself; choose another undo file")
    source, place = plan.checkpoint.path, _entry_of_folder(undo)
    for path in (source,) if out is None else (source, out):
        if source.is_dir():
            if place.is_relative_to(path.resolve()):
                raise BadInput(f"{undo}: lies inside {path}; choose another undo file")
        elif place in (_entry_of_folder(path), _entry_of_folder(journal_of(path))):
            raise BadInput(f"{undo}: is {path} itself or its journal; choose another undo file")
    legacy = [file.path for file in plan.files if torch_zip.is_torch_file(file.path)]
    if legacy:
        raise BadInput(f"{legacy[0]}: a legacy file has no undo: the original stays; keep it")
    if plan.record.ema == "drop":
        raise BadInput(
            '`ema="drop"` has no undo: the undo file would hold all EMA copies; keep the original'
        )


def _entry_of_folder(path: Path) -> Path:
    """The folder entry that writing `path` makes, whatever links lead to that folder."""
    return path.absolute().parent.resolve() / path.name


def _require_space(plan: BakePlan, out: Path, undo: Path | None) -> None:
    needed = sum(
        file.header.data_start + PAGE_BYTES + sum(i.nbytes for i in file.output_tensors().values())
        for file in plan.files
    )
    if undo is not None:
        undo_size = size_of_undo(plan)
        if undo.absolute().parent.stat().st_dev == out.absolute().parent.stat().st_dev:
            needed += undo_size
        else:
            require_space(undo.absolute().parent, undo_size)
    require_space(out.absolute().parent, needed)


# To a new file or folder


def _report(plan: BakePlan, output: Path, undo: Path | None) -> BakeReport:
    return BakeReport(
        model=plan.checkpoint.path,
        output=output,
        undo=undo,
        adapters=plan.record.adapters,
        copies=plan.edited_sets,
        dropped=sum(len(file.dropped) for file in plan.files),
    )


def _write_file(plan: BakePlan, out: Path, undo: Path | None, report: BakeReport) -> None:
    sidecar = sidecar_of(out)
    stale = sidecar.exists()  # of the file that is replaced
    with atomic_output(out) as target:
        _write_undo(plan, undo)
        _write_tensors(plan, plan.files[0], target, report)
    if stale:
        sidecar.unlink()
    if warning := copy_config(plan.checkpoint.path, out):
        report.warnings.append(warning)


def _write_folder(plan: BakePlan, out: Path, undo: Path | None, report: BakeReport) -> None:
    """The model's folder anew: untouched files linked, edited ones written."""
    root = plan.checkpoint.path
    rewritten = [file.path for file in plan.files]
    with atomic_folder(out) as folder:
        _write_undo(plan, undo)
        left_out = plan.stale + plan.dropped_folders
        link_tree(root, folder, [*rewritten, *map(sidecar_of, rewritten), *left_out])
        report.left_out += tuple(path.relative_to(root).as_posix() for path in left_out)
        for file in plan.files:
            target = folder / file.path.relative_to(root)
            if torch_zip.is_torch_file(file.path):
                target = _as_safetensors(target)
            with open(target, "w+b") as opened:
                _write_tensors(plan, file, opened, report)


def _write_undo(plan: BakePlan, undo: Path | None) -> None:
    if undo is not None:
        with atomic_output(undo) as kept:
            write_undo(kept, plan)


def _as_safetensors(path: Path) -> Path:
    """The name that diffusers and transformers give the safetensors of a pickled file."""
    if "-of-" in path.name:
        raise BadInput(f"{path.name}: shards of pickles; save the model as safetensors first")
    stem = "model" if path.name.startswith("pytorch_model") else path.name.partition(".")[0]
    return path.with_name(stem + path.name[path.name.index(".") :][: -len(".bin")] + ".safetensors")


def _write_tensors(plan: BakePlan, file: FilePlan, target: BinaryIO, report: BakeReport) -> None:
    """A file anew: all bytes copied, then the edited tensors, then the header."""
    header, tensors = file.header, file.output_tensors()

    def encoded(record: BakeRecord) -> bytes:
        metadata = metadata_with(header, (*file.history, record))
        return encode_header(tensors, metadata, like=header.data_start)

    output = Header(tensors, {}, len(encoded(plan.record)))  # fingerprints have one length
    if isinstance(header, torch_zip.PickleHeader):
        report.left_out += header.left_out
        report.refused += header.refused
    with open_input(file.path) as source, workers() as pool:
        edited = write_edits(pool, file, plan.rounding, source, target, output)
        rest = (
            pool.submit(checksum_of_tensors, source, header, file.untouched)
            if plan.record.whole
            else None
        )
        for segment in file.segments(output):
            copy_range(source, target, segment)
        for key in file.strided() & set(tensors) - set(file.edits):
            position = output.data_start + tensors[key].start
            write_at(target, position, read_bytes(source, header, key))
        done = list(edited)
        report.add(done)
        before, after = fingerprints(file, source, done)
        record = replace(plan.record, before=before, after=after)
        if rest is not None:
            record = replace(record, rest=rest.result())
    write_at(target, 0, encoded(record))


# After the edit


def _add_warnings(plan: BakePlan, adapters: Weighted, report: BakeReport) -> None:
    """Warn of edits that change nothing, of a second rounding and of a dtype that is too coarse."""
    for adapter, _ in adapters:
        if adapter.norm() == 0:
            report.warnings.append(
                f"{adapter.name}: changes nothing: its delta is 0 everywhere; it is not recorded "
                "as baked in"
            )
    if report.adapters and not report.changed:
        report.warnings.append(
            f"{report.output}: the edit changes nothing: rounding leaves every weight as it was"
        )
    if report.changed and any(file.history for file in plan.files):
        report.warnings.append(
            f"{plan.checkpoint.path} holds baked adapters already, so its weights are rounded "
            "a second time; for one rounding, bake all of them into the original"
        )
    for dtype in sorted({change.dtype for change in report.changes}):
        changes = [change for change in report.changes if change.dtype == dtype]
        poor = [
            change.realised
            for change in changes
            if change.realised < _REALISED_ENOUGH or change.error > _ERROR_TOO_MUCH
        ]
        if poor:
            report.warnings.append(
                f"{dtype} is too coarse for this edit: {len(poor)} of {len(changes)} tensors "
                f"keep too little of it (the least: {min(poor):.0%}); bake with "
                "`rounding='stochastic'`, or into an fp16 or fp32 copy of the model"
            )
