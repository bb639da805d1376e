"""A change that is killed, fails or meets another one: the model is as before, or whole."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
from support import checkpoint_models as models
from support.checkpoint_models import contents, tensors_in, write_protect

from sdd_lora.checkpoint import bake as bake_module
from sdd_lora.checkpoint import in_place
from sdd_lora.checkpoint import undo as undo_module
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.copying import write_at
from sdd_lora.checkpoint.detect import history_of_model
from sdd_lora.checkpoint.journal import journal_of
from sdd_lora.checkpoint.layout import open_checkpoint
from sdd_lora.checkpoint.undo import lock_model, unbake
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.safetensors import read_tensors

A, B = models.adapter(name="a"), models.adapter(seed=1, leaves=("to_q",), name="b")


class Interrupted(BaseException):
    pass


def writes_until(monkeypatch, count: int, error: BaseException) -> None:
    """Fail at the nth write of the bake or unbake."""
    left = [count]

    def write(target, position, data):
        left[0] -= 1
        if left[0] < 0:
            raise error
        write_at(target, position, data)

    for module in ("bake", "editing", "in_place", "undo_file"):
        monkeypatch.setattr(f"sdd_lora.checkpoint.{module}.write_at", write)


@pytest.mark.parametrize("ahead", [0, 50_000, 1 << 30])
def test_no_byte_changes_before_the_journal_is_on_the_disk(source, tmp_path, monkeypatch, ahead):
    """Whatever has been edited in memory by then: nothing, some tensors or all."""
    bake(source, [(A, 1.0)], out=tmp_path / "o.safetensors")
    original, begin, sync = source.read_bytes(), in_place._begin, os.fsync
    begun, at_syncs = {}, []

    def keep(*arguments):
        found = begin(*arguments)
        begun.update(found[source])
        return found

    def fsync(descriptor):
        wait(begun.values())
        at_syncs.append(source.read_bytes() == original)
        sync(descriptor)

    monkeypatch.setattr(in_place, "_AHEAD_BYTES", ahead)
    monkeypatch.setattr(in_place, "_begin", keep)
    monkeypatch.setattr(os, "fsync", fsync)
    changes = bake(source, [(A, 1.0)], in_place=True).changes
    assert (len(begun) > 0, len(begun) == len(changes)) == (ahead > 0, ahead == 1 << 30)
    journal, folder, model, *_ = at_syncs
    assert journal and folder and not model
    assert tensors_in(source) == tensors_in(tmp_path / "o.safetensors")


@pytest.mark.parametrize("count", [0, 1, 33, 64, 65, 66])
def test_an_interrupted_bake_in_place_is_rolled_back(source, monkeypatch, count):
    original = source.read_bytes()
    with monkeypatch.context() as patch:
        writes_until(patch, count, Interrupted())
        try:
            bake(source, [(A, 1.0)], in_place=True)
        except Interrupted:
            assert count < 66
    if not journal_of(source).exists():
        return
    with pytest.raises(BadInput, match="roll it back"):
        open_checkpoint(source)
    assert unbake(source, journal_of(source), in_place=True).rolled_back
    assert source.read_bytes() == original
    assert bake(source, [(A, 1.0)], in_place=True).changes


def test_the_next_bake_rolls_back_by_itself(folder, monkeypatch):
    original = contents(folder)
    with monkeypatch.context() as patch:
        writes_until(patch, 20, Interrupted())
        with pytest.raises(Interrupted):
            bake(folder, [(A, 1.0)], in_place=True)
    report = bake(folder, [(A, 1.0)], in_place=True)
    unbake(folder, report.undo, in_place=True)
    assert contents(folder) == original


def test_an_interrupted_unbake_ends_in_the_original(source, monkeypatch):
    original = source.read_bytes()
    report = bake(source, [(A, 1.0)], in_place=True)
    with monkeypatch.context() as patch:
        writes_until(patch, 30, Interrupted())
        with pytest.raises(Interrupted):
            unbake(source, report.undo, in_place=True)
    assert journal_of(source).exists()
    unbake(source, journal_of(source), in_place=True)
    assert source.read_bytes() == original


@pytest.mark.parametrize("part", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
def test_an_interrupted_change_is_seen_under_every_name(tmp_path, monkeypatch, part):
    model = models.write_folder(tmp_path / "folder")
    (tmp_path / "link.safetensors").symlink_to(model / "unet/diffusion_pytorch_model.safetensors")
    with monkeypatch.context() as patch:
        writes_until(patch, 20, Interrupted())
        with pytest.raises(Interrupted):
            bake(model / part, [(A, 1.0)], in_place=True)
    unet, link = model / "unet", tmp_path / "link.safetensors"
    everywhere = [model, unet, unet / "diffusion_pytorch_model.safetensors", link]
    for name in everywhere:
        with pytest.raises(BadInput, match=f"roll it back: sdd-lora unbake {model / part} "):
            open_checkpoint(name)
    with lock_model(model / part):
        pass
    assert all(map(open_checkpoint, everywhere))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("count", [0, 40])
def test_a_full_or_failing_disk_leaves_no_trace_of_a_copy(
    source, tmp_path, monkeypatch, code, count
):
    writes_until(monkeypatch, count, OSError(code, os.strerror(code)))
    before = contents(tmp_path)
    with pytest.raises(SddLoraError, match=os.strerror(code)):
        bake(source, [(A, 1.0)], out=tmp_path / "o.safetensors")
    assert contents(tmp_path) == before


def test_a_failing_disk_in_place_is_rolled_back_at_once(source, tmp_path, monkeypatch):
    before = contents(tmp_path)
    left = [20]

    def write_once_too_often(target, position, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write_at(target, position, data)

    monkeypatch.setattr("sdd_lora.checkpoint.editing.write_at", write_once_too_often)
    with pytest.raises(SddLoraError, match="not changed"):
        bake(source, [(A, 1.0)], in_place=True)
    assert left[0] < 0 and contents(tmp_path) == before


def test_an_edit_that_overflows_in_place_is_rolled_back_at_once(source, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(BadInput, match="don't fit"):
        bake(source, [(models.adapter(size=1e6, leaves=("to_v",)), 1.0)], in_place=True)
    assert contents(tmp_path) == before


def interrupted(model: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        writes_until(patch, 20, Interrupted())
        with pytest.raises(Interrupted):
            bake(model, [(A, 1.0)], in_place=True)


@pytest.mark.parametrize("change", ["other weights", "other size"])
def test_a_journal_is_put_back_into_its_own_model_alone(source, monkeypatch, change):
    interrupted(source, monkeypatch)
    tensors, metadata = read_tensors(source)
    if change == "other weights":
        tensors = {k: v * 2 if v.dtype == np.float16 else v for k, v in tensors.items()}
    else:
        metadata = {"note": "x" * 5000}
    models.write(source, tensors, metadata)
    before, journal = contents(source), journal_of(source)
    with pytest.raises(BadInput, match=f"remove {journal}"):
        bake(source, [(A, 1.0)], in_place=True)
    with pytest.raises(BadInput, match=f"remove {journal}"):
        unbake(source, journal, in_place=True)
    assert contents(source) == before


def test_a_journal_waits_for_a_model_that_can_be_written(source, monkeypatch):
    original = source.read_bytes()
    interrupted(source, monkeypatch)
    with monkeypatch.context() as patch:
        write_protect(patch, source)
        with pytest.raises(BadInput, match="can't be changed in place"):
            unbake(source, journal_of(source), in_place=True)
    unbake(source, journal_of(source), in_place=True)
    assert source.read_bytes() == original


def test_two_changes_in_place_at_once_are_one_change(source, tmp_path, monkeypatch):
    """The second comes after the first has read the headers, before it has written anything."""
    shutil.copy(source, tmp_path / "base.safetensors")

    def meanwhile(*_):
        with pytest.raises(BadInput, match="another process"):
            bake(source, [(A, 1.0)], in_place=True)

    original = source.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(bake_module, "refuse_present", meanwhile)
        report = bake(source, [(B, 1.0)], in_place=True, base=tmp_path / "base.safetensors")
    (entry,) = history_of_model(source)
    assert [adapter.name for adapter in entry.adapters] == ["b"]
    with monkeypatch.context() as patch:
        real = undo_module._require_as_baked
        patch.setattr(undo_module, "_require_as_baked", lambda *them: (meanwhile(), real(*them))[1])
        unbake(source, report.undo, in_place=True)
    assert source.read_bytes() == original


def test_a_file_that_was_replaced_before_it_was_locked_is_another(tmp_path, monkeypatch):
    import fcntl

    from sdd_lora.io.atomic import locked

    path, real = tmp_path / "m", fcntl.flock
    path.write_bytes(b"old")

    def late(descriptor, how):
        (tmp_path / "new").write_bytes(b"new")
        os.replace(tmp_path / "new", path)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BadInput, match="another process"), locked(path):
        pass


def test_a_change_in_place_by_another_process_is_respected(source):
    from sdd_lora.io.atomic import locked

    before = source.read_bytes()
    with locked(source), pytest.raises(BadInput, match="another process"):
        bake(source, [(A, 1.0)], in_place=True)
    assert source.read_bytes() == before and not journal_of(source).exists()


KILLED = """
import sys, time, random
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.bake import bake
adapter = Adapter.load(sys.argv[2])
print("ready", flush=True)
bake(sys.argv[1], [(adapter, 1.0)], **eval(sys.argv[3]))
"""


def killed(arguments: list[str], delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()


ROUNDS = int(os.environ.get("SDD_LORA_KILLS", "3"))


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_at_random_moments_in_place(tmp_path, source, folder, kind):
    model = source if kind == "file" else folder
    A.save(tmp_path / "a.safetensors", dtype="fp32")
    shutil.copy(source, tmp_path / "other.safetensors")
    original = contents(model)
    bake(model, [(A, 1.0)], out=tmp_path / f"o{model.suffix}")
    baked = tensors_in(tmp_path / f"o{model.suffix}")
    rng = random.Random(kind)
    for _ in range(ROUNDS):
        arguments = [str(model), str(tmp_path / "a.safetensors"), "{'in_place': True}"]
        killed(arguments, rng.uniform(0, 0.25))
        journal = journal_of(model)
        if journal.exists():
            unbake(model, journal, in_place=True)
            assert contents(model) == original
        elif history_of_model(model):
            assert tensors_in(model) == baked
            undo = next(tmp_path.glob(f"{model.name}.undo*"))
            unbake(model, undo, in_place=True)
            undo.unlink()
        assert contents(model) == original
        assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name or "journal" in p.name]


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_at_random_moments_while_a_copy_is_written(tmp_path, source, folder, kind):
    model = source if kind == "file" else folder
    out = tmp_path / f"o{model.suffix}"
    A.save(tmp_path / "a.safetensors", dtype="fp32")
    original = contents(model)
    bake(model, [(A, 1.0)], out=tmp_path / f"whole{model.suffix}")
    whole = contents(tmp_path / f"whole{model.suffix}")
    rng = random.Random(kind)
    for n in range(ROUNDS):
        arguments = f"{{'out': {str(out)!r}, 'force': {n % 2 == 1}}}"
        killed([str(model), str(tmp_path / "a.safetensors"), arguments], rng.uniform(0, 0.25))
        assert contents(model) == original
        if out.exists():
            assert list(contents(out).values()) == list(whole.values())
            if n % 2 == 0:
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    left = [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    assert len(left) <= (0 if kind == "file" else 2)
    bake(model, [(A, 1.0)], out=out, force=True)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]
