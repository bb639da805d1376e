"""Editing a file's tensors in threads, beside whatever else is read and written."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from threadpoolctl import threadpool_limits

from sdd_lora.checkpoint.copying import as_array, read_at, read_bytes, start_writing, write_at
from sdd_lora.checkpoint.history import digest_of
from sdd_lora.checkpoint.plan import FilePlan
from sdd_lora.checkpoint.rounding import Delta, Rounding, Tally, edit
from sdd_lora.io.safetensors import Header


@dataclass(frozen=True)
class Change:
    """The edit of one tensor; see `rounding.Tally` for the numbers."""

    module: str
    file: Path
    key: str
    dtype: str
    intended: float
    realised: float
    error: float


@dataclass(frozen=True)
class EditedTensor:
    """A tensor's new bytes, and digests of the tensor before and after."""

    data: memoryview
    change: Change
    tally: Tally
    before: str
    after: str


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads for arithmetic and digests beside the copying; a failure ends them early.

    BLAS gets one thread in each: for products as thin as these its own threads mostly spin.
    """
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 4))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def edit_tensor(plan: FilePlan, key: str, rounding: Rounding, source: BinaryIO) -> EditedTensor:
    """Read a tensor, add its deltas and round, in memory."""
    module, parts = plan.edits[key]
    info = plan.header.tensors[key]
    before = read_bytes(source, plan.header, key)
    delta = Delta.of(parts, as_array(before, info))
    after, tally = edit(key, before, info, delta, rounding)
    change = Change(module, plan.path, key, info.dtype, tally.intended, tally.realised, tally.error)
    digests = (hashlib.sha256(data).hexdigest() for data in (before, after))
    return EditedTensor(after, change, tally, *digests)


def write_edits(
    pool: ThreadPoolExecutor,
    plan: FilePlan,
    rounding: Rounding,
    source: BinaryIO,
    target: BinaryIO,
    output: Header,
    begun: dict[str, Future[EditedTensor]] | None = None,
) -> Iterator[EditedTensor]:
    """Edit a file's tensors in threads and write them to where `output` has them.

    `begun` holds edits that are under way. Yields the edits in the plan's order, without data.
    """
    begun = begun or {}

    def write_one(key: str) -> EditedTensor:
        future = begun.pop(key, None)
        edited = future.result() if future else edit_tensor(plan, key, rounding, source)
        position = output.data_start + output.tensors[key].start
        write_at(target, position, edited.data)
        start_writing(target, position, len(edited.data))
        return replace(edited, data=memoryview(b""))

    return pool.map(write_one, plan.edits)


def fingerprints(
    plan: FilePlan, source: BinaryIO, edited: Iterable[EditedTensor]
) -> tuple[str, str]:
    """`BakeRecord.before` and `BakeRecord.after` of a file and its edits."""
    head = hashlib.sha256(read_at(source, 0, plan.header.data_start)).hexdigest()
    edits = list(edited)
    before = digest_of([head, *(one.before for one in edits)])
    return before, digest_of(one.after for one in edits)
